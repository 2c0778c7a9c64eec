"""Webdataset shards: written here, found by glob or brace range, and opened where an address names them.

The only importer of webdataset and fsspec.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from transfusion.data.shards.scan import SHARD_EXTENSIONS
from transfusion.errors import UserError, shown
from transfusion.files import atomic_file
from transfusion.urls import is_address, redacted, scheme

# img2dataset's layout: five digits of the shard, then four of the sample in it.
SAMPLES_PER_SHARD = 1000
MAX_SHARD = 10_000
# Of one brace range: a slip of the finger should not fill the memory.
MAX_NAMES = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)\}")
# Letters of a path, which no system takes longer.
_MAX_PATH = 4096

Sample = Mapping[str, bytes]


def sample_key(number: int, per_shard: int = SAMPLES_PER_SHARD) -> str:
    """Key of the sample with this number: `000010007` is the eighth of the second shard."""
    return f"{number // per_shard:05d}{number % per_shard:04d}"


def write_shards(samples: Iterable[Sample], out: Path, *, per_shard: int = SAMPLES_PER_SHARD) -> list[Path]:
    """Write samples (extension -> bytes) to `out`/00000.tar and so on; returns the shards.

    Same samples, same bytes. A shard has its final name only when it is whole. A member named `json`, `txt`,
    `png` and so on becomes KEY.json, KEY.txt, KEY.png with KEY from `sample_key`.
    """
    # Imported here, since it brings torch along, which processes that only find shards do without.
    from webdataset.writer import TarWriter

    if not 1 <= per_shard <= MAX_SHARD:
        raise UserError(f"samples per shard must be 1 to {MAX_SHARD}, got {per_shard}")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for shard, members in itertools.groupby(enumerate(samples), lambda numbered: numbered[0] // per_shard):
        written.append(out / f"{shard:05d}.tar")
        # The members are bytes already, so webdataset's encoders stay out of it.
        with (
            atomic_file(written[-1]) as unfinished,
            unfinished.open("wb") as stream,
            TarWriter(stream, encoder=False, mtime=0, compress=False) as writer,
        ):
            for number, sample in members:
                writer.write({"__key__": sample_key(number, per_shard), **sample})
    return written


def expand(specs: str | Sequence[str]) -> list[Path]:
    """Files that globs, brace ranges (`{00000..00012}.tar`) and plain paths name, in order, each once.

    Raises UserError that names what is missing and what stands beside it, and for an address.
    """
    found: list[Path] = []
    for place in expand_all(specs):
        if isinstance(place, str):
            raise UserError(f"{redacted(place)}: only files on this machine are read here; download it first")
        found.append(place)
    return found


def expand_all(specs: str | Sequence[str]) -> list[Path | str]:
    """As `expand`, with addresses among them as they are, one for each shard."""
    found: dict[Path | str, None] = {}
    for spec in [specs] if isinstance(specs, str) else specs:
        for place in _addresses(spec) if is_address(spec) else _expand_one(spec):
            found.setdefault(place)
    if not found:
        raise UserError("a source names no shards; set shards to a glob such as data/train/*.tar")
    return list(found)


def open_address(address: str) -> Any:
    """The bytes at an address: a stream, with its process as `proc` where a program fetches them.

    webdataset knows the scheme, or else fsspec. Raises UserError where neither does, or what they need is not
    installed; OSError.
    """
    # Imported here, since it brings torch along.
    from webdataset.gopen import gopen, gopen_schemes

    kind, named = scheme(address), redacted(address)
    try:
        if kind == "file" or kind in gopen_schemes:
            return gopen(address)
        import fsspec

        return fsspec.open(address, "rb").open()
    except (ImportError, FileNotFoundError) as error:
        missing = getattr(error, "filename", None) if kind in gopen_schemes else None
        if isinstance(error, FileNotFoundError) and not missing:
            raise
        needs = missing or getattr(error, "name", None) or f"a library for {kind}:"
        raise UserError(
            f"{named} needs {needs}, which is not installed; install it, or write a command: `pipe:COMMAND`"
        ) from None
    except ValueError:
        raise UserError(
            f"{kind}: ({named}) cannot be opened; write https:, gs:, hf:, file: or a command, `pipe:COMMAND`"
        ) from None
    except OSError:
        raise
    except Exception as error:
        # Libraries of object stores have errors of their own, whose words may hold the address.
        raise OSError(None, type(error).__name__) from None


def _addresses(spec: str) -> list[str]:
    if "*" in spec and scheme(spec) != "pipe":
        raise UserError(
            f"{redacted(spec)}: shards at an address cannot be listed; write {{00000..00012}}.tar"
        )
    return _brace_ranges(spec)


def _expand_one(spec: str) -> list[Path]:
    # What exists is what it is called, braces and brackets in its name included.
    known = spec = os.path.expanduser(spec)
    while known and not os.path.lexists(known):
        known = os.path.dirname(known)
    paths: list[Path] = []
    for rest in _brace_ranges(spec[len(known) :]):
        name = known + rest
        try:
            found = (
                sorted(glob.glob(glob.escape(known) + rest, recursive=True)) if len(name) < _MAX_PATH else []
            )
        except RecursionError:
            found = []
        matches = [Path(match) for match in found if os.path.isfile(match)]
        for other in (Path(match) for match in found if match.lower().endswith(SHARD_EXTENSIONS)):
            if not other.is_file():
                kind = (
                    "a folder" if other.is_dir() else "a link to nothing" if other.is_symlink() else "no file"
                )
                raise UserError(f"shard {shown(other)} is {kind}; mend it, or leave it out of `shards`")
        if not matches:
            raise UserError(f"no shard {shown(name)}; {_nearby(Path(name))}")
        paths += matches
    return paths


def _brace_ranges(spec: str) -> list[str]:
    named = shown(redacted(spec) if is_address(spec) else spec)
    if _least_names(spec) <= MAX_NAMES:
        try:
            names = list(itertools.islice(braceexpand(spec), MAX_NAMES + 1))
        except (ValueError, RecursionError):
            raise UserError(f"shards {named!r} has an unbalanced brace; write {{00000..00012}}.tar") from None
        if len(names) <= MAX_NAMES:
            return names
    raise UserError(
        f"shards {named!r} stands for more than {MAX_NAMES:,} names; split it into several sources"
    )


def _least_names(spec: str) -> int:
    """At least so many names are meant; braceexpand needs time and memory for all of them before it gives the first.

    Of braces in braces only the outer ones count.
    """
    product, choices, depth, begin = 1, 1, 0, 0
    for place, letter in enumerate(spec):
        if letter == "{":
            begin = begin if depth else place
            depth += 1
            choices = choices if depth > 1 else 1
        elif letter == "," and depth == 1:
            choices += 1
        elif letter == "}" and depth:
            depth -= 1
            if not depth:
                ends = _RANGE.fullmatch(spec, begin, place + 1)
                product *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else choices
                if product > MAX_NAMES:
                    break
    return product


def _nearby(path: Path) -> str:
    """What stands where the missing file was looked for."""
    folder = path.parent
    while not os.path.isdir(folder):
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not names:
        return f"{shown(folder)} is empty; `transfusion prepare` writes shards"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown(folder)} holds {', '.join(map(shown, names[:3]))}{more}"
