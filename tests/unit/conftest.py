"""What the unit tests share: a small model whose every weight matters, a tokenizer, documents as a batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from transfusion.checkpoint import export
from transfusion.config import CodecConfig, Config, DataConfig, ModalityConfig, ModelConfig
from transfusion.data.loading.collate import collate
from transfusion.data.loading.rows import Row, RowImage, RowSettings, borders, joined, placed
from transfusion.files import file_digest
from transfusion.generate import Pipeline
from transfusion.model import Transfusion
from transfusion.model.initialise import initialise
from transfusion.schema import Batch, ImageSegment, Segment, SpecialToken
from transfusion.sequence.layout import tokenize_document, with_twins
from transfusion.sequence.sizes import IMAGE
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

VOCABULARY = 320
# Letters with a piece of their own, so that a text and its ids tell the same.
LETTERS = "adeghiknorstvw"


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
    """build_model(modalities=..., **fields of ModelConfig) -> (config, model) with 8x8 grey images of 16 patches."""

    def build(
        *,
        sequence_length: int = 256,
        seed: int = 0,
        channels: Literal[1, 3] = 1,
        image_size: int = 8,
        image_sizes: Sequence[str] = (),
        modalities: Sequence[dict[str, Any]] = (),
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
            modalities=[ModalityConfig(**each) for each in modalities],
        ).with_vocabulary(VOCABULARY)
        model = Transfusion(config.model, config.codec, modalities=config.modalities)
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
            images += sum(not image.is_context for image in row.images)
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
    if settings.clean_context:
        tokenized = [with_twins(document) for document in tokenized]
    places = [
        (document, start, number)
        for start, document in zip(borders(tokenized), tokenized, strict=False)
        for number in range(len(document.images))
    ]
    decoded = [
        np.asarray(segment.values_CHW)
        for document in documents
        for segment in document
        if isinstance(segment, ImageSegment)
    ]
    images: list[RowImage] = []
    for number, (values, place) in enumerate(zip(decoded, places, strict=True), images_before):
        timestep = timesteps[number] if timesteps else 10 * (number + 1)
        images += placed(*place, values, timestep, keys[number] if keys else number)
    return joined(tokenized, settings, tuple(images), ())


@pytest.fixture
def make_image() -> Callable[..., np.ndarray]:
    """make_image(seed) -> uint8 [1, 8, 8]."""

    def make(seed: int, size: int = 8) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (1, size, size), dtype=np.uint8)

    return make


class Leaning(nn.Module):
    """A text head that leans towards some tokens, so that an untrained model ends texts and begins images."""

    def __init__(self, head: nn.Module, bias_V: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("bias_V", bias_V)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return 3.0 * self.head(hidden_ND) + self.bias_V


@pytest.fixture
def build_pipeline(
    build_model: Callable[..., tuple[Config, Transfusion]], tokenizer: Tokenizer
) -> Callable[..., Pipeline]:
    """build_pipeline(image=, media=, end=, diffusion=, **build_model's) -> says letters.

    image, media, end: bias of <BOI>, of the tokens that begin other media, and of <EOS>.
    """

    def build(
        *,
        image: float = -100.0,
        media: float = -100.0,
        end: float = -100.0,
        diffusion: Any = None,
        **fields: Any,
    ) -> Pipeline:
        config, model = build_model(**fields)
        config = Config.model_validate(config.as_dict() | {"diffusion": diffusion or {}})
        bias_V = torch.full((config.model.vocabulary,), -50.0)
        bias_V[[tokenizer.encode(letter)[0] for letter in LETTERS]] = 0.0
        bias_V[SpecialToken.BEGIN_IMAGE], bias_V[SpecialToken.END_DOCUMENT] = image, end
        sizes = config.media_sizes
        bias_V[[sizes.begin_token(size) for size in sizes.all if size.modality != IMAGE]] = media
        model.lm_head = Leaning(model.lm_head, bias_V)  # type: ignore[assignment]
        return Pipeline(model, tokenizer, config, "cpu")

    return build


# Of the weight files of an export.
MARKED = {"format": "pt", export.EXPORT_ID: "one"}


@pytest.fixture
def folder(
    tmp_path: Path, build_model: Callable[..., tuple[Config, Transfusion]], tokenizer: Tokenizer
) -> Path:
    """Raw weights of seed 0, averaged ones of seed 1; the vocabulary is left to the tokenizer."""
    (config, raw), (_, average) = build_model(seed=0), build_model(seed=1)
    values = config.as_dict()
    values["model"]["vocabulary"] = 0
    write_export(tmp_path, values, tokenizer, raw, average)
    return tmp_path


def write_export(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, *models: Transfusion) -> None:
    """A folder as `transfusion export` leaves it, of one network or of two: raw weights, and averaged ones."""
    names = dict(list(export.WEIGHT_FILES.items())[: len(models)])
    for file, model in zip(names.values(), models, strict=True):
        save_file(model.state_dict(), folder / file, metadata=MARKED)
    shutil.copy(tokenizer.path, folder / export.TOKENIZER)
    description = {
        "format": export.FORMAT,
        "format_version": export.FORMAT_VERSION,
        export.EXPORT_ID: "one",
        "step": 5,
        "weights": names,
        "digests": {export.TOKENIZER: file_digest(folder / export.TOKENIZER)},
        "config": config,
    }
    (folder / export.CONFIG).write_text(json.dumps(description))
