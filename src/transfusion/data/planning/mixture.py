"""Documents of all sources as one stream in which each source has its share of the tokens.

A source's clock is the tokens it has given, divided by its share; the next span comes from the source whose clock
is furthest behind. So the stream is the sources' spans sorted by their clocks, and thousands are found at once.
Shape suffixes: D documents, P spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfusion.data.planning.epoch import EpochOrder, Integers, Lengths, PlanSettings, SpanTable, share_at

# Ticks of a clock a token, for a source that is alone.
_TICKS = 1 << 16
_MIN_DRAWN = 256
# Where each source stands: number of its next draw, tokens already given of that document, clock.
Cursors = dict[str, list[int]]


class Mixture:
    """The stream from some cursors on, under the shares of one step."""

    def __init__(
        self, sources: Sequence[Lengths], settings: PlanSettings, cursors: Cursors, *, step: int
    ) -> None:
        """A text longer than `sequence_length` is given in parts of that length, none below `min_span`."""
        shares = [share_at(source.schedule, step) for source in sources]
        total = sum(shares)
        # Ticks a token; a source without a share has no clock and gives nothing.
        rates = [max(1, round(_TICKS * total / share)) if share else 0 for share in shares]
        self._source_cursors = [
            _SourceCursor(number, source, settings, cursors[source.name], rate)
            for number, (source, rate) in enumerate(zip(sources, rates, strict=True))
        ]
        if any(first == step for source in sources for first, _ in source.schedule):
            # What was given under other shares is not made up for.
            for source_cursor in self._source_cursors:
                source_cursor.clock = 0

    def ahead(self, tokens: int) -> SpanTable:
        """The next spans in order, about so many tokens of them; they stay in the stream until taken."""
        horizon = self._slowest() + (tokens + 1) * _TICKS
        found, clocks = [], []
        for source_cursor in self._source_cursors:
            if source_cursor.rate and source_cursor.clock < horizon:
                spans = source_cursor.spans(-(-(horizon - source_cursor.clock) // source_cursor.rate))
                start = np.cumsum(spans.tokens) - spans.tokens
                found.append(spans)
                clocks.append(source_cursor.clock + start * source_cursor.rate)
        clock = np.concatenate(clocks)
        order = np.argsort(clock, kind="stable")
        return SpanTable.concatenate(found).at(order[clock[order] < horizon])

    def take(self, spans: SpanTable, count: int) -> None:
        """The first `count` of the spans that `ahead` gave are no longer in the stream."""
        for number, source_cursor in enumerate(self._source_cursors):
            here = np.flatnonzero(spans.source[:count] == number)
            if len(here):
                last = here[-1]
                end = int(spans.first[last] + spans.tokens[last])
                whole = end == int(spans.whole[last])
                source_cursor.seek(int(spans.draw[last]) + whole, 0 if whole else end)
                source_cursor.clock += int(spans.tokens[here].sum()) * source_cursor.rate

    def _slowest(self) -> int:
        """The clock that is furthest behind."""
        return min(source_cursor.clock for source_cursor in self._source_cursors if source_cursor.rate)

    def cursors(self) -> Cursors:
        """Where the sources stand. Clocks count from the one that is furthest behind."""
        slowest = self._slowest()
        return {
            each.name: [each.draw, each.first, each.clock - slowest if each.rate else 0]
            for each in self._source_cursors
        }

    def next_draws(self) -> list[int]:
        """Number of the next draw of each source."""
        return [source_cursor.draw for source_cursor in self._source_cursors]

    def whole_documents(self, source: int, draw_D: Integers) -> SpanTable:
        """These draws of a source, uncut."""
        return self._source_cursors[source].documents(draw_D)

    def documents(self, count: int) -> SpanTable:
        """The next `count` documents of the only source, in spans."""
        return self._source_cursors[0].spans_of(count)


class _SourceCursor:
    """One source: where it stands, and the documents drawn ahead."""

    def __init__(
        self, number: int, source: Lengths, settings: PlanSettings, cursor: Sequence[int], rate: int
    ) -> None:
        self.name, self.rate = source.name, rate
        self.draw, self.first, self.clock = cursor
        self._number, self._epoch_order = number, EpochOrder(source, settings.variants)
        self._sequence_length, self._shortest = settings.sequence_length, settings.min_span
        self._drawn = self.documents(np.empty(0, np.int64))

    def documents(self, draw_D: Integers) -> SpanTable:
        """These draws, uncut."""
        return self._epoch_order.documents(draw_D)._replace(source=np.full_like(draw_D, self._number))

    def seek(self, draw: int, first: int) -> None:
        """Stand at this token of this draw."""
        self._drawn = self._drawn.at(slice(draw - self.draw, None))
        self.draw, self.first = draw, first

    def spans(self, tokens: int) -> SpanTable:
        """Spans from here on, at least so many tokens."""
        wanted = tokens + self.first
        while (have := int(self._drawn.tokens.sum())) < wanted:
            known = len(self._drawn.tokens)
            more = (wanted - have) * known // have if have else 0
            self._extend(max(_MIN_DRAWN, more + more // 16))
        ends = np.cumsum(self._drawn.tokens)
        return self.spans_of(int(np.searchsorted(ends, wanted)) + 1)

    def spans_of(self, count: int) -> SpanTable:
        """Spans of the next `count` documents."""
        if len(self._drawn.tokens) < count:
            self._extend(count - len(self._drawn.tokens))
        return self._cut(self._drawn.at(slice(count)))

    def _extend(self, count: int) -> None:
        first = self.draw + len(self._drawn.tokens)
        more = self.documents(np.arange(first, first + count, dtype=np.int64))
        self._drawn = SpanTable.concatenate([self._drawn, more])

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
        return documents.at(document)._replace(first=begin[document] + offset, tokens=tokens)
