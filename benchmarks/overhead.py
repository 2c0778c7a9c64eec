"""What the trainer adds to a step: processor time of a step with loader, engine and logging, over a bare loop's.

    .venv/bin/python benchmarks/overhead.py [--pairs 5] [--out FILE] [section.key=value ...]

The paper's 0.16b with pixels for latents, one row of 4,096 tokens, fp32, the local engine, one process, one thread.
Real shards are read and decoded in the process, every step is logged. A bare loop is the network, both losses,
backward, clipping and torch's AdamW, written out below. Each batch of the loader is first taken by the bare loop, then
by the trainer, on the same weights, so that a noisy machine hits both. Processor time, all threads added up. The first
pair warms up. Each pair is written at once: stopped and run again, it goes on. Writes JSON, by default
benchmarks/results/overhead.json. Exits with 3 when the median of the ratios is above the bar.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from limits import find_device, record_head, write_json
from step import png_of
from transfusion.config import Config, load_config
from transfusion.data.shards.webdataset import write_shards
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.parallel import environment
from transfusion.schema import Batch
from transfusion.sequence.tokenizer import train_tokenizer
from transfusion.training.trainer import Trainer

RESULT = Path(__file__).resolve().parent / "results" / "overhead.json"
BAR, MISSED = 1.03, 3
SETTINGS = (
    "run.name=overhead",
    "model.vocabulary=32000",
    "data.global_batch_size=1",
    "train.engine=local",
    "train.precision=fp32",
    "train.threads=1",
    "train.stall_seconds=0",
    "train.lost_rank_timeout=0",
    "log.every=1",
)
TEXTS, PAIRS, WORDS = 200, 200, 300


class Enough(BaseException):
    """All pairs are timed: nothing is to be saved."""


def made_up(overrides: list[str], folder: Path) -> Config:
    """A configuration whose shards, images and tokenizer are made up in `folder`."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("aeioumnrstl"), 6)) for _ in range(WORDS)]
    texts = [" ".join(random.choice(words, int(random.integers(40, 400)))) for _ in range(TEXTS)]
    captions = [" ".join(random.choice(words, 8)) for _ in range(PAIRS)]
    tokenizer = train_tokenizer([*texts, *captions], folder / "tokenizer.model", vocabulary=512)
    plain = Config()
    write_shards([{"txt": text.encode()} for text in texts], folder / "texts")
    pairs = [{"png": png_of(plain, random), "txt": caption.encode()} for caption in captions]
    write_shards(pairs, folder / "pairs")
    sources = "[" + ", ".join(f"{{name: {n}, shards: {folder}/{n}/*.tar}}" for n in ("texts", "pairs")) + "]"
    given = [f"data.tokenizer={tokenizer.path}", f"data.sources={sources}", f"run.dir={folder / 'run'}"]
    return load_config(None, [*SETTINGS, *given, *overrides])


def bare_loop(model: nn.Module, config: Config) -> Callable[[list[Batch]], None]:
    """One step on some micro-batches, with nothing around it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=config.optimizer.betas)
    loss = TransfusionLoss(config.diffusion)

    def step(batches: list[Batch]) -> None:
        for batch in batches:
            terms = loss.terms(model, batch)
            loss.combine(terms, terms.counts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(config: Config, pairs: int, note: Callable[[float, float], None]) -> None:
    """Time `pairs` pairs after one that warms up; each goes to `note` as (trainer's, bare) seconds."""
    here = environment.start(config.train.threads)
    trainer = Trainer(config, here)
    bare = bare_loop(trainer.engine.model, config)  # type: ignore[attr-defined]
    read = trainer.loader.next_step
    begun: list[float] = []
    spent: list[float] = []

    def next_step() -> list[Batch]:
        # The trainer asks for a batch: its last step is over, all that belongs to it done.
        now = time.process_time()
        if len(begun) > 1:
            note(now - begun[-1] - spent[-1], spent[-1])
        if len(begun) > pairs:
            raise Enough
        begun.append(now)
        batches = read()
        before = time.process_time()
        bare(batches)
        spent.append(time.process_time() - before)
        return batches

    trainer.loader.next_step = next_step  # type: ignore[method-assign]
    try:
        trainer.run()
    except Enough:
        pass
    finally:
        environment.stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps in all")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes; pairs in it are kept")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"pairs": []}
    if found.get("overrides", given.overrides) != given.overrides:
        raise SystemExit(f"{given.out} is of other settings ({found['overrides']}); name another --out")

    def note(trainer: float, bare: float) -> None:
        found["pairs"].append({"trainer_s": trainer, "bare_s": bare, "ratio": trainer / bare})
        record = {"environment": record_head(find_device("cpu")), "bar": BAR, "overrides": given.overrides}
        median = statistics.median(pair["ratio"] for pair in found["pairs"])
        write_json({**record, "median_ratio": median, "pairs": found["pairs"]}, given.out)
        print(f"trainer {trainer:.2f} s, bare {bare:.2f} s, ratio {trainer / bare:.4f}", flush=True)

    left = given.pairs - len(found["pairs"])
    if left > 0:
        with tempfile.TemporaryDirectory() as folder:
            measure(made_up(given.overrides, Path(folder)), left, note)
    median = json.loads(given.out.read_text())["median_ratio"]
    print(f"median {median:.4f} of {len(found['pairs'])}, bar {BAR}")
    return MISSED if median > BAR else 0


if __name__ == "__main__":
    sys.exit(main())
