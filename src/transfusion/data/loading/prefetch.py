"""Remote shards brought into the cache before their rows are built, in the order in which the plan needs them.

The plan is known: first the batches of the planned block, exactly, then the windows that each source draws from
next. As many shards as the bound allows are held in the cache and fetched by threads, nearest need first; what a
batch in hand or the next one needs is fetched in any case.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from transfusion.data.index.shard_index import ShardIndex
from transfusion.data.index.source_index import SourceIndex
from transfusion.data.planning.epoch import EpochOrder, Variant, VariantRule
from transfusion.data.planning.packing import Planner, RowPlan
from transfusion.data.remote.cache import (
    FORGIVEN_SECONDS,
    CacheSettings,
    shard_cache,
)
from transfusion.data.remote.download import DownloadFailed, Stopped

log = logging.getLogger(__name__)

# Looked at again after so long where there was no room: other processes may have let go of theirs.
_RETRY_SECONDS = 0.5

# A remote shard: number of the source, number of the shard in it.
ShardRef = tuple[int, int]
ShardRefs = tuple[ShardRef, ...]


def shards_of(plans: Iterable[RowPlan], indexes: Sequence[SourceIndex]) -> ShardRefs:
    """The remote shards that these rows read images from; texts stand in the index."""
    found: dict[ShardRef, None] = {}
    for number, index in enumerate(indexes):
        if index.lengths.windows is not None:
            samples = {
                span.sample
                for plan in plans
                for span in plan
                if span.source == number and span.variant != Variant.TEXT
            }
            shards = np.unique(index.lengths.windows.shard_of(np.array(sorted(samples), np.int64)))
            found.update(
                ((number, shard), None) for shard in shards.tolist() if index.shards[shard].is_remote
            )
    return tuple(found)


class Fetcher:
    """Threads that fetch; the caller says what is needed, in order, and when it is done with it."""

    def __init__(self, indexes: Sequence[SourceIndex], settings: CacheSettings) -> None:
        self.waited_seconds = 0.0
        # The last shard that was given up, and why.
        self.complaint = ""
        self._indexes, self._settings = tuple(indexes), settings
        self.cache = shard_cache(settings)
        self.cache.clear_failures()
        # Shards of the batches in hand, then of those that are coming, then what comes after them.
        self._in_hand: collections.deque[ShardRefs] = collections.deque()
        self._coming: collections.deque[ShardRefs] = collections.deque()
        self._after: list[ShardRef] = []
        self._horizon: dict[ShardRef, bool] = {}
        self._here: set[ShardRef] = set()
        self._busy: set[ShardRef] = set()
        self._given_up: dict[ShardRef, float] = {}
        self._warned = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(settings.connections)
        ]
        for thread in self._threads:
            thread.start()

    def expect(self, coming: Iterable[ShardRefs], after: Iterable[ShardRef] = ()) -> None:
        """What the next batches need, in place of what was expected before. after: what follows them, in order."""
        with self._changed:
            self._coming = collections.deque(coming)
            self._after = list(self._reachable(after))
        self._warn_of_small_cache()
        self._look_ahead()

    @property
    def expects(self) -> int:
        """Batches whose needs are known and which have not begun."""
        return len(self._coming)

    def is_ready(self) -> bool:
        """Whether all that the next batch needs is there, or given up. Raises UserError for a full disk and such."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return all(
                shard_ref in self._here or shard_ref in self._given_up for shard_ref in self._coming[0]
            )

    def begin_batch(self) -> None:
        """Wait until the next batch may be built. Raises as `is_ready`."""
        begin = time.monotonic()
        with self._changed:
            while not self.is_ready():
                self._changed.wait()
            self._in_hand.append(self._coming.popleft())
        self.waited_seconds += time.monotonic() - begin

    def end_batch(self) -> None:
        """The oldest batch in hand is built."""
        with self._changed:
            self._in_hand.popleft()
        self._look_ahead()

    def close(self) -> None:
        """End the threads; nothing is held any more."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self.cache.pin(self, ())

    def _reachable(self, after: Iterable[ShardRef]) -> Iterator[ShardRef]:
        """As many of them as the cache could ever hold."""
        size = 0
        for shard_ref in dict.fromkeys(after):
            size += self._size(shard_ref)
            if size > self._settings.max_bytes:
                return
            yield shard_ref

    def _warn_of_small_cache(self) -> None:
        """Once, where the batches that are dealt together read more than the cache holds."""
        size = sum(map(self._size, set(itertools.chain(*self._coming))))
        if size > self._settings.max_bytes and not self._warned:
            self._warned = True
            log.warning(
                "the next %d batches read %.3g GB of remote shards, more than data.cache.gigabytes (%.3g) holds: "
                "shards will be downloaded again and again; raise it, or lower data.sources.N.shuffle_window",
                len(self._coming),
                size / 1e9,
                self._settings.max_bytes / 1e9,
            )

    def _look_ahead(self) -> None:
        """Hold what the next batches need, as far as the bound allows; let go of the rest."""
        with self._changed:
            # Above the bound goes what one batch needs at once, and no more.
            at_once = self._in_hand or itertools.islice(self._coming, 1)
            horizon = dict.fromkeys(itertools.chain.from_iterable(at_once), True)
            size = sum(map(self._size, horizon))
            for shard_ref in itertools.chain(*self._coming, self._after):
                if shard_ref not in horizon:
                    size += self._size(shard_ref)
                    if size > self._settings.max_bytes:
                        break
                    horizon[shard_ref] = False
            same = horizon.keys() == self._horizon.keys()
            let_go = self._horizon.keys() - horizon.keys()
            self._horizon = horizon
            self._here &= horizon.keys()
            for shard_ref in [shard_ref for shard_ref in self._given_up if shard_ref not in horizon]:
                del self._given_up[shard_ref]
        if not same:
            self.cache.pin(self, [self._part(shard_ref).copy_name for shard_ref in horizon])
            if let_go:
                self.cache.trim()
        with self._changed:
            self._changed.notify_all()

    def _part(self, shard_ref: ShardRef) -> ShardIndex:
        source, shard = shard_ref
        return self._indexes[source].part(shard)

    def _size(self, shard_ref: ShardRef) -> int:
        return self._part(shard_ref).shard_bytes

    def _next(self) -> tuple[ShardRef, bool] | None:
        """What to fetch now, and whether it must come even above the bound."""
        for shard_ref, must in self._horizon.items():
            if shard_ref in self._here or shard_ref in self._busy:
                continue
            given_up = self._given_up.get(shard_ref)
            if given_up is None or time.monotonic() - given_up > FORGIVEN_SECONDS:
                return shard_ref, must
        return None

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._changed:
                found = self._next()
                if found is None:
                    self._changed.wait(_RETRY_SECONDS)
                    continue
                shard_ref, must = found
                self._busy.add(shard_ref)
            had_room = self._fetch(shard_ref, must)
            with self._changed:
                self._busy.discard(shard_ref)
                self._changed.notify_all()
                if not had_room:
                    self._changed.wait(_RETRY_SECONDS)

    def _fetch(self, shard_ref: ShardRef, must: bool) -> bool:
        """Fetch one shard or give it up; False: there was no room."""
        try:
            had_room = self._part(shard_ref).fetch(must=must, stop=self._stop)
            with self._changed:
                self._given_up.pop(shard_ref, None)
                if had_room and shard_ref in self._horizon:
                    self._here.add(shard_ref)
            return had_room
        except Stopped:
            return True
        except DownloadFailed as error:
            with self._changed:
                self._given_up[shard_ref] = time.monotonic()
                self.complaint = f"{self._part(shard_ref).shard}: {error.strerror}"
        # Whatever it is, the thread that waits for the shard must hear of it.
        except Exception as error:
            with self._changed:
                self._error = error
            self._stop.set()
        return True


class PlanFetcher:
    """A `Fetcher` that reads the needs of one rank from its planner."""

    def __init__(
        self,
        planner: Planner,
        indexes: Sequence[SourceIndex],
        rule: VariantRule,
        settings: CacheSettings,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self.fetcher = Fetcher(indexes, settings)
        self._planner, self._indexes, self._rank, self._world_size = planner, indexes, rank, world_size
        self._schedules = [
            _SourceSchedule(number, index, EpochOrder(index.lengths, rule))
            for number, index in enumerate(indexes)
            if index.lengths.windows is not None
        ]

    def is_ready(self) -> bool:
        """See `Fetcher.is_ready`; called before the planner gives the batch."""
        self._read_block()
        return self.fetcher.is_ready()

    def begin_batch(self) -> None:
        """See `Fetcher.begin_batch`; called before the planner gives the batch."""
        self._read_block()
        self.fetcher.begin_batch()

    def _read_block(self) -> None:
        if not self.fetcher.expects:
            batches = self._planner.rest_of_block(self._rank, self._world_size)
            coming = [shards_of(plans, self._indexes) for plans in batches]
            self.fetcher.expect(coming, self._after(set(itertools.chain(*coming))))

    def _after(self, block: set[ShardRef]) -> Iterator[ShardRef]:
        """Shards behind the planned block, those needed soonest first: of rows that are begun, then of windows."""
        begun = shards_of(self._planner.rows_after_block(), self._indexes)
        # A row that nothing fits may stay open for very long: what only such rows need is not kept for them.
        yield from (shard_ref for shard_ref in begun if shard_ref in block)
        draws = self._planner.draws_after_block()
        schedules = [
            schedule.ahead(draws[schedule.name]) for schedule in self._schedules if schedule.name in draws
        ]
        yield from (shard_ref for _, shard_ref in heapq.merge(*schedules))


class _SourceSchedule:
    """The remote shards of one source, in the order in which it will need them."""

    def __init__(self, number: int, index: SourceIndex, order: EpochOrder) -> None:
        self.name, source = index.name, index.lengths
        self._number, self._epoch_order = number, order
        assert source.windows is not None
        self._windows = source.windows
        shown_K = np.bincount(source.windows.shard_of(np.flatnonzero(source.images_N)))
        self._shards = {shard for shard in np.flatnonzero(shown_K).tolist() if index.shards[shard].is_remote}
        tokens = source.text_tokens_C.mean() + source.image_tokens(np.arange(len(source))).mean()
        # About how far the whole stream goes on while this source gives one document.
        self._stride = float(tokens) / max(share for _, share in source.schedule)

    def ahead(self, draw: int) -> Iterator[tuple[float, ShardRef]]:
        """(about how much later, shard), for an epoch and the window that is under way."""
        count = len(self._windows.counts_K) + self._windows.shards
        some = itertools.islice(self._epoch_order.shards_ahead(draw), count)
        for first, shard in some if self._shards else ():
            if shard in self._shards:
                yield (first - draw) * self._stride, (self._number, shard)
