"""Which piece of which document stands in which row of which batch: a pure function of (seed, state).

Nothing is read and nothing decoded here. Rows are packed in stream order into a few open rows, and a block of
rows is then dealt to its batches so that each batch has about the same share of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transfusion.data.deck import Deck, Drawn, SourceLengths, Variant, VariantRule
from transfusion.errors import UserError
from transfusion.presets import fingerprint

# Rows of a block, rounded to whole batches: enough that a document of many rows is spread over many batches.
_ROWS_PER_BLOCK = 512


class Piece(NamedTuple):
    """`tokens` tokens from `first` of a document: sample of a source (by number) in an epoch, so laid out."""

    source: int
    epoch: int
    sample: int
    first: int
    tokens: int
    variant: int


RowPlan = tuple[Piece, ...]
State = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """rows: of a global batch. open_rows: rows that wait for fitting documents at once."""

    rows: int
    row_length: int
    open_rows: int
    variants: VariantRule

    @property
    def shortest_piece(self) -> int:
        """A text is not cut into pieces shorter than this."""
        return max(1, min(32, self.row_length // 8))

    @property
    def closing_gap(self) -> int:
        """A row with fewer free tokens is done."""
        return max(1, min(32, self.row_length // 64))

    @property
    def batches_per_block(self) -> int:
        return max(2, _ROWS_PER_BLOCK // self.rows)


class Planner:
    """An endless stream of global batches of row plans, that can be left and taken up at any batch.

    The state is a small JSON dict and knows neither ranks nor workers.
    """

    def __init__(
        self, sources: Sequence[SourceLengths], settings: PlanSettings, state: State | None = None
    ) -> None:
        """Raises UserError when the state belongs to other data or other settings."""
        self._sources, self._settings = tuple(sources), settings
        self._fingerprint = _fingerprint(self._sources, settings)
        if state and state.get("fingerprint") != self._fingerprint:
            raise UserError(
                "the data differ from those this run was started with (shards, tokenizer, seed, shares or"
                " rows); restore them, or start anew in another run.dir"
            )
        self._start: State = state["start"] if state else fresh(self._sources)
        self._used: int = state["used"] if state else 0
        self._block: tuple[list[RowPlan], State] | None = None

    def next_batch(self) -> tuple[RowPlan, ...]:
        """Rows of the next global batch."""
        if self._block is None:
            self._block = plan_block(self._sources, self._settings, self._start)
        rows, following = self._block
        first = self._used * self._settings.rows
        batch = tuple(rows[first : first + self._settings.rows])
        self._used += 1
        if self._used == self._settings.batches_per_block:
            self._start, self._used, self._block = following, 0, None
        return batch

    def state(self) -> State:
        """Where the stream stands after the last batch given. It is not changed later: keep it as it is."""
        return {"fingerprint": self._fingerprint, "start": self._start, "used": self._used}


def fresh(sources: Sequence[SourceLengths]) -> State:
    """The start of a block in which nothing has been drawn yet."""
    return {
        "block": 0,
        # Per source: epoch, position in its permutation, tokens already taken of the document in hand.
        "cursors": {source.name: [0, 0, 0] for source in sources},
        "emitted": {source.name: 0 for source in sources},
        "open": [],
        "ready": [],
    }


def plan_block(
    sources: Sequence[SourceLengths], settings: PlanSettings, start: State
) -> tuple[list[RowPlan], State]:
    """Rows of the block that begins at `start`, in batch order, and where the next block begins."""
    wanted = settings.rows * settings.batches_per_block
    packer = _Packer(settings, start)
    drawn = _Draw(sources, settings, start)
    while len(packer.done) < wanted:
        packer.place(drawn.next_piece())
    following = {
        "block": start["block"] + 1,
        "cursors": drawn.cursors,
        "emitted": drawn.emitted,
        "open": packer.rows,
        "ready": packer.done[wanted:],
    }
    return deal(packer.done[:wanted], settings.rows, start["block"]), following


class _Draw:
    """Takes the next piece from the source that is furthest below its share of the tokens."""

    def __init__(self, sources: Sequence[SourceLengths], settings: PlanSettings, start: State) -> None:
        self._settings = settings
        self._decks = [Deck(source, settings.variants) for source in sources]
        total = sum(source.share for source in sources)
        self._shares = [source.share / total for source in sources]
        self._names = [source.name for source in sources]
        self.cursors: dict[str, list[int]] = {name: list(start["cursors"][name]) for name in self._names}
        self.emitted: dict[str, int] = dict(start["emitted"])

    def next_piece(self) -> Piece:
        """A whole pair, or a text or the part of it that fills a row."""
        source = self._furthest_behind()
        name, deck = self._names[source], self._decks[source]
        epoch, position, first = self.cursors[name]
        document = deck.document(epoch, position)
        tokens = self._part(document.tokens - first)
        if first + tokens < document.tokens:
            self.cursors[name][2] += tokens
        else:
            last = position + 1 == deck.size
            self.cursors[name] = [epoch + last, 0 if last else position + 1, 0]
        self.emitted[name] += tokens
        return Piece(source, epoch, document.sample, first, tokens, document.variant)

    def _furthest_behind(self) -> int:
        total = sum(self.emitted.values()) + 1
        deficits = [
            share * total - self.emitted[name] for share, name in zip(self._shares, self._names, strict=True)
        ]
        return deficits.index(max(deficits))

    def _part(self, remaining: int) -> int:
        length, shortest = self._settings.row_length, self._settings.shortest_piece
        if remaining <= length:
            return remaining
        return length if remaining - length >= shortest else length - shortest


class _Packer:
    """Open rows, and the rows that are done. Pairs go in whole; texts are cut only to fill a gap."""

    def __init__(self, settings: PlanSettings, start: State) -> None:
        self._settings = settings
        self.rows: list[list[Piece]] = [[Piece(*piece) for piece in row] for row in start["open"]]
        self._free = [settings.row_length - sum(piece.tokens for piece in row) for row in self.rows]
        self.done: list[list[Piece]] = [[Piece(*piece) for piece in row] for row in start["ready"]]

    def place(self, piece: Piece) -> None:
        """Put the piece into the rows, in parts if it is text and must be cut."""
        rest = piece.tokens
        while rest:
            row, tokens = self._where(piece, rest)
            first = piece.first + piece.tokens - rest
            self.rows[row].append(piece._replace(first=first, tokens=tokens))
            self._free[row] -= tokens
            rest -= tokens
            if self._free[row] < self._settings.closing_gap:
                self._close(row)

    def _where(self, piece: Piece, rest: int) -> tuple[int, int]:
        """Row for (a part of) the rest, and how much of it: best fit, else a new row, else a gap for text."""
        free = self._free
        fitting = [row for row in range(len(free)) if free[row] >= rest]
        if fitting:
            return min(fitting, key=free.__getitem__), rest
        if len(free) == self._settings.open_rows:
            widest = max(range(len(free)), key=free.__getitem__)
            part = self._gap(free[widest], rest) if piece.variant == Variant.TEXT else 0
            if part:
                return widest, part
            self._close(min(range(len(free)), key=free.__getitem__))
        self.rows.append([])
        free.append(self._settings.row_length)
        return len(free) - 1, rest

    def _gap(self, gap: int, rest: int) -> int:
        """Tokens of a text to put into a gap that is too small for it; 0 if the cut would be too short."""
        shortest = self._settings.shortest_piece
        part = gap if rest - gap >= shortest else rest - shortest
        return part if part >= shortest else 0

    def _close(self, row: int) -> None:
        self.done.append(self.rows.pop(row))
        self._free.pop(row)


def deal(rows: Sequence[Sequence[Piece]], per_batch: int, block: int) -> list[RowPlan]:
    """Rows in batch order; every batch, and every strided part of it, has about the same tokens of text.

    Rows are dealt in layers of like text content, the richest of a layer to the batch that is poorest so far.
    """
    batches = len(rows) // per_batch
    text = [sum(piece.tokens for piece in row if piece.variant == Variant.TEXT) for row in rows]
    by_text = sorted(range(len(rows)), key=lambda row: (text[row], row))
    hands: list[list[int]] = [[] for _ in range(batches)]
    sums = [0] * batches
    for layer in range(per_batch):
        cards = by_text[layer * batches : (layer + 1) * batches]
        takers = sorted(range(batches), key=lambda batch: (sums[batch], (batch + block) % batches))
        for batch, row in zip(takers, reversed(cards), strict=True):
            hands[batch].append(row)
            sums[batch] += text[row]
    # Folded: up the even rows and down the odd ones, so that rank r of W (rows r, r + W, ...) has its share.
    return [tuple(rows[row]) for hand in hands for row in [*hand[::2], *hand[1::2][::-1]]]


def plan_once(
    sources: Sequence[SourceLengths], settings: PlanSettings, *, epoch: int = 0
) -> Iterator[RowPlan]:
    """Rows that hold every document of every source exactly once: for evaluation."""
    packer = _Packer(settings, fresh(sources))
    for number, source in enumerate(sources):
        deck = Deck(source, settings.variants)
        for position in range(deck.size):
            document = deck.document(epoch, position)
            _place_whole(packer, settings, number, document)
            yield from map(tuple, packer.done)
            packer.done.clear()
    yield from map(tuple, packer.rows)


def _place_whole(packer: _Packer, settings: PlanSettings, source: int, document: Drawn) -> None:
    first = 0
    while first < document.tokens:
        tokens = min(settings.row_length, document.tokens - first)
        packer.place(Piece(source, document.epoch, document.sample, first, tokens, document.variant))
        first += tokens


def _fingerprint(sources: Sequence[SourceLengths], settings: PlanSettings) -> str:
    lengths = [
        [source.name, source.share, source.patches, len(source.text_tokens_N), _digest(source)]
        for source in sources
    ]
    rule = settings.variants
    return fingerprint(
        [
            lengths,
            settings.rows,
            settings.row_length,
            settings.open_rows,
            rule.seed,
            rule.caption_first,
            rule.caption_drop,
        ]
    )


def _digest(source: SourceLengths) -> str:
    digest = hashlib.blake2b(source.text_tokens_N.tobytes(), digest_size=8)
    digest.update(source.is_pair_N.tobytes())
    return digest.hexdigest()
