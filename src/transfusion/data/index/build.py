"""Index files made and found: by training, which makes those that are missing, and by `transfusion data index`."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.config import CacheConfig, Config
from transfusion.config.sections import SourceKind, Verify
from transfusion.data.index.shard_index import (
    FormerIndex,
    IndexFingerprint,
    ShardIndex,
    StaleIndex,
    index_shard,
    is_former,
)
from transfusion.data.remote.cache import CacheSettings, RemoteShard
from transfusion.data.remote.download import DownloadFailed
from transfusion.data.shards.sample import Fault, lost_by_reason
from transfusion.data.shards.scan import LINES_TRUNCATED, is_shard, pick_shards
from transfusion.data.shards.shard import LocalShard, Shard
from transfusion.data.shards.tar import NO_END_MARKER, TRUNCATED, UNREADABLE
from transfusion.data.shards.webdataset import expand_all
from transfusion.errors import UserError, shown
from transfusion.files import atomic_file, atomic_write_text, digest, lock, remove_unfinished
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.urls import is_address, redacted

log = logging.getLogger(__name__)

_KINDS = ("texts", "pairs", "interleaved", "tokens")
COUNTERS, QUARANTINE = "counters.json", "quarantine.jsonl"
# Passed over and counted, but no damage: what archivers of other systems leave behind.
HARMLESS = "member_ignored"
# Of a shard whose end, or all of it, is missing.
_CUT = (UNREADABLE, TRUNCATED, NO_END_MARKER, LINES_TRUNCATED)
_SUFFIX = ".index"
# Of a tokenizer's fingerprint, in names of index files.
_TOKENIZER_DIGITS = 8
# Of a shard's name in those of its index files: bytes, and letters and bytes of a hash where it is longer.
_LONGEST_NAME, _SHOWN_LETTERS, _NAME_DIGEST_BYTES = 192, 32, 8
# Fewer bytes than these are read before a process has started.
_WORTH_PROCESSES = 1 << 26
# Fewer samples than this say nothing about a share of bad ones: a run never dies of the first.
_MIN_SAMPLES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexLocation:
    """Where index files are kept.

    folder: all of them; one that is stale there is refused. None: each beside its shard, or in `fallback` where that
    cannot be written or the shard is remote; what is stale there is made anew.
    """

    folder: Path | None = None
    fallback: Path | None = None

    @classmethod
    def of(cls, config: Config) -> IndexLocation:
        """Where a run keeps them."""
        folder = Path(config.data.index) if config.data.index else None
        return cls(folder=folder, fallback=Path(config.run.folder) / "index")

    def path(self, shard: Shard, verify: Verify = "none", tokenizer: str = "") -> Path:
        """The index file of this shard, read in this way. Raises UserError when there is no place for it.

        tokenizer: its fingerprint. Beside a shard runs with other tokenizers keep index files of their own.
        """
        suffix = _SUFFIX if verify == "none" else f".{verify}{_SUFFIX}"
        name = shard.name
        if len(os.fsencode(name)) > _LONGEST_NAME:
            # What is added must be a name too.
            name = f"{name[:_SHOWN_LETTERS]}.{digest(os.fsencode(name), _NAME_DIGEST_BYTES)}"
        if self.folder is None and shard.folder is not None:
            own = f".{tokenizer[:_TOKENIZER_DIGITS]}" if tokenizer else ""
            beside = shard.folder / f"{name}{own}{suffix}"
            if beside.exists() or os.access(shard.folder, os.W_OK):
                return beside
        folder = self.folder or self.fallback
        if folder is None:
            raise UserError(
                f"the index of {shard} cannot be written beside it; name a folder with data.index=DIR"
            )
        # Shards of several folders may have one name.
        return folder / f"{name}.{shard.identity}{suffix}"


class _Order(NamedTuple):
    """An index file to be made. encoder: None where texts are not tokenised."""

    shard: Shard
    path: Path
    encoder: Tokenizer | None
    verify: Verify
    kind: SourceKind = "auto"


def find_shards(specs: str | Sequence[str], cache: CacheSettings) -> list[Shard]:
    """What globs, brace ranges, paths and addresses name, in order; also what is no shard. Raises as `expand_all`."""
    places = expand_all(specs)
    return [RemoteShard(place, cache) if isinstance(place, str) else LocalShard(place) for place in places]


def open_indexes(
    shards: Sequence[Shard], tokenizer: Tokenizer, place: IndexLocation, verify: Verify = "none"
) -> list[ShardIndex]:
    """The index of each shard; what is missing is made first, by one process of all that ask at once.

    Raises UserError for a stale one in `place.folder`, with the command that renews it.
    """
    orders = [
        _Order(shard, place.path(shard, verify, tokenizer.fingerprint), tokenizer, verify) for shard in shards
    ]
    _compare(orders)
    missing = [order for order in orders if not _is_there(order, place)]
    _tell_of_former(order.path for order in missing)
    for folder in sorted({order.path.parent for order in missing}):
        with _locked(folder):
            here = [order for order in missing if order.path.parent == folder and not _is_there(order, place)]
            if here:
                log.info("indexing %d shards; their index files stay in %s", len(here), shown(folder))
            _make(here)
    return [ShardIndex(order.path, order.shard) for order in orders]


def _compare(orders: Sequence[_Order]) -> None:
    """Read the shards that may have changed since they were indexed, as copies; one process does it for all."""
    doubtful = [order for order in orders if _is_doubtful(order)]
    if doubtful:
        log.info(
            "comparing %d shards whose times are not those of their index, such as %s",
            len(doubtful),
            doubtful[0].shard,
        )
    for folder in sorted({order.path.parent for order in doubtful}):
        # What cannot be locked cannot be written either: then each process compares for itself.
        with contextlib.suppress(PermissionError), _locked(folder), ThreadPoolExecutor(cores()) as pool:
            list(pool.map(_try_to_compare, [order for order in doubtful if order.path.parent == folder]))


def _is_doubtful(order: _Order) -> bool:
    try:
        return ShardIndex(order.path, order.shard).is_doubtful
    except (FileNotFoundError, StaleIndex):
        return False


def _try_to_compare(order: _Order) -> None:
    # Opened anew: another process may have compared it meanwhile. What is stale is told later.
    with contextlib.suppress(FileNotFoundError, StaleIndex):
        ShardIndex(order.path, order.shard).compare()


def _is_there(order: _Order, place: IndexLocation) -> bool:
    """Whether the index file stands there and fits. Raises UserError for a stale one in `place.folder`."""
    try:
        ShardIndex(order.path, order.shard).check(IndexFingerprint.of(order.encoder))
    except (FileNotFoundError, FormerIndex):
        return False
    except StaleIndex as why:
        if place.folder is None:
            return False
        words = ["transfusion", "data", "index", order.shard.siblings, "--out", str(place.folder)]
        words += ["--tokenizer", str(order.encoder.path)] if order.encoder else []
        words += ["--verify", order.verify] if order.verify != "none" else []
        raise UserError(
            f"{shown(order.path)}, the index of {order.shard}, is stale: {why};"
            f" renew it with `{shown(shlex.join(words))}`"
        ) from None
    return True


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What an index run left. bad_shards: those with more faults than the limit. past_limit: so has the whole."""

    counters: dict[str, Any]
    bad_shards: list[str]
    past_limit: bool

    def describe(self) -> list[str]:
        """In a few lines."""
        count = self.counters
        kinds = ", ".join(f"{count[kind]:,} {kind}" for kind in _KINDS)
        faults = ", ".join(f"{reason}: {number:,}" for reason, number in count["faults"].items())
        lines = [f"{len(count['shards']):,} shards, {count['samples']:,} samples: {kinds}"]
        if faults:
            lines.append(f"left out: {faults}")
        if skipped := sum(count["files_skipped"].values()):
            lines.append(f"no shards: {skipped:,} files")
        return lines


