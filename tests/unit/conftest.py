"""What the unit tests share: a small model whose every weight matters, a tokenizer, documents as a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfusion.config import CodecConfig, Config, DataConfig, ModelConfig
from transfusion.data.packing import collate
from transfusion.data.rows import Row, RowImage, RowSettings
from transfusion.data.sequence import Layout, lay_out
from transfusion.data.tokenizer import Tokenizer, train_tokenizer
from transfusion.model import Transfusion
from transfusion.model.initialise import initialise
from transfusion.schema import Batch, ImageSegment, Modality, Segment, SpecialToken

VOCABULARY = 320


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["a handwritten three", "the digit seven, in bright ink", "someone wrote the number nine"] * 20
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(texts, folder / "tokenizer.model", vocabulary=VOCABULARY)


@pytest.fixture
def build_model() -> Callable[..., tuple[Config, Transfusion]]:
    """build_model(**fields of ModelConfig) -> (config, model) with 8x8 grey pictures of 16 patches."""

    def build(*, row_length: int = 256, seed: int = 0, **fields: Any) -> tuple[Config, Transfusion]:
        shape = {"vocabulary": VOCABULARY, "layers": 2, "width": 32, "heads": 4, "key_heads": 2, **fields}
        config = Config(
            model=ModelConfig(**shape),
            codec=CodecConfig(channels=1, image_size=8),
            data=DataConfig(row_length=row_length),
        )
        model = Transfusion(config.model, config.codec)
        initialise(model, seed=seed, layers=config.model.layers)
        # As initialised, the decoder answers zero and norms and biases do nothing; tests want all at work.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return config, model

    return build


@pytest.fixture
def pack() -> Callable[..., Batch]:
    """pack(config, rows of documents of segments, timesteps=..., keys=...) -> Batch.

    timesteps and keys: one for each image, in order; 10, 20, ... and 0, 1, ... unless given.
    """

    def packed(
        config: Config,
        rows: Sequence[Sequence[Sequence[Segment]]],
        *,
        timesteps: Sequence[int] | None = None,
        keys: Sequence[int] | None = None,
    ) -> Batch:
        settings = RowSettings.of(config)
        built, images = [], 0
        for documents in rows:
            row = _row(documents, settings, images, timesteps, keys)
            images += len(row.images)
            built.append(row)
        return collate(built, settings)

    return packed


def _row(
    documents: Sequence[Sequence[Segment]],
    settings: RowSettings,
    images_before: int,
    timesteps: Sequence[int] | None,
    keys: Sequence[int] | None,
) -> Row:
    layouts = [lay_out(document, axes=settings.axes) for document in documents]
    starts = np.cumsum([0, *map(len, layouts)]).tolist()
    size, used = settings.row_length, starts[-1]
    pictures = [
        (start + first, segment.values_CHW)
        for start, layout, document in zip(starts, layouts, documents, strict=False)
        for (first, _), segment in zip(
            layout.images, (s for s in document if isinstance(s, ImageSegment)), strict=True
        )
    ]
    numbers = range(images_before, images_before + len(pictures))
    images = tuple(
        RowImage(
            np.asarray(values),
            first,
            settings.patches,
            timesteps[number] if timesteps else 10 * (number + 1),
            keys[number] if keys else number,
        )
        for (first, values), number in zip(pictures, numbers, strict=True)
    )

    def filled(name: str, padding: int) -> np.ndarray:
        parts = [getattr(layout, name) for layout in layouts]
        shift = starts if name == "end_key_S" else [0] * len(starts)
        parts = [part + offset for part, offset in zip(parts, shift, strict=False)]
        joined = np.full((size, *parts[0].shape[1:]), padding, parts[0].dtype)
        joined[:used] = np.concatenate(parts)
        return joined

    return Row(
        token_ids_S=filled("token_ids_S", SpecialToken.PADDING),
        modality_S=filled("modality_S", Modality.PADDING),
        position_SA=filled("position_SA", 0),
        target_ids_S=filled("target_ids_S", SpecialToken.PADDING),
        text_weight_S=filled("text_weight_S", 0),
        first_key_S=_first_keys(layouts, starts, size),
        end_key_S=filled("end_key_S", used).astype(np.int32),
        images=images,
        faults=(),
        samples=len(layouts),
    )


def _first_keys(layouts: Sequence[Layout], starts: Sequence[int], size: int) -> np.ndarray:
    lengths = [len(layout) for layout in layouts]
    first = np.full(size, starts[-1], np.int32)
    first[: starts[-1]] = np.repeat(starts[:-1], lengths)
    return first


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """picture(seed) -> uint8 [1, 8, 8]."""

    def make(seed: int, size: int = 8) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (1, size, size), dtype=np.uint8)

    return make
