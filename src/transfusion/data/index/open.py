"""Opens the indexes of a configuration's sources, and says what the planner is told of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transfusion.config import Config, SourceConfig
from transfusion.data.index.build import IndexPlace, cache_of
from transfusion.data.index.source_index import SourceIndex, build_index
from transfusion.data.planning.epoch import Schedule, SourceLengths
from transfusion.data.remote.cache import RemoteShard
from transfusion.sequence.tokenizer import Tokenizer


def build_indexes(config: Config, sources: Sequence[SourceConfig], tokenizer: Tokenizer) -> list[SourceIndex]:
    """The index of each source, for rows and pictures of this configuration; missing files of it are made."""
    folder = Path(config.data.index) if config.data.index else None
    return [
        build_index(
            source,
            tokenizer,
            patches=config.patches_per_image,
            row_length=config.data.row_length,
            place=IndexPlace(folder=folder, fallback=Path(config.run.folder) / "index"),
            latent_channels=source.latent_channels or config.codec.stored_channels,
            cache=cache_of(config),
            codec=config.codec,
            sizes=config.image_sizes,
        )
        for source in sources
    ]


def source_lengths(index: SourceIndex, schedule: Schedule, config: Config) -> SourceLengths:
    """What the planner is told of a source."""
    return SourceLengths(
        name=index.name,
        schedule=schedule,
        caption_start_N=index.caption_start_N,
        text_tokens_C=index.text_tokens_C,
        images_N=index.images_N,
        interleaved_N=index.interleaved_N,
        patches=config.patches_per_image,
        windows=index.windows,
        patches_N=index.patches_N,
        image_sizes=config.codec.image_sizes,
    )


def is_remote(index: SourceIndex) -> bool:
    """Whether shards of the source have to be fetched."""
    return any(isinstance(shard, RemoteShard) for shard in index.shards)
