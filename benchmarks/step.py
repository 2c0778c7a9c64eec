"""A training step from end to end: tokens a second, time, memory, and how much of the machine's arithmetic it uses.

    .venv/bin/python benchmarks/step.py [CONFIG] [section.key=value ...] [--steps 10] [--out FILE]

Without CONFIG: the paper's 0.16b on a GPU, a tiny model on the CPU. Documents are made up (random tokens, random
images) and then planned, laid out, decoded and packed by the classes that training uses; the engine is the one that
`train.engine` names. A step is what the trainer does: batches to the device, both losses, backward, clip, AdamW. Under
torchrun every figure is of one process. Prints a summary, writes JSON, by default benchmarks/results/step.json. Exits
with 3 when a step was skipped or a loss is not finite: such a step is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from limits import Limits, find_device, measure_limits, record_head, write_json
from transfusion.config import Config, load_config
from transfusion.data.index.shard_index import ShardIndex, index_shard
from transfusion.data.index.source_index import SourceIndex
from transfusion.data.loading.collate import collate
from transfusion.data.loading.loader import micro_batches
from transfusion.data.loading.rows import RowBuilder, RowSettings
from transfusion.data.planning.epoch import VariantRule
from transfusion.data.planning.packing import Planner, PlanSettings
from transfusion.data.shards.shard import LocalShard
from transfusion.data.shards.webdataset import write_shards
from transfusion.families.build import build_model, count_parameters
from transfusion.model.backbone import Backbone
from transfusion.model.initialise import STANDARD_DEVIATION
from transfusion.observe.flops import FlopModel, Work
from transfusion.observe.memory import peak_gib
from transfusion.observe.utilization import published_tflops
from transfusion.parallel import environment, local
from transfusion.parallel.build import build_engine
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.engine import Engine
from transfusion.parallel.step_result import PendingResult
from transfusion.schema import Batch, BatchCounts, LossTerms, SpecialToken
from transfusion.sequence.layout import PAIR_CONTROL_TOKENS

RESULT = Path(__file__).resolve().parent / "results" / "step.json"
NOT_A_STEP = 3
# Tables 1 and 7 of the paper: 16 layers of width 768, patches of 2 x 2, a vocabulary of Llama 2, rows of 4,096.
PAPER_SMALLEST = ("run.name=0.16b", "data.global_batch_size=8", "data.micro_batch_size=8")
TINY = (
    "run.name=tiny",
    "model.layers=2",
    "model.hidden_size=64",
    "model.heads=2",
    "model.vocabulary=512",
    "codec.channels=1",
    "codec.image_size=8",
    "data.sequence_length=128",
    "data.global_batch_size=4",
    "train.engine=local",
    "train.precision=fp32",
    "train.threads=1",
)
VOCABULARY = 32_000
DOCUMENTS, IMAGES, DIFFERENT_STEPS = 512, 16, 4
CONVENTIONS = ("exact", "hardware", "palm")
FORMULAS = {
    "exact": "6 * elements of each matrix * the real positions that pass it + 12 * width * layers * visible pairs",
    "hardware": "with padding, 14 * width a pair, and what is recomputed: its mfu is called HFU",
    "palm": "(6 * N + 12 * width * layers * row length) * positions; N: parameters without the embedding table",
    "mfu": "FLOPs a second over the published dense bf16 peak of the device; null where that is not known",
    "share": "FLOPs a second over the matrix products measured in the same run",
}


# What is trained on


def synthetic_sources(config: Config, folder: Path) -> list[SourceIndex]:
    """Texts of 64 to 3,000 tokens, and images with captions of 8 to 64, as an index of shards would list them."""
    random = np.random.default_rng(config.run.seed)
    copies = 2 if config.diffusion.context == "clean" else 1
    longest_caption = config.data.sequence_length - copies * config.patches_per_image - PAIR_CONTROL_TOKENS
    texts = np.exp(random.uniform(math.log(64), math.log(3000), DOCUMENTS)).astype(np.int64)
    captions = random.integers(8, 65, DOCUMENTS).clip(max=max(1, longest_caption))
    return [
        _source("texts", texts, [], config, folder, random),
        _source("images", captions, [png_of(config, random) for _ in range(IMAGES)], config, folder, random),
    ]  # fmt: skip


def _source(
    name: str,
    tokens_N: np.ndarray,
    images: Sequence[bytes],
    config: Config,
    folder: Path,
    random: np.random.Generator,
) -> SourceIndex:
    samples: list[dict[str, bytes]] = [{"txt": str(tokens).encode()} for tokens in tokens_N]
    if images:
        samples = [{"png": images[number % len(images)], **text} for number, text in enumerate(samples)]
    (path,) = write_shards(samples, folder / name)
    shard = LocalShard(path)
    index_file = path.with_suffix(".index")
    encoder = RandomEncoder(config.model.vocabulary, random)
    index_shard(shard, index_file, encoder)
    parts = [ShardIndex(index_file, shard)]
    return SourceIndex(
        name,
        parts,
        patches=config.patches_per_image,
        sequence_length=config.data.sequence_length,
        clean_context=config.diffusion.context == "clean",
    )


class RandomEncoder:
    """Takes a text for the number of its tokens, and draws them."""

    fingerprint = "random"

    def __init__(self, vocabulary: int, random: np.random.Generator) -> None:
        self.vocabulary, self._random = vocabulary, random

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            self._random.integers(len(SpecialToken), self.vocabulary, int(text)).tolist() for text in texts
        ]


def png_of(config: Config, random: np.random.Generator) -> bytes:
    """An image of random values, as large as the codec's."""
    side = config.codec.image_size
    values = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, format="PNG")
    return stream.getvalue()


