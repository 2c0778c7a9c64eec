"""Which span of which document stands in which row of which batch: a pure function of (seed, state).

Nothing is read and nothing decoded here. Documents of all sources form one stream (`mixture`), which is packed in
its order into a few open rows; a block of rows is then dealt to its batches so that each batch has about the same
share of text.
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from transfusion.data.planning.epoch import (
    Integers,
    Lengths,
    PlanSettings,
    SpanTable,
    Variant,
    next_change,
    share_at,
)
from transfusion.data.planning.mixture import Mixture
from transfusion.errors import UserError
from transfusion.files import fingerprint

# Stands in the fingerprint: a plan made by other rules is another plan.
_FORMAT = 2


class DocumentSpan(NamedTuple):
    """`tokens` tokens from `first` of a document: sample of a source (by number) in an epoch, so laid out and with
    this one of its captions."""

    source: int
    epoch: int
    sample: int
    first: int
    tokens: int
    variant: int
    caption: int = 0


RowPlan = tuple[DocumentSpan, ...]
State = dict[str, Any]


class Planner:
    """An endless stream of global batches of row plans, that can be left and taken up at any batch.

    The state is a small JSON dict and knows neither ranks nor workers.
    """

    def __init__(
        self, sources: Sequence[Lengths], settings: PlanSettings, state: State | None = None
    ) -> None:
        """Raises UserError when the state belongs to other data or other settings."""
        self._sources, self._settings = tuple(sources), settings
        self._fingerprint = _fingerprint(self._sources, settings)
        if state and state.get("fingerprint") != self._fingerprint:
            raise UserError(
                "the data differ from those this run was started with (shards, tokenizer, seed, source weights,"
                " batch or sequence size, diffusion.context), or another version planned it; restore them, or start a"
                " new run in another run.dir"
            )
        self._start: State = state["start"] if state else fresh(self._sources)
        self._used: int = state["used"] if state else 0
        self._block: PlanBlock | None = None

    def next_batch(self, rank: int = 0, world_size: int = 1) -> tuple[RowPlan, ...]:
        """Rows of the next global batch: all, or those of one rank (rows rank, rank + world_size, ...)."""
        block = self._planned()
        batch = block.rows(self._numbers(self._used, rank, world_size))
        self._used += 1
        if self._used == block.batches:
            self._start, self._used, self._block = block.following, 0, None
        return batch

    def rest_of_block(self, rank: int = 0, world_size: int = 1) -> list[tuple[RowPlan, ...]]:
        """What `next_batch` will give until the planned block ends; at least one batch."""
        block = self._planned()
        return [
            block.rows(self._numbers(batch, rank, world_size)) for batch in range(self._used, block.batches)
        ]

    def rows_after_block(self) -> tuple[RowPlan, ...]:
        """Rows of later blocks as far as they are filled already, whichever rank will have them."""
        block = self._planned()
        return tuple(_row_plan(block.spans, row) for row in block.waiting)

    def draws_after_block(self) -> dict[str, int]:
        """Of each source that gives tokens then: its next draw behind the planned block."""
        following = self._planned().following
        return {
            source.name: following["sources"][source.name][0]
            for source in self._sources
            if share_at(source.schedule, following["batch"])
        }

    def _planned(self) -> PlanBlock:
        if self._block is None:
            self._block = plan_block(self._sources, self._settings, self._start)
        return self._block

    def _numbers(self, batch: int, rank: int, world_size: int) -> range:
        """Rows of the block that a rank has in its batch with this number."""
        first = batch * self._settings.rows
        return range(first + rank, first + self._settings.rows, world_size)

    def state(self) -> State:
        """Where the stream stands after the last batch given. It is not changed later: keep it as it is."""
        return {"fingerprint": self._fingerprint, "start": self._start, "used": self._used}


def fresh(sources: Sequence[Lengths]) -> State:
    """The start of a block in which nothing has been drawn yet.

    batch: number of its first batch. sources: where each stands (`mixture.Cursor`). open, ready: rows that wait for
    more and rows that wait for their block, as `_written` puts them.
    """
    return {"batch": 0, "sources": {source.name: [0, 0, 0] for source in sources}, "open": [], "ready": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBlock:
    """Rows of some batches in batch order; made into plans when asked for, since a rank needs only its own.

    spans: P of them, in columns. members: for each row the numbers of its spans. waiting: the same of rows that are
    begun and will be given later. following: the next block's start.
    """

    batches: int
    spans: SpanTable
    members: tuple[list[int], ...]
    waiting: tuple[list[int], ...]
    following: State

    def rows(self, numbers: Sequence[int]) -> tuple[RowPlan, ...]:
        """The plans of these rows."""
        return tuple(_row_plan(self.spans, self.members[number]) for number in numbers)


def plan_block(sources: Sequence[Lengths], settings: PlanSettings, start: State) -> PlanBlock:
    """The block that begins at `start`; it ends early where a share changes."""
    change = next_change([source.schedule for source in sources], start["batch"])
    batches = settings.batches_per_block
    if change is not None:
        batches = min(batches, change - start["batch"])
    wanted = batches * settings.rows
    mixture = Mixture(sources, settings, start["sources"], step=start["batch"])
    packer = _Packer(settings)
    packer.resume(_read(start, mixture), len(start["open"]))
    while len(packer.done) < wanted:
        rows = wanted - len(packer.done)
        spans = mixture.ahead(rows * settings.sequence_length)
        mixture.take(spans, packer.place(spans, wanted))
    spans = packer.spans()
    following = {
        "batch": start["batch"] + batches,
        "sources": mixture.cursors(),
        "open": _written(spans, packer.rows, mixture),
        "ready": _written(spans, packer.done[wanted:], mixture),
    }
    done = packer.done[:wanted]
    text = [sum(spans.tokens[row][spans.variant[row] == Variant.TEXT].tolist()) for row in done]
    order = balanced_order(np.array(text), settings.rows, start["batch"])
    members = tuple(done[row] for row in order.tolist())
    waiting = (*packer.done[wanted:], *packer.rows)
    return PlanBlock(batches=batches, spans=spans, members=members, waiting=waiting, following=following)


class _Packer:
    """Open rows, and the rows that are done. Pairs go in whole; texts are cut only to fill a gap.

    Rows are lists of numbers of spans. The open ones are kept by the room they have left, fullest first.
    """

    def __init__(self, settings: PlanSettings) -> None:
        self._settings = settings
        self.rows: list[list[int]] = []
        self.done: list[list[int]] = []
        self._free: list[int] = []
        # What was handed in, and of the spans put into rows: which of that, from where, how many tokens.
        self._given: list[SpanTable] = []
        self._number: list[int] = []
        self._first: list[int] = []
        self._tokens: list[int] = []

    def resume(self, rows: Sequence[SpanTable], still_open: int) -> None:
        """Take up rows as they were left, the first of them still open."""
        for row in rows:
            members = list(range(len(self._number), len(self._number) + len(row.tokens)))
            self._given.append(row)
            self._number += members
            self._first += row.first.tolist()
            self._tokens += row.tokens.tolist()
            if len(self.rows) < still_open:
                self.rows.append(members)
                self._free.append(self._settings.sequence_length - int(row.tokens.sum()))
            else:
                self.done.append(members)

    def place(self, spans: SpanTable, wanted: int) -> int:
        """Put spans into rows until `wanted` rows are done or all are placed; returns how many were.

        Best fit, else a new row, else the widest gap for a part of a text; else the fullest row is done.
        """
        settings, free, rows, done = self._settings, self._free, self.rows, self.done
        length, closing_gap = settings.sequence_length, settings.closing_gap
        given = sum(len(columns.tokens) for columns in self._given)
        cuttable = (spans.variant == Variant.TEXT).tolist()
        columns = zip(spans.tokens.tolist(), spans.first.tolist(), cuttable, strict=True)
        placed = 0
        for rest, first, is_text in columns:
            if len(done) >= wanted:
                break
            while rest:
                part, place = rest, bisect_left(free, rest)
                if place == len(free):
                    if place < settings.packing_buffer:
                        free.append(length)
                        rows.append([])
                    else:
                        part = self._gap(free[-1], rest) if is_text else 0
                        if not part:
                            free.pop(0)
                            done.append(rows.pop(0))
                            continue
                        place -= 1
                row, left = rows.pop(place), free.pop(place) - part
                row.append(len(self._number))
                self._number.append(given + placed)
                self._first.append(first)
                self._tokens.append(part)
                if left < closing_gap:
                    done.append(row)
                else:
                    place = bisect_left(free, left)
                    free.insert(place, left)
                    rows.insert(place, row)
                first += part
                rest -= part
            placed += 1
        self._given.append(spans)
        return placed

    def spans(self) -> SpanTable:
        """The spans that the rows name."""
        chosen = SpanTable.concatenate(self._given).at(np.array(self._number, dtype=np.int64))
        return chosen._replace(
            first=np.array(self._first, dtype=np.int64), tokens=np.array(self._tokens, dtype=np.int64)
        )

    def _gap(self, gap: int, rest: int) -> int:
        """Tokens of a text to put into a gap that is too small for it; 0 if the cut would be too short."""
        shortest = self._settings.min_span
        part = gap if rest - gap >= shortest else rest - shortest
        return part if part >= shortest else 0


def balanced_order(text: Integers, per_batch: int, turn: int) -> Integers:
    """Numbers of the rows in batch order; every batch, and every strided part of it, has about the same text.

    text: tokens of text of each row. Rows are dealt in layers of like text content, the richest of a layer to the
    batch that is poorest so far; `turn` says who is served first among equals.
    """
    batches = len(text) // per_batch
    by_text = np.argsort(text, kind="stable").reshape(per_batch, batches)
    rows_of_batch = np.empty((batches, per_batch), dtype=np.int64)
    sums = np.zeros(batches, dtype=np.int64)
    among_equals = (np.arange(batches) + turn) % batches
    for layer, layer_rows in enumerate(by_text):
        takers = np.lexsort((among_equals, sums))
        rows_of_batch[takers, layer] = layer_rows[::-1]
        sums[takers] += text[layer_rows[::-1]]
    # Folded: up the even rows and down the odd ones, so that rank r of W (rows r, r + W, ...) has its share.
    return np.concatenate([rows_of_batch[:, ::2], rows_of_batch[:, 1::2][:, ::-1]], axis=1).ravel()


def plan_once(
    sources: Sequence[Lengths], settings: PlanSettings, *, epoch: int = 0, limit: int = 0
) -> Iterator[RowPlan]:
    """Rows that hold every document of every source exactly once, source after source: for evaluation.

    limit: of so many documents, drawn from all sources alike. 0: all.
    """
    packer = _Packer(settings)
    total = sum(map(len, sources))
    for number, source in enumerate(sources):
        mixture = Mixture([source], settings, {source.name: [epoch * len(source), 0, 0]}, step=0)
        drawn = max(1, limit * len(source) // total) if 0 < limit < total else len(source)
        spans = mixture.documents(drawn)
        packer.place(spans._replace(source=np.full_like(spans.source, number)), 1 << 62)
    spans = packer.spans()
    for row in [*packer.done, *packer.rows]:
        yield _row_plan(spans, row)


def _row_plan(spans: SpanTable, row: Sequence[int]) -> RowPlan:
    columns = (getattr(spans, name)[row].tolist() for name in DocumentSpan._fields)
    return tuple(map(DocumentSpan._make, zip(*columns, strict=True)))


def _written(spans: SpanTable, rows: Sequence[list[int]], mixture: Mixture) -> list[list[Any]]:
    """Rows as the state holds them.

    A document is one integer: how many draws it lies behind its source's next one, times the number of sources, plus
    the source's number. A part of a text is [that integer, its first token, its tokens].
    """
    behind = np.array(mixture.next_draws())[spans.source] - spans.draw
    code = (behind * len(mixture.next_draws()) + spans.source).tolist()
    is_part = ((spans.first > 0) | (spans.tokens < spans.whole)).tolist()
    return [
        [
            [code[span], int(spans.first[span]), int(spans.tokens[span])] if is_part[span] else code[span]
            for span in row
        ]
        for row in rows
    ]


def _read(start: State, mixture: Mixture) -> list[SpanTable]:
    """The rows of a state, the open ones first."""
    rows = [*start["open"], *start["ready"]]
    parts = [part if isinstance(part, list) else [part, 0, 0] for row in rows for part in row]
    code, first, tokens = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    next_draws = np.array(mixture.next_draws())
    behind, source = np.divmod(code, len(next_draws))
    found = np.empty((len(SpanTable._fields), len(code)), dtype=np.int64)
    for number, next_draw in enumerate(next_draws):
        here = np.flatnonzero(source == number)
        found[:, here] = np.stack(mixture.whole_documents(number, next_draw - behind[here]))
    spans = SpanTable(*found)
    spans = spans._replace(first=first, tokens=np.where(tokens > 0, tokens, spans.whole))
    ends = itertools.accumulate(map(len, rows))
    return [spans.at(slice(end - len(row), end)) for row, end in zip(rows, ends, strict=True)]


def _fingerprint(sources: Sequence[Lengths], settings: PlanSettings) -> str:
    known = [[source.name, source.schedule, source.digest()] for source in sources]
    return fingerprint([_FORMAT, known, dataclasses.asdict(settings)])
