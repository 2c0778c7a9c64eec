"""Documents of all sources as one stream in which each source has its share of the tokens.

A source's clock is the tokens it has given, divided by its share; the next span comes from the source whose clock
is furthest behind. So the stream is the sources' spans sorted by their clocks, and thousands are found at once.
Shape suffixes: D documents, P spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfusion.data.planning.epoch import EpochOrder, Integers, Lengths, SpanTable, VariantRule, share_at

# Ticks of a clock a token, for a source that is alone.
_TICKS = 1 << 16
_MIN_DRAWN = 256
# Where a source stands: number of its next draw, tokens already given of that document, clock.
Cursor = list[int]
Cursors = dict[str, Cursor]


def fresh_cursors(sources: Sequence[Lengths]) -> Cursors:
    """Every source at its first document."""
    return {source.name: [0, 0, 0] for source in sources}


class Mixture:
    """The stream from some cursors on, under the shares of one step."""

    def __init__(
        self,
        sources: Sequence[Lengths],
        variants: VariantRule,
        cursors: Cursors,
        *,
        step: int,
        sequence_length: int,
        min_span: int,
    ) -> None:
        """A text longer than `sequence_length` is given in parts of that length, none below `min_span`."""
        shares = [share_at(source.schedule, step) for source in sources]
        total = sum(shares)
        self._names = [source.name for source in sources]
        self._source_cursors = [
            _SourceCursor(EpochOrder(source, variants), cursors[source.name], sequence_length, min_span)
            for source in sources
        ]
        # Ticks a token; a source without a share has no clock and gives nothing.
        self._rates = [max(1, round(_TICKS * total / share)) if share else 0 for share in shares]
        if any(first == step for source in sources for first, _ in source.schedule):
            # What was given under other shares is not made up for.
            for source_cursor in self._source_cursors:
                source_cursor.clock = 0

    def ahead(self, tokens: int) -> SpanTable:
        """The next spans in order, about so many tokens of them; they stay in the stream until taken."""
        active = [
            (source_cursor, rate)
            for source_cursor, rate in zip(self._source_cursors, self._rates, strict=True)
            if rate
        ]
        horizon = min(source_cursor.clock for source_cursor, _ in active) + (tokens + 1) * _TICKS
        found, clocks = [], []
        for number, (source_cursor, rate) in enumerate(zip(self._source_cursors, self._rates, strict=True)):
            if rate and source_cursor.clock < horizon:
                spans = source_cursor.spans(-(-(horizon - source_cursor.clock) // rate), number)
                start = np.cumsum(spans.tokens) - spans.tokens
                found.append(spans)
                clocks.append(source_cursor.clock + start * rate)
        clock = np.concatenate(clocks)
        order = np.argsort(clock, kind="stable")
        order = order[clock[order] < horizon]
        return SpanTable(*(np.concatenate(column)[order] for column in zip(*found, strict=True)))

    def take(self, spans: SpanTable, count: int) -> None:
        """The first `count` of the spans that `ahead` gave are no longer in the stream."""
        for number, (source_cursor, rate) in enumerate(zip(self._source_cursors, self._rates, strict=True)):
            here = np.flatnonzero(spans.source[:count] == number)
            if len(here):
                last = here[-1]
                end = int(spans.first[last] + spans.tokens[last])
                whole = end == int(spans.whole[last])
                source_cursor.seek(int(spans.draw[last]) + whole, 0 if whole else end)
                source_cursor.clock += int(spans.tokens[here].sum()) * rate

    def cursors(self) -> Cursors:
        """Where the sources stand. Clocks count from the one that is furthest behind."""
        slowest = min(
            source_cursor.clock
            for source_cursor, rate in zip(self._source_cursors, self._rates, strict=True)
            if rate
        )
        return {
            name: [source_cursor.draw, source_cursor.first, source_cursor.clock - slowest if rate else 0]
            for name, source_cursor, rate in zip(self._names, self._source_cursors, self._rates, strict=True)
        }

    def next_draws(self) -> list[int]:
        """Number of the next draw of each source."""
        return [source_cursor.draw for source_cursor in self._source_cursors]

    def whole_documents(self, source: int, draw_D: Integers) -> SpanTable:
        """These draws of a source, uncut."""
        documents = self._source_cursors[source].epoch_order.documents(draw_D)
        return documents._replace(source=np.full_like(draw_D, source))

    def documents(self, count: int) -> SpanTable:
        """The next `count` documents of the only source, in spans."""
        return self._source_cursors[0].spans_of(count, 0)


class _SourceCursor:
    """One source: where it stands, and the documents drawn ahead."""

    def __init__(self, epoch_order: EpochOrder, cursor: Cursor, sequence_length: int, min_span: int) -> None:
        self.epoch_order = epoch_order
        self.draw, self.first, self.clock = cursor
        self._sequence_length, self._shortest = sequence_length, min_span
        self._drawn = self._draw(self.draw, 0)

    def _draw(self, first: int, count: int) -> SpanTable:
        return self.epoch_order.documents(np.arange(first, first + count, dtype=np.int64))

    def seek(self, draw: int, first: int) -> None:
        """Stand at this token of this draw."""
        skipped = draw - self.draw
        self._drawn = SpanTable(*(column[skipped:] for column in self._drawn))
        self.draw, self.first = draw, first

    def spans(self, tokens: int, source: int) -> SpanTable:
        """Spans from here on, at least so many tokens."""
        wanted = tokens + self.first
        while (have := int(self._drawn.tokens.sum())) < wanted:
            known = len(self._drawn.tokens)
            more = (wanted - have) * known // have if have else 0
            self._extend(max(_MIN_DRAWN, more + more // 16))
        ends = np.cumsum(self._drawn.tokens)
        return self.spans_of(int(np.searchsorted(ends, wanted)) + 1, source)

    def spans_of(self, count: int, source: int) -> SpanTable:
        """Spans of the next `count` documents."""
        if len(self._drawn.tokens) < count:
            self._extend(count - len(self._drawn.tokens))
        whole = SpanTable(*(column[:count] for column in self._drawn))
        whole = whole._replace(source=np.full(count, source))
        return self._cut(whole)

    def _extend(self, count: int) -> None:
        more = self._draw(self.draw + len(self._drawn.tokens), count)
        self._drawn = SpanTable(*(np.concatenate(pair) for pair in zip(self._drawn, more, strict=True)))

    def _cut(self, documents: SpanTable) -> SpanTable:
        """Parts of at most a row; the first document goes on where it was left."""
        begin = np.zeros_like(documents.tokens)
        begin[0] = self.first
        remaining = documents.tokens - begin
        parts = -(-remaining // self._sequence_length)
        document = np.repeat(np.arange(len(parts)), parts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
        offset = number * self._sequence_length
        tokens = np.minimum(self._sequence_length, remaining[document] - offset)
        # A last part that is too short takes some of the one before.
        short = np.flatnonzero((tokens < self._shortest) & (number > 0))
        tokens[short] += self._shortest
        offset[short] -= self._shortest
        tokens[short - 1] -= self._shortest
        spans = SpanTable(*(column[document] for column in documents))
        return spans._replace(first=begin[document] + offset, tokens=tokens)
