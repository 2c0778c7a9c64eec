"""A modality of this file's own: 1-D traces, with a 1-D embedder and a loss that no image has.

It goes through the trainer, the planner, the FLOP count and the metrics as they are: a family declares it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from transfusion import load_config, train
from transfusion.codec import encoded
from transfusion.codec.pixels import PixelCodec
from transfusion.config.families import FAMILY_SETTINGS, FamilySettings
from transfusion.data.shards.scan import Texts
from transfusion.data.shards.webdataset import expand, write_shards
from transfusion.families import FAMILIES, TRANSFUSION
from transfusion.families.family import Family, ImageMetric
from transfusion.losses.loss import ratio
from transfusion.model import ModelOutput, Transfusion
from transfusion.observe.metrics import read_metrics
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.plan.tracing import trace_step
from transfusion.plan.workload import DocumentMix
from transfusion.schema import Batch, LossTerms
from transfusion.sequence.tokenizer import train_tokenizer

LENGTH, CHANNELS, STEPS = 16, 3, 12
ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)


class Traces(Transfusion):
    """Reads a trace through a convolution along its length, and answers with its values."""

    def __init__(self, config: Any, codec: Any, **others: Any) -> None:
        super().__init__(config, codec, **others)
        self.along = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, bias=False)

    def forward(self, batch: Batch, noisy: Any) -> ModelOutput:
        return super().forward(batch, [self.along(each.squeeze(2)).unsqueeze(2) for each in noisy])


class TraceLoss:
    """Next-token loss on texts. On traces the absolute error of every second value, which the network does not see."""

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        (group,) = batch.media
        clean = encoded(group, PixelCodec())
        seen = (torch.arange(LENGTH) % 2 == 0).float()
        output = model(batch, [clean * seen])
        answer = output.prediction_NE.unflatten(0, (-1, LENGTH)).transpose(1, 2).unsqueeze(2)
        error_I = ((answer.float() - clean).abs() * (1 - seen)).flatten(1).sum(1)
        counts = self.counts(batch)
        return LossTerms(
            {"text": output.text_sum, "trace": (error_I * group.image_weight_I).sum()},
            {name: count.float() for name, count in counts.items()},
        )

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        hidden = CHANNELS * LENGTH // 2
        traces = sum(group.image_weight_I.sum(dtype=torch.float64) for group in batch.media) * hidden
        return {"text": batch.text_weight_BS.sum(dtype=torch.float64), "trace": torch.as_tensor(traces)}

    def combine(self, terms: LossTerms, counts: Mapping[str, Tensor]) -> Tensor:
        means = [total / counts[name].clamp(min=1.0) for name, total in terms.sums.items()]
        return torch.stack(means).sum()

    def mean(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
        return sum(ratio(sums[name], counts[name]) or 0.0 for name in sums)


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Overrides of a run on traces, whose family is declared for the time of a test."""
    family = Family(
        network=Traces,
        loss=lambda config, codec: TraceLoss(),
        drawing=TRANSFUSION.drawing,
        advance=TRANSFUSION.advance,
        image_calls=TRANSFUSION.image_calls,
        image_operations=TRANSFUSION.image_operations,
        head_targets=TRANSFUSION.head_targets,
        image_metric=lambda diffusion: ImageMetric("trace_loss", "", "mean absolute error of {}"),
    )
    monkeypatch.setitem(FAMILIES, "traces", family)
    monkeypatch.setitem(FAMILY_SETTINGS, "traces", FamilySettings(reads="latents"))
    write_shards((sample(number) for number in range(48)), tmp_path / "shards")
    train_tokenizer(Texts(expand([f"{tmp_path}/shards/*.tar"])), tmp_path / "t.model", vocabulary=292)
    source = f"{{name: traces, shards: {tmp_path}/shards/*.tar}}"
    yield [
        "model={family: traces, layers: 1, hidden_size: 32, heads: 2, patch_size: 1}",
        f"codec={{channels: {CHANNELS}, image_sizes: [1x{LENGTH}]}}",
        f"data.tokenizer={tmp_path}/t.model", f"data.sources=[{source}]", f"data.validation=[{source}]",
        "data.sequence_length=64", "data.global_batch_size=4", "log.every=1", f"run.dir={tmp_path}/run",
        f"train.steps={STEPS}", "train.precision=fp32", "train.threads=1", "optimizer.warmup_steps=1",
        "optimizer.learning_rate=3e-3",
    ]  # fmt: skip


def sample(number: int) -> dict[str, bytes]:
    """Sines of one frequency, and a caption that tells it."""
    stream, phase = io.BytesIO(), np.arange(LENGTH) * (1 + number % 3) / 3
    np.save(stream, np.stack([np.sin(phase), np.cos(phase), -np.sin(phase)])[:, None].astype(np.float16))
    caption = f"a trace of frequency number {number % 3}, the {number}th"
    return {"latent.npy": stream.getvalue(), "txt": caption.encode()}


def test_it_trains_is_measured_and_counted(values: list[str], tmp_path: Path) -> None:
    assert train(load_config(None, values)) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == STEPS and "image_loss" not in lines[0]
    assert lines[-1]["trace_loss"] < lines[0]["trace_loss"] and lines[-1]["text_loss"] < lines[0]["text_loss"]
    assert math.isclose(lines[0]["loss"], lines[0]["trace_loss"] + lines[0]["text_loss"])
    assert {"validation_trace_loss", "validation_text_loss"} <= lines[-1].keys()
    assert lines[-1]["gemm_share"] > 0


def test_it_is_planned(values: list[str]) -> None:
    config = load_config(None, values).with_vocabulary(292)
    load = DocumentMix(text_tokens=32, caption_tokens=8).workload(config, rows=4)
    trace = trace_step(config, load, dtype=torch.float32, whole=True, on_gpu=False)
    engine = LocalEngine(config, ALONE)
    parameters = sum(parameter.nbytes for parameter in engine.model.parameters())
    assert sum(trace.peak.values()) > 2 * parameters
