"""Validation data: every document exactly once, or the same few each time, on any number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from transfusion.config import Config, SourceConfig
from transfusion.data.index.build import cache_of
from transfusion.data.index.source_index import SourceIndex, build_indexes
from transfusion.data.loading.collate import collate
from transfusion.data.loading.prefetch import Fetcher, shards_of
from transfusion.data.loading.rows import RowBuilder, RowSettings, read_values, with_values
from transfusion.data.planning.epoch import VariantRule
from transfusion.data.planning.packing import PlanSettings, RowPlan, plan_once
from transfusion.data.shards.sample import Fault, SampleError
from transfusion.errors import UserError
from transfusion.schema import Batch, Document, Segment, TextSegment
from transfusion.sequence.tokenizer import Tokenizer

# So many that a text is cut only where it is longer than a row: a cut takes context away.
_OPEN_ROWS = 256


class EvaluationLoader:
    """Batches of validation data. Each pass gives the same ones, and every rank has the same number of them.

    No caption is dropped.

    Args:
        config: As for `Loader`.
        sources: What to read, such as `config.data.validation`.
        tokenizer: Makes token ids of the texts.
        rank: Number of this rank among those that share the batches, from 0.
        world_size: How many those are.
        rows: Of one batch of one rank. 0 takes as many as a micro-batch of training.
        limit: Documents of a pass, drawn from all sources alike, the same ones in each. 0 takes all.
        caption_first: Share of the pairs whose caption comes before the image. With all of them, images are measured
            at every noise level, and captions without the image.

    Raises:
        UserError: For no sources, or shards that are missing or hold nothing to read.
    """

    def __init__(
        self,
        config: Config,
        sources: Sequence[SourceConfig],
        tokenizer: Tokenizer,
        *,
        rank: int = 0,
        world_size: int = 1,
        rows: int = 0,
        limit: int = 0,
        caption_first: float = 1.0,
    ) -> None:
        if not sources:
            raise UserError("data.validation is empty; name at least one source with its shards")
        self._rank, self._world_size = rank, world_size
        self._rows = (
            rows or config.data.micro_batch_size or max(1, config.data.global_batch_size // world_size)
        )
        self.indexes = build_indexes(config, sources, tokenizer, captions_follow=caption_first < 1)
        self._settings, self._cache = RowSettings.of(config), cache_of(config)
        self._builder = RowBuilder(self.indexes, self._settings)
        rule = VariantRule(seed=config.run.seed, caption_first=caption_first, caption_dropout=0.0)
        length = config.data.sequence_length
        plan = PlanSettings(rows=self._rows, sequence_length=length, packing_buffer=_OPEN_ROWS, variants=rule)
        lengths = [index.lengths for index in self.indexes]
        self._plans: list[RowPlan] = list(plan_once(lengths, plan, limit=limit))

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-len(self._plans) // (self._rows * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the data.

        Yields:
            This rank's batches, on the CPU. The last ones hold rows of padding where documents have run out.
        """
        mine = self._plans[self._rank :: self._world_size]
        batches = [mine[number * self._rows : (number + 1) * self._rows] for number in range(len(self))]
        with contextlib.ExitStack() as stack:
            fetcher: Fetcher | None = None
            if any(index.is_remote for index in self.indexes):
                fetcher = stack.enter_context(contextlib.closing(Fetcher(self.indexes, self._cache)))
                fetcher.expect(shards_of(plans, self.indexes) for plans in batches)
            for plans in batches:
                if fetcher is not None:
                    fetcher.begin_batch()
                rows = [self._builder.build(plan) for plan in plans]
                rows += [self._builder.build(()) for _ in range(self._rows - len(rows))]
                if fetcher is not None:
                    fetcher.end_batch()
                yield collate(rows, self._settings)


def documents(
    config: Config,
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    *,
    faults: list[Fault] | None = None,
) -> Iterator[Document]:
    """Read every document of the sources, in file order. A document with an unreadable image is left out.

    Args:
        config: As for `Loader`.
        sources: What to read, such as `config.data.validation`.
        tokenizer: Makes token ids of the texts.
        faults: Takes what was left out.

    Yields:
        A text, an image after its first caption, or an interleaved document.

    Raises:
        UserError: For shards that are missing or hold nothing to read.
    """
    for index in build_indexes(config, sources, tokenizer, captions_follow=False):
        for sample in range(len(index)):
            try:
                yield _document(index, sample, config)
            except (SampleError, OSError) as error:
                if faults is not None:
                    faults.append(index.fault(sample, str(error)))


def _document(index: SourceIndex, sample: int, config: Config) -> Document:
    settings = RowSettings.of(config)
    segments: list[Segment]
    if index.lengths.interleaved_N[sample]:
        segments, images = index.segments(sample)
    else:
        segments, images = [TextSegment(tuple(index.text_ids(sample).tolist()))], []
        if index.lengths.images_N[sample]:
            segments, images = [*segments, index.image(sample)], [0]
    values = [read_values(index, sample, image, settings) for image in images]
    segments = with_values(segments, values, settings.sizes)
    return Document(tuple(segments), index.name, index.key(sample))
