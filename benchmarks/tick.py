"""How long a tick of the engine takes, launched kernel by kernel and as CUDA graphs.

    .venv/bin/python benchmarks/tick.py [CONFIG] [section.key=value ...] [--rows 1 8 64] [--images 1 8] [--out FILE]

Without CONFIG: the paper's 0.76b on a GPU, a tiny model on the CPU, which has no graphs. The network is random, in
bf16 on a GPU. Texts follow a prompt of 512 tokens, 32 on the CPU. Images are drawn under guidance 3. Both ways take
turns, a tick each, so that both see the same machine. Prints a line each, writes JSON, by default
benchmarks/results/tick.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from generate import drawing, make_pipeline, make_tokenizer, prompt_of
from limits import find_device, record_head, write_json
from transfusion.generate import Pipeline, Request
from transfusion.inference.captured import WARM_UPS

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "tick.json"
GPU_CONFIG = ROOT.parent / "configs" / "benchmark" / "0.76b.yaml"
TINY = (
    "model.layers=2",
    "model.hidden_size=64",
    "model.heads=2",
    "codec.image_size=16",
    "data.sequence_length=256",
)
WAYS = ("plain", "graphs")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", help="a file, and settings as `transfusion train` takes them")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[1, 8, 64], help="texts that are spoken together"
    )
    parser.add_argument(
        "--images", type=int, nargs="*", default=[1, 8], help="images that are drawn together"
    )
    parser.add_argument("--ticks", type=int, default=30, help="measured of each")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    device = find_device("auto")
    is_gpu = device.type == "cuda"
    file = next((Path(word) for word in given.config if "=" not in word), GPU_CONFIG if is_gpu else None)
    overrides = tuple(word for word in given.config if "=" in word)
    overrides = ("model.vocabulary=32000", *overrides) if is_gpu else (*TINY, *overrides)
    ways = WAYS if is_gpu else WAYS[:1]
    results: list[dict[str, Any]] = []
    record = record_head(device) | {"ticks": given.ticks, "results": results}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tokenizer = make_tokenizer(Path(folder))
        pipeline = make_pipeline(tokenizer, overrides, file, device)
        if is_gpu:
            pipeline.runner.model.bfloat16()
        length, most = (512, 200) if is_gpu else (32, 150)
        for count in given.rows:
            prompts = [prompt_of(tokenizer, length, seed) for seed in range(count)]
            texts = [Request(prompt=[text], max_tokens=most, max_images=0) for text in prompts]
            results.append(
                {"what": "tokens", "together": count} | measure(pipeline, texts, ways, given.ticks)
            )
        for count in given.images:
            prompts = [prompt_of(tokenizer, 32, seed) for seed in range(count)]
            images = [drawing([text], seed, steps=1000) for seed, text in enumerate(prompts)]
            results.append(
                {"what": "images", "together": count} | measure(pipeline, images, ways, given.ticks)
            )
            write_json(record, given.out)


def measure(
    pipeline: Pipeline, requests: Sequence[Request], ways: Sequence[str], ticks: int
) -> dict[str, Any]:
    """Median milliseconds of a tick, each way."""
    engines = {}
    for way in ways:
        pipeline.runner.captures = way == "graphs"
        engine = pipeline.engine(most_requests=len(requests))
        for request in requests:
            engine.submit(request)
        engine.tick()
        engines[way] = engine
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(WARM_UPS + 1 + ticks):
        for way, engine in engines.items():
            begin = now()
            engine.tick()
            if number > WARM_UPS:
                taken[way].append(1000 * (now() - begin))
    found = {f"{way}_ms": statistics.median(times) for way, times in taken.items()}
    what = "images" if requests[0].draws else "texts"
    print(f"{len(requests):3} {what:6} " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def now() -> float:
    """Seconds, when all that was launched has run."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