class IndexJob(NamedTuple):
    """Shards, and the tokenizer for their texts; None: token lengths are left out, and training refuses the index.

    cache: for remote shards; None: a folder beside the index files. verify: see `scan`. kind: see `ShardIndex.stray_N`.
    """

    specs: Sequence[str]
    tokenizer: Path | None
    cache: CacheSettings | None = None
    verify: Verify = "none"
    kind: SourceKind = "auto"

    @classmethod
    def of(cls, config: Config) -> list[IndexJob]:
        """All sources of a configuration, validation ones too."""
        if not config.data.sources:
            raise UserError("data.sources is empty; name at least one source with its shards")
        tokenizer = Path(config.data.tokenizer)
        cache = cache_of(config)
        return [
            cls(
                [source.shards] if isinstance(source.shards, str) else source.shards,
                tokenizer,
                cache,
                source.verify,
                source.kind,
            )
            for source in (*config.data.sources, *config.data.validation)
        ]


def write_index(
    jobs: Sequence[IndexJob],
    out: Path,
    *,
    max_share: float,
    processes: int = 0,
    read: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> IndexReport:
    """Index all shards of the jobs into `out`, with counters.json and quarantine.jsonl; run again, it goes on.

    max_share: of bad samples. processes: 0: one a core, or only this one for little. read: compare all bytes of shards
    that were indexed before. progress: called with (bytes done, bytes to do).
    Raises UserError when a spec names nothing, or no shard.
    """
    place = IndexLocation(folder=out)
    orders: dict[Path, _Order] = {}
    skipped: collections.Counter[str] = collections.Counter()
    for job in jobs:
        found = find_shards(job.specs, job.cache or CacheSettings.of(CacheConfig(), out / "cache"))
        if not any(map(is_shard, found)):
            named = ", ".join(redacted(spec) if is_address(spec) else spec for spec in job.specs)
            raise UserError(f"{shown(named)}: none of {len(found)} files is a .tar or .jsonl shard")
        encoder = Tokenizer(job.tokenizer) if job.tokenizer else None
        for shard in pick_shards(found, "index"):
            path = place.path(shard, job.verify)
            orders[path] = _Order(shard, path, encoder, job.verify, job.kind)
        skipped.update(path.suffix or "none" for path in found if not is_shard(path))
    with _locked(out):
        with ThreadPoolExecutor(cores()) as pool:
            whole = list(pool.map(functools.partial(_is_whole, read=read), orders.values()))
        work = [order for order, good in zip(orders.values(), whole, strict=True) if not good]
        _tell_of_former(order.path for order in work)
        _make(work, processes=processes, progress=progress)
        indexes = [ShardIndex(order.path, order.shard) for order in orders.values()]
        kinds = [order.kind for order in orders.values()]
        left_out = faults_of(indexes, kinds)
        report = _report(indexes, kinds, left_out, max_share, dict(sorted(skipped.items())))
        faults = (json.dumps(asdict(fault)) + "\n" for part in left_out for fault in part)
        # In ASCII, since a name may hold bytes that are no UTF-8.
        with atomic_file(out / QUARANTINE) as unfinished, unfinished.open("w", encoding="ascii") as stream:
            stream.writelines(faults)
        atomic_write_text(out / COUNTERS, json.dumps(report.counters, indent=1) + "\n")
    return report


class IndexState(NamedTuple):
    """How index files fit their shards, whose bytes were all read. stale: of those that do not, with the reason."""

    shards: int
    missing: int
    stale: list[str]


def check_indexes(config: Config) -> IndexState:
    """Read all local shards of a configuration and compare them with the index files that a training would open.

    Raises UserError for shards or a tokenizer that are not there.
    """
    place, encoder = IndexLocation.of(config), Tokenizer(config.data.tokenizer)
    shards, missing, stale = 0, 0, list[str]()
    for job in IndexJob.of(config):
        found = find_shards(job.specs, job.cache or cache_of(config))
        for shard in pick_shards([shard for shard in found if not shard.is_remote], "index"):
            shards += 1
            try:
                index = ShardIndex(place.path(shard, job.verify, encoder.fingerprint), shard)
                index.check(IndexFingerprint.of(encoder))
                index.compare(always=True)
            except (FileNotFoundError, FormerIndex):
                missing += 1
            except StaleIndex as why:
                stale.append(f"{shown(shard)}: {why}")
    return IndexState(shards, missing, stale)


def _tell_of_former(paths: Iterable[Path]) -> None:
    """One line of notice where files of earlier versions are about to be made anew."""
    former = list(filter(is_former, paths))
    if former:
        log.warning(
            "index files of an earlier version are made again: %d, such as %s",
            len(former),
            shown(former[0]),
        )


def cache_of(config: Config) -> CacheSettings:
    """Where this run keeps copies of remote shards."""
    return CacheSettings.of(config.data.cache, Path(config.run.folder) / "cache")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def faults_of(parts: Sequence[ShardIndex], kinds: Sequence[SourceKind]) -> list[list[Fault]]:
    """What was left out of each shard, which is to hold samples of this kind.

    One that cannot be read, or was cut short, costs what others held more.
    """
    found = [list(part.faults()) for part in parts]
    is_cut = [any(fault.reason in _CUT for fault in faults) for faults in found]
    held = [
        len(part) + sum(fault.lost for fault in faults if fault.reason != HARMLESS)
        for part, faults in zip(parts, found, strict=True)
    ]
    whole = [count for count, cut in zip(held, is_cut, strict=True) if not cut]
    usual = round(fmean(whole)) if whole else 0
    for faults, count, cut in zip(found, held, is_cut, strict=True):
        if cut and usual > count:
            place = next(n for n, fault in enumerate(faults) if fault.reason in _CUT)
            faults[place] = replace(faults[place], lost=faults[place].lost + usual - count)
    return [
        [*faults, *part.stray_faults(kind)] for part, faults, kind in zip(parts, found, kinds, strict=True)
    ]


def too_many_faults(faults: int, samples: int, max_share: float) -> bool:
    """Whether more than this share of the samples (good and bad) is bad."""
    # Divided, a share in decimals is what it says: 0.29 times 100 is less than 29.
    return faults / max(samples, _MIN_SAMPLES) > max_share


def _is_whole(order: _Order, *, read: bool) -> bool:
    """read: compare all bytes of the shard, though its state says that it has not changed."""
    try:
        index = ShardIndex(order.path, order.shard)
        index.check(IndexFingerprint.of(order.encoder))
        index.compare(always=read)
        index.verify()
    except (FileNotFoundError, StaleIndex):
        return False
    return True


def _make(
    work: Sequence[_Order],
    *,
    processes: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make these index files, the greatest shards first, so that no process is left with one at the end."""
    sizes = {order.path: order.shard.nominal_bytes() for order in work}
    work = sorted(work, key=lambda order: -sizes[order.path])
    total, done = sum(sizes.values()), 0

    def report(order: _Order) -> None:
        nonlocal done
        done += sizes[order.path]
        if progress is not None:
            progress(done, total)

    for folder in {order.path.parent for order in work}:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder, {order.path.name for order in work})
    processes = min(processes or (cores() if total > _WORTH_PROCESSES else 1), len(work))
    if processes < 2:
        for order in work:
            _index(order)
            report(order)
        return
    with _pool(processes) as pool:
        # A worker opens the tokenizer itself.
        waiting = {
            pool.submit(
                _index_in_worker, order._replace(encoder=None), order.encoder.path if order.encoder else None
            ): order
            for order in work
        }
        try:
            for future in as_completed(waiting):
                future.result()
                report(waiting[future])
        except BrokenProcessPool:
            raise UserError(
                "an index process was killed (out of memory?); the same command continues where it stopped"
            ) from None


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    # Never fork: this process may hold a CUDA context and running threads.
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """An interrupt is the parent's to handle; its death ends its workers, which would wait for orders for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _index_in_worker(order: _Order, tokenizer: Path | None) -> None:
    _index(order._replace(encoder=_loaded(tokenizer) if tokenizer else None))


def _index(order: _Order) -> None:
    try:
        index_shard(order.shard, order.path, order.encoder, order.verify)
    except DownloadFailed as error:
        raise UserError(
            f"{order.shard} cannot be indexed: {error.strerror}; check the address and the network, or leave it out"
        ) from None


@functools.cache
def _loaded(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _report(
    indexes: Sequence[ShardIndex],
    kinds: Sequence[SourceKind],
    found: Sequence[list[Fault]],
    max_share: float,
    skipped: dict[str, int],
) -> IndexReport:
    """kinds: of samples that each shard is to hold. found: faults of each."""
    names = collections.Counter(index.shard.name for index in indexes)
    reasons, notes, totals = (collections.Counter[str]() for _ in range(3))
    shards: dict[str, Any] = {}
    bad: list[str] = []
    samples = damaged = 0
    for index, kind, faults in zip(indexes, kinds, found, strict=True):
        here = lost_by_reason(faults)
        good_N = ~index.stray_N(kind)
        good = int(good_N.sum())
        harm = here.total() - here[HARMLESS]
        name = index.shard.name if names[index.shard.name] == 1 else str(index.shard)
        shards[name] = {
            "samples": good,
            "faults": dict(sorted(here.items())),
            # Those that say something of the whole shard, though a sample may be named with them.
            "problems": sorted(
                {
                    fault.reason
                    for fault in faults
                    if not fault.key or fault.reason.startswith(("tar_", "lines_"))
                }
            ),
        }
        if harm and harm / (good + harm) > max_share:
            bad.append(name)
        reasons.update(here)
        notes.update(index.notes)
        totals.update(_kinds(index, good_N))
        samples += good
        damaged += harm
    past_limit = too_many_faults(damaged, samples + damaged, max_share)
    counters = {
        "samples": samples,
        **{kind: totals[kind] for kind in _KINDS},
        "faults": dict(sorted(reasons.items())),
        "notes": dict(sorted(notes.items())),
        "files_skipped": skipped,
        "max_bad_fraction": max_share,
        "past_limit": past_limit,
        "bad_shards": bad,
        "shards": shards,
    }
    return IndexReport(counters, bad, past_limit)


def _kinds(index: ShardIndex, good_N: NDArray[np.bool_]) -> dict[str, int]:
    interleaved_N, image_N = index["elements_N"] > 0, index["stored_images_N"] > 0
    return {
        "interleaved": int((interleaved_N & good_N).sum()),
        "pairs": int((image_N & ~interleaved_N & good_N).sum()),
        "texts": int((~image_N & ~interleaved_N & good_N).sum()),
        "tokens": int(index["tokens_C"][np.repeat(good_N, index["captions_N"])].sum()),
    }


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time makes index files of a folder; the others wait and then find them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{_SUFFIX}.lock").open("w") as stream:
        lock(stream)
        yield
