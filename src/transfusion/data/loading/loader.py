"""The training stream: each rank's micro-batches of global batches that depend on no rank number."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from transfusion.config import Config, SourceConfig
from transfusion.data.index.build import cache_of
from transfusion.data.index.source_index import build_indexes, refuse_too_many
from transfusion.data.loading.collate import collate
from transfusion.data.loading.prefetch import PlanFetcher
from transfusion.data.loading.rows import Row, RowBuilder, RowSettings
from transfusion.data.loading.workers import LocalWorkers, ProcessWorkers, RowWorkers
from transfusion.data.planning.epoch import VariantRule
from transfusion.data.planning.packing import Planner, PlanSettings, RowPlan, State
from transfusion.data.shards.sample import Fault, lost_by_reason
from transfusion.errors import UserError
from transfusion.schema import Batch, BatchCounts
from transfusion.sequence.tokenizer import Tokenizer

# Steps that workers prepare ahead.
_STEPS_AHEAD = 2


class Reading(NamedTuple):
    """How reading went.

    Attributes:
        faults: Samples that could not be read.
        samples: All that were tried.
    """

    faults: int
    samples: int


class Loader:
    """An endless stream of training batches. A `with` statement, or `close`, ends its workers and downloads.

    Global batches do not depend on the number of ranks or workers, and the stream goes on from any step. Rank r of W
    has rows r, r + W, r + 2 W and so on of each global batch.

    Args:
        config: The run, after `with_vocabulary` where images have several sizes.
        sources: What to read, such as `config.data.sources`.
        tokenizer: Makes token ids of the texts.
        rank: Number of this rank among those that read different rows, from 0.
        world_size: How many those are. It must divide `data.global_batch_size`.
        state: Goes on from there, as `state()` gave it. None starts at the beginning.

    Raises:
        UserError: For shards that are missing or too bad, rows that ranks cannot share, or a state of other data.
    """

    def __init__(
        self,
        config: Config,
        sources: Sequence[SourceConfig],
        tokenizer: Tokenizer,
        *,
        rank: int,
        world_size: int,
        state: State | None = None,
    ) -> None:
        if not sources:
            raise UserError("data.sources is empty; name at least one source with its shards")
        rows_per_rank(config.data.global_batch_size, world_size)
        self._config, self._rank, self._world_size = config, rank, world_size
        self.indexes = build_indexes(config, sources, tokenizer)
        refuse_too_many(self.indexes, config.data.max_bad_fraction)
        settings = plan_settings(config)
        self._planner = Planner([index.lengths for index in self.indexes], settings, state)
        self.fetching: PlanFetcher | None = None
        if any(index.is_remote for index in self.indexes):
            self.fetching = PlanFetcher(
                self._planner,
                self.indexes,
                settings.variants,
                cache_of(config),
                rank=rank,
                world_size=world_size,
            )
        self._settings = RowSettings.of(config)
        builder = RowBuilder(self.indexes, self._settings)
        workers = config.data.workers
        self._workers: RowWorkers = ProcessWorkers(builder, workers) if workers else LocalWorkers(builder)
        self._steps_ahead = _STEPS_AHEAD if workers else 0
        self._state = self._planner.state()
        self._plans: Sequence[RowPlan] = ()
        self._ordered: collections.deque[tuple[Sequence[RowPlan], State]] = collections.deque()
        # The same bad sample comes again every epoch.
        self._faults: dict[Fault, None] = {}
        # Of the last step. What it means is judged by all ranks together, not here.
        self.reading = Reading(0, 0)
        self._totals = BatchCounts(tokens=0, text_targets=0, images=0, image_elements=0, padding=0)

    def next_step(self) -> list[Batch]:
        """Take the next global batch. What cannot be read is left out, and counted in `reading`.

        Returns:
            This rank's micro-batches, on the CPU. Every rank has the same number of them.

        Raises:
            UserError: For worker processes that keep dying, or a disk that is full.
        """
        while len(self._ordered) <= self._steps_ahead:
            if self.fetching is not None:
                # A step is ordered once its shards are there; only the one that is asked for is waited for.
                if self._ordered and not self.fetching.is_ready():
                    break
                self.fetching.begin_batch()
            plans = self._planner.next_batch(self._rank, self._world_size)
            self._workers.order(plans)
            self._ordered.append((plans, self._planner.state()))
        rows = self._workers.collect()
        if self.fetching is not None:
            self.fetching.fetcher.end_batch()
        self._plans, self._state = self._ordered.popleft()
        found = [fault for row in rows for fault in row.faults]
        self._faults.update(dict.fromkeys(found))
        self.reading = Reading(len(found), sum(row.samples for row in rows))
        batches = [
            collate(part, self._settings) for part in micro_batches(rows, self._config.data.micro_batch_size)
        ]
        for batch in batches:
            self._totals += batch.counts
        return batches

    def state(self) -> State:
        """Where the stream stands after the last step taken, as a small JSON dict. It is the same on every rank."""
        return self._state

    def samples(self) -> list[str]:
        """The samples of this rank's last step, a line for each row, with the source and key of each."""
        indexes = self.indexes
        return [
            f"row {number}: "
            + ", ".join(
                f"{indexes[span.source].name} {indexes[span.source].key(span.sample)}" for span in plan
            )
            for number, plan in enumerate(self._plans)
        ]

    def counters(self) -> dict[str, Any]:
        """What this rank was given so far, by the names of `BatchCounts`.

        `faults` counts bad samples by reason, those of the index too.
        """
        counts: dict[str, Any] = dataclasses.asdict(self._totals)
        counts["faults"] = dict(lost_by_reason(self.faults()))
        return counts

    def faults(self) -> list[Fault]:
        """Every sample that was left out, each once. Those that the index left out come first."""
        return [fault for index in self.indexes for fault in index.faults] + list(self._faults)

    def close(self) -> None:
        """End the workers and downloads."""
        self._workers.close()
        if self.fetching is not None:
            self.fetching.fetcher.close()

    def complaint(self) -> str:
        """The last shard that could not be downloaded, and why. Empty where all could."""
        return self.fetching.fetcher.complaint if self.fetching is not None else ""

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def rows_per_rank(rows: int, world_size: int) -> int:
    """Rows of a global batch that each rank computes.

    Args:
        rows: Of the global batch.
        world_size: Ranks that share them.

    Raises:
        UserError: For rows that cannot be shared evenly.
    """
    if rows % world_size:
        below, above = rows // world_size * world_size, -(-rows // world_size) * world_size
        nearest = above if not below or above - rows <= rows - below else below
        raise UserError(
            f"data.global_batch_size {rows} cannot be shared by {world_size} ranks; the nearest that can is {nearest},"
            " and a run that has begun needs another number of ranks"
        )
    return rows // world_size


def micro_batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Cut rows into micro-batches of `size`. 0 takes all at once."""
    size = size or len(rows)
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def plan_settings(config: Config) -> PlanSettings:
    """What the planner is told of the configuration."""
    data = config.data
    rule = VariantRule(
        seed=config.run.seed, caption_first=data.caption_first, caption_dropout=data.caption_dropout
    )
    return PlanSettings(
        rows=data.global_batch_size,
        sequence_length=data.sequence_length,
        packing_buffer=data.packing_buffer,
        variants=rule,
    )