def synthetic_steps(config: Config, steps: int, rank: int = 0, world_size: int = 1) -> list[list[Batch]]:
    """This rank's micro-batches of the first `steps` global batches, half the tokens text and half images."""
    rule = VariantRule(
        seed=config.run.seed,
        caption_first=config.data.caption_first,
        caption_dropout=config.data.caption_dropout,
    )
    settings = PlanSettings(
        rows=config.data.global_batch_size,
        sequence_length=config.data.sequence_length,
        packing_buffer=config.data.packing_buffer,
        variants=rule,
    )
    row_settings = RowSettings.of(config)
    with tempfile.TemporaryDirectory() as folder:
        indexes = synthetic_sources(config, Path(folder))
        planner = Planner([index.lengths for index in indexes], settings)
        builder = RowBuilder(indexes, row_settings)
        plans = [planner.next_batch(rank, world_size) for _ in range(steps)]
        rows = [[builder.build(plan) for plan in step] for step in plans]
    return [
        [collate(part, row_settings) for part in micro_batches(step, config.data.micro_batch_size)]
        for step in rows
    ]


# What is trained


@contextlib.contextmanager
def weights_drawn_on(device: torch.device) -> Iterator[None]:
    """The local engine makes its network on `device`, with weights of the same size but other values.

    On the CPU, one parameter after the other, those of 1.4B take half a minute.
    """

    def build(config: Config) -> Backbone:
        with device:
            return build_model(config)

    with (
        mock.patch.object(local, "build_model", build),
        mock.patch.object(local, "initialise", draw_weights),
    ):
        yield


@torch.no_grad()
def draw_weights(module: nn.Module, *, seed: int, layers: int) -> None:
    """Matrices from one generator of their own device, norms 1, biases and the last layer of the patch decoder 0.

    Args:
        module: The network, with a linear patch embedder.
        seed: Of the generator.
        layers: What writes to the residual stream is divided by the square root of twice as many.
    """
    parameters = dict(module.named_parameters())
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(seed)
    for name, parameter in parameters.items():
        if name.endswith("bias") or name.startswith("patch_decoder.projection"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            to_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            deviation = STANDARD_DEVIATION / (math.sqrt(2 * layers) if to_residual else 1.0)
            if name.startswith("patch_encoder.projection"):
                deviation *= parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, deviation, generator=generator)


