"""The error in the clean image: what theory says of a model that knows no images, and the same question for each."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from transfusion.codec.pixels import PixelCodec
from transfusion.config import Config
from transfusion.data.shards.webdataset import write_shards
from transfusion.diffusion.objective import ImageObjective
from transfusion.diffusion.schedule import CosineSchedule, RectifiedFlowSchedule
from transfusion.errors import UserError
from transfusion.evaluate.suites.denoise import denoise, timestep_at
from transfusion.evaluate.suites.settings import DenoiseSuite
from transfusion.model.patches import patchify


class Knowing(torch.nn.Module):
    """Answers for the clean image that `guess` makes of the noisy one, in the words of the prediction."""

    def __init__(self, config: Config, guess: Any) -> None:
        super().__init__()
        self.objective, self.guess, self.patch = (
            ImageObjective(config.diffusion),
            guess,
            config.model.patch_size,
        )
        self.seen: list[Tensor] = []

    def forward(self, batch: Any, noisy: list[Tensor]) -> Any:
        [group], [noisy_ICHW] = batch.media, noisy
        self.seen.append(noisy_ICHW)
        signal, noise = self.objective.schedule.factors(group.timestep_I)
        clean = self.guess(noisy_ICHW, signal, noise)
        answer = {
            "x": clean,
            "epsilon": (noisy_ICHW - signal * clean) / noise,
            "flow": (noisy_ICHW - clean) / noise,
            "v": (signal * noisy_ICHW - clean) / noise,
        }[self.objective.predicts]
        return SimpleNamespace(
            prediction_NE=patchify(answer, self.patch).flatten(0, 1), text_sum=None, others=()
        )


LEVELS = [0.1, 0.5, 0.9]


class CountingCodec(PixelCodec):
    """Counts how often images are encoded."""

    calls = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return super().encode(pixels)


def measured(
    folder: Path, tokenizer: Any, guess: Any, seed: int = 0, codec: Any = None, **diffusion: Any
) -> tuple[dict[str, Any], Any]:
    values = {
        "run": {"seed": seed},
        "diffusion": diffusion,
        "codec": {"channels": 1, "image_size": 8},
        "model": {"patch_size": 2},
        "data": {
            "tokenizer": str(tokenizer.path),
            "sequence_length": 64,
            "validation": [{"name": "p", "shards": f"{folder}/*.tar"}],
        },
    }
    config = Config.model_validate(values).with_vocabulary(tokenizer.vocabulary)
    model = Knowing(config, guess)
    runner = SimpleNamespace(model=model, codec=codec, device=torch.device("cpu"))
    pipeline: Any = SimpleNamespace(config=config, runner=runner, tokenizer=tokenizer)
    return denoise(pipeline, folder, DenoiseSuite(levels=LEVELS)), model


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Latents of unit deviation, with captions."""
    samples = []
    for number in range(40):
        stream = io.BytesIO()
        np.save(stream, np.random.default_rng(number).normal(size=(1, 8, 8)).astype(np.float32))
        samples.append({"latent.npy": stream.getvalue(), "txt": b"the digit seven"})
    write_shards(samples, tmp_path)
    return tmp_path


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x"])
def test_what_is_known_of_noise_alone_gives_the_error_of_theory(
    shards: Path, tokenizer: Any, prediction: str
) -> None:
    """The best guess without any knowledge of images has the error of Wiener's filter, the level squared."""

    def wiener(noisy: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return noisy * signal / (signal.square() + noise.square())

    metrics, _ = measured(shards, tokenizer, wiener, prediction=prediction)
    for level in LEVELS:
        metric = metrics[f"p_denoise_error_at_{level:g}"]
        assert metric.value == pytest.approx(level**2, rel=0.1)
        assert metric.interval is not None and metric.interval[0] < metric.value < metric.interval[1]


def test_two_models_are_asked_about_the_same_noise(shards: Path, tokenizer: Any) -> None:
    def nothing(noisy: Tensor, *_: Tensor) -> Tensor:
        return torch.zeros_like(noisy)

    (first, one), (second, other) = (
        measured(shards, tokenizer, nothing, seed=seed, prediction=prediction)
        for seed, prediction in ((0, "epsilon"), (5, "v"))
    )
    assert all(torch.equal(left, right) for left, right in zip(one.seen, other.seen, strict=True))
    assert [metric.value for metric in first.values()] == pytest.approx(
        [metric.value for metric in second.values()]
    )
    assert first["p_denoise_error_at_0.9"].value == pytest.approx(1.0, rel=0.1), "all that there is"


def test_an_image_is_encoded_once_for_all_levels(tmp_path: Path, tokenizer: Any) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(stream, format="PNG")
    write_shards([{"png": stream.getvalue(), "txt": b"the digit seven"}], tmp_path)
    codec = CountingCodec()
    _, model = measured(tmp_path, tokenizer, lambda noisy, *_: noisy, codec=codec)
    assert codec.calls == 1 and len(model.seen) == len(LEVELS)


@pytest.mark.parametrize("schedule", [CosineSchedule(), RectifiedFlowSchedule()])
@pytest.mark.parametrize("level", [0.05, 0.4, 0.7, 0.99])
def test_a_level_is_the_same_ratio_of_signal_and_noise_in_every_schedule(schedule: Any, level: float) -> None:
    signal, noise = schedule.signal_and_noise(torch.tensor([timestep_at(level, schedule)]))
    assert float(noise / signal) == pytest.approx(level / (1 - level**2) ** 0.5, rel=0.05)


def test_texts_have_no_images(tmp_path: Path, tokenizer: Any) -> None:
    write_shards([{"txt": b"someone wrote"}] * 3, tmp_path)
    with pytest.raises(UserError, match=r"needs images in data\.validation"):
        measured(tmp_path, tokenizer, None)
