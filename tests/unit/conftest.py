"""What the unit tests share: a small model whose every weight matters, a tokenizer, documents as a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from transfusion.config import CodecConfig, Config, DataConfig, ModelConfig
from transfusion.data.loading.collate import collate
from transfusion.data.loading.rows import Row, RowImage, RowSettings, borders, joined
from transfusion.model import Transfusion
from transfusion.model.initialise import initialise
from transfusion.schema import Batch, ImageSegment, Segment
from transfusion.sequence.layout import tokenize_document
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

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
    """build_model(**fields of ModelConfig) -> (config, model) with 8x8 grey images of 16 patches."""

    def build(
        *,
        sequence_length: int = 256,
        seed: int = 0,
        channels: Literal[1, 3] = 1,
        image_size: int = 8,
        image_sizes: Sequence[str] = (),
        **fields: Any,
    ) -> tuple[Config, Transfusion]:
        shape = {
            "vocabulary": VOCABULARY,
            "layers": 2,
            "hidden_size": 32,
            "heads": 4,
            "num_kv_heads": 2,
            **fields,
        }
        config = Config(
            model=ModelConfig(**shape),
            codec=CodecConfig(channels=channels, image_size=image_size, image_sizes=tuple(image_sizes)),
            data=DataConfig(sequence_length=sequence_length),
        ).with_vocabulary(VOCABULARY)
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
    """What the loader makes of planned documents, for documents, noise levels and noise keys given by hand."""
    tokenized = [tokenize_document(document) for document in documents]
    places = [
        (start + first, patches)
        for start, each in zip(borders(tokenized), tokenized, strict=False)
        for first, patches, _ in each.images
    ]
    decoded = [
        np.asarray(segment.values_CHW)
        for document in documents
        for segment in document
        if isinstance(segment, ImageSegment)
    ]
    images = []
    for number, (values, place) in enumerate(zip(decoded, places, strict=True), images_before):
        timestep = timesteps[number] if timesteps else 10 * (number + 1)
        images.append(RowImage(values, *place, timestep, keys[number] if keys else number))
    return joined(tokenized, settings, tuple(images), ())


@pytest.fixture
def make_image() -> Callable[..., np.ndarray]:
    """make_image(seed) -> uint8 [1, 8, 8]."""

    def make(seed: int, size: int = 8) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (1, size, size), dtype=np.uint8)

    return make
