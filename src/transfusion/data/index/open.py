"""Opens the indexes of a configuration's sources, with what the configuration says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transfusion.config import Config, SourceConfig
from transfusion.data.index.build import IndexLocation, cache_of
from transfusion.data.index.source_index import SourceIndex, build_index
from transfusion.sequence.tokenizer import Tokenizer


def build_indexes(config: Config, sources: Sequence[SourceConfig], tokenizer: Tokenizer) -> list[SourceIndex]:
    """The index of each source, for rows and images of this configuration; missing files of it are made."""
    folder = Path(config.data.index) if config.data.index else None
    return [
        build_index(
            source,
            tokenizer,
            patches=config.patches_per_image,
            sequence_length=config.data.sequence_length,
            place=IndexLocation(folder=folder, fallback=Path(config.run.folder) / "index"),
            latent_channels=source.latent_channels or config.codec.stored_channels,
            cache=cache_of(config),
            codec=config.codec,
            sizes=config.image_sizes,
        )
        for source in sources
    ]