# What a step computes


def rates(work: Work, seconds: float, device: torch.device, measured_tflops: float) -> dict[str, Any]:
    """Each convention of `observe.flops` as TFLOP/s, share of the published peak and of the measured products."""
    published = published_tflops(device)
    told = {}
    for name in CONVENTIONS:
        operations = getattr(work, name).total
        speed = operations / seconds / 1e12
        told[name] = {
            "tflop": operations / 1e12,
            "tflops": speed,
            "mfu": speed / published if published else None,
            "share": speed / measured_tflops,
        }
    return told


def total_counts(batches: Sequence[Batch]) -> BatchCounts:
    """Counts of all micro-batches of a step."""
    counts = batches[0].counts
    for batch in batches[1:]:
        counts += batch.counts
    return counts


# The measurement


class BadStep(Exception):  # noqa: N818  (the measurement is refused, nothing is broken)
    """A step that did not train: its time would say nothing."""


def measure_step(
    config: Config, *, steps: int = 10, warm_up: int = 3, seconds: float = 60.0
) -> dict[str, Any]:
    """Time steps of `config`; `model.vocabulary` must be set. Raises BadStep, and UserError as training does.

    seconds: after this no further step is begun, once three are timed.
    """
    here = environment.start(config.train.threads)
    try:
        limits = measure_limits(here.device, seconds=min(5.0, seconds / 10), dtypes=(config.train.precision,))
        data = synthetic_steps(config, DIFFERENT_STEPS, here.rank, here.world_size)
        on_gpu = here.device.type == "cuda"
        with weights_drawn_on(here.device) if on_gpu else contextlib.nullcontext():
            engine = build_engine(config, here)
        losses = [train_step(engine, data[step % len(data)], config) for step in range(warm_up)]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(here.device)
        times, begun = _timed_steps(engine, data, config, steps, seconds)
        losses += [finish_step(*step) for step in begun]
        return _result(config, engine, data, times, losses, limits)
    finally:
        environment.stop()


def _timed_steps(
    engine: Engine, data: Sequence[Sequence[Batch]], config: Config, steps: int, seconds: float
) -> tuple[list[float], list[tuple[PendingResult, Tensor]]]:
    """Seconds of each step that was timed, and all that were made.

    As in training a step is read when the next one has been given to the GPU, which so is never without work: from one
    reading to the next is a step's time.
    """
    deadline = time.monotonic() + seconds
    begun, readings = [begin_step(engine, data[0], config)], list[float]()
    while len(readings) <= steps and (len(readings) <= 3 or time.monotonic() < deadline):
        begun.append(begin_step(engine, data[len(begun) % len(data)], config))
        begun[-2][0].read()
        readings.append(now(engine.device))
    return [end - begin for begin, end in pairwise(readings)], begun


def train_step(engine: Engine, micro_batches: Sequence[Batch], config: Config) -> float:
    """One step as `Trainer.train_step` makes it, waited for; returns the loss. Raises BadStep."""
    return finish_step(*begin_step(engine, micro_batches, config))


def begin_step(
    engine: Engine, micro_batches: Sequence[Batch], config: Config
) -> tuple[PendingResult, Tensor]:
    """Give a step to the device; returns what it comes to, and its loss."""
    batches = [batch.to(engine.device) for batch in micro_batches]
    counts = global_counts(batches, engine.loss)
    parts: list[LossTerms] = [engine.forward_backward(batch, counts) for batch in batches]
    pending = engine.step(config.optimizer.learning_rate)
    terms = parts[0]
    for part in parts[1:]:
        terms = terms.plus(part)
    text = terms.sums["text"] / terms.counts["text"].clamp(min=1)
    image = terms.sums["image"] / terms.counts["image"].clamp(min=1)
    return pending, text + config.diffusion.image_loss_weight * image


