"""What of one run can be found out before it starts: its data, folder, compiler and logger."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from transfusion.cli.doctor import NEEDED_DISK_GIB, Finding
from transfusion.config import Config
from transfusion.errors import UserError, describe
from transfusion.files import lock

# Enough for files, worker processes and connections of one process. Shards need none.
FEW_DESCRIPTORS = 512
COMPILERS = ("c++", "g++", "clang++")


def look_at_run(config: Config) -> list[Finding]:
    """Everything about one configuration. What a training would refuse is missing, with the same words."""
    findings = [Finding("configuration", "note", text) for text in config.warnings()]
    for look in (_data, _folder, _compiler, _logger, _descriptors):
        findings += _told(look, config)
    return findings


def _told(look: Callable[[Config], Iterator[Finding]], config: Config) -> list[Finding]:
    try:
        return list(look(config))
    except UserError as error:
        text, _, remedy = str(error).partition("; ")
        return [Finding(look.__name__.strip("_"), "missing", text, remedy, required=True)]


def _data(config: Config) -> Iterator[Finding]:
    """All bytes of the shards are read, which neither size nor time can replace."""
    from transfusion.data.index.build import check_indexes

    state = check_indexes(config)
    yield Finding("data", "good", f"{state.shards} local shards, read and compared with their index files")
    if state.missing:
        yield Finding(
            "index", "note", f"{state.missing} shards have none yet; a training makes them at its start"
        )
    if state.stale:
        yield Finding(
            "index",
            "missing" if config.data.index else "note",
            f"{len(state.stale)} do not fit, such as {state.stale[0]}",
            f"transfusion data index CONFIG --out {config.data.index} --check"
            if config.data.index
            else "a training makes them anew at its start",
            required=bool(config.data.index),
        )


def _folder(config: Config) -> Iterator[Finding]:
    """In the nearest folder above that exists, since only a run makes its own."""
    folder = Path(config.run.folder).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            lock(file)
    except OSError as error:
        yield Finding("run folder", "missing", describe(error), "choose another run.dir", required=True)
        return
    free = shutil.disk_usage(place).free / 2**30
    enough = free >= NEEDED_DISK_GIB
    yield Finding(
        "run folder", "good" if enough else "note", f"{folder} can be written and locked, {free:.1f} GiB free"
    )


def _compiler(config: Config) -> Iterator[Finding]:
    if config.train.compile and not any(map(shutil.which, COMPILERS)):
        yield Finding(
            "compiler",
            "missing",
            "train.compile=true needs a C++ compiler, and none is here",
            "apt-get install build-essential, or set train.compile=false",
            required=True,
        )


def _logger(config: Config) -> Iterator[Finding]:
    from transfusion.observe.sinks import refuse_missing_logger

    if config.log.wandb:
        refuse_missing_logger(config)
        yield Finding("wandb", "good", "installed; with WANDB_MODE=online it asks for `wandb login` once")


def _descriptors(config: Config) -> Iterator[Finding]:
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if few < FEW_DESCRIPTORS:
        yield Finding(
            "descriptors", "note", f"only {few} files may be open at once", f"ulimit -n {min(most, 65536)}"
        )