def finish_step(pending: PendingResult, loss: Tensor) -> float:
    """Wait for a step; returns its loss. Raises BadStep."""
    result, number = pending.read(), float(loss)
    if result.skipped or not math.isfinite(number):
        raise BadStep(f"loss {number}, gradient norm {result.gradient_norm}: the step was not made")
    return number


def now(device: torch.device) -> float:
    """Seconds: of the wall beside a GPU, on the CPU of the processor."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def _result(
    config: Config,
    engine: Engine,
    data: Sequence[Sequence[Batch]],
    times: Sequence[float],
    losses: Sequence[float],
    limits: Limits,
) -> dict[str, Any]:
    seconds = statistics.median(times)
    counts = [total_counts(step) for step in data]
    tokens = statistics.mean(count.tokens for count in counts)
    padding = statistics.mean(count.padding for count in counts)
    images = statistics.mean(count.images for count in counts)
    flops = FlopModel(config)
    work = sum((flops.of(step) for step in data), Work()).scaled(1 / len(data))
    return {
        "engine": type(engine).__name__,
        "processes": engine.world_size,
        "parameters": count_parameters(config.model, config.codec),
        "micro_batches": len(data[0]),
        "tokens": tokens,
        "images": images,
        "image_share": images * config.patches_per_image / tokens,
        "padding_share": padding / (tokens + padding),
        "clock": "wall" if engine.device.type == "cuda" else "process",
        "steps_timed": len(times),
        "step_ms": seconds * 1e3,
        "step_ms_least_and_most": [min(times) * 1e3, max(times) * 1e3],
        "tokens_per_second": tokens / seconds,
        "peak_gib": peak_gib(engine.device),
        "loss_first_and_last": [losses[0], losses[-1]],
        "published_tflops": published_tflops(engine.device),
        "rates": rates(work, seconds, engine.device, limits.gemm_tflops[config.train.precision]),
        "limits": limits.as_dict(),
    }


def summary(step: dict[str, Any]) -> str:
    """The result in a few lines."""
    lines = [
        f"{step['engine']}, {step['processes']} process(es), {step['tokens']:.0f} tokens a step, "
        f"{step['image_share']:.0%} of them patches",
        f"{step['step_ms']:.2f} ms a step, {step['tokens_per_second']:,.0f} tokens/s, {step['peak_gib']:.2f} GiB",
    ]
    for name, rate in step["rates"].items():
        mfu = "unknown" if rate["mfu"] is None else f"{rate['mfu']:.1%}"
        kind = "HFU" if name == "hardware" else "MFU"
        lines.append(
            f"{name:<9}{rate['tflops']:>9.3g} TFLOP/s  {kind} {mfu:>7}  of the products {rate['share']:.1%}"
        )
    return "\n".join(lines)


def config_of(arguments: Sequence[str], device: torch.device) -> Config:
    """CONFIG and overrides as given, or the default model of the device with the overrides."""
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(files) > 1:
        raise SystemExit(f"one config file at most, got {files}")
    if not files:
        overrides = [*(PAPER_SMALLEST if device.type == "cuda" else TINY), *overrides]
    config = load_config(files[0] if files else None, overrides)
    if config.model.vocabulary:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"vocabulary": VOCABULARY})})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", help="a file of configs/train, and section.key=value")
    parser.add_argument("--steps", type=int, default=10, help="steps to time")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them")
    parser.add_argument("--seconds", type=float, default=60.0, help="after this no further step is begun")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    given = parser.parse_args()
    device = find_device("auto")
    config = config_of(given.config, device)
    record: dict[str, Any] = {
        "environment": record_head(device),
        "formulas": FORMULAS,
        "config": config.as_dict(),
    }
    try:
        record["step"] = measure_step(config, steps=given.steps, warm_up=given.warm_up, seconds=given.seconds)
    except BadStep as error:
        print(f"not timed: {error}", file=sys.stderr)
        return NOT_A_STEP
    if environment.is_first_process():
        write_json(record, given.out)
        print(summary(record["step"]))
    return 0


if __name__ == "__main__":
    environment.leave(main())
