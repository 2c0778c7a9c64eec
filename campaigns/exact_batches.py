"""Global batches bit for bit: over world sizes, worker counts, changes of both, and SIGKILL at random points.

    .venv/bin/python campaigns/exact_batches.py [--seed 0] [--out benchmarks/results/exact-batches.json]

Makes digits, coloured images with alpha and reference text, and writes down the global batches of 24 rows of one
process without workers. Then

    grid      every world size x every number of workers, each from a random step; with workers, one a rank is killed
    chains    runs that change world size and workers every few steps, each part from the state of the last as JSON
    killed    two real processes, one rank each, both killed at a random moment; their last common state is taken up
              at another world size

Ranks of the first two are virtual: one process makes them one after another. A row is compared by a digest of all
that a batch holds of it, a state by its JSON. Exits with 3 when one differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from limits import record_head, write_json
from transfusion.config import Config
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.workers import ProcessWorkers
from transfusion.data.prepare.folders import image_sample
from transfusion.data.prepare.prepare import prepare
from transfusion.data.shards.scan import Texts
from transfusion.data.shards.webdataset import Sample, expand, write_shards
from transfusion.schema import Batch
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "exact-batches.json"
ROWS = 24
WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 24)
WORKERS = (0, 1, 2, 4)
GRID_STEPS = 3
# Widths and heights of coloured images, one twice as often as the others.
COLOURED, SHAPES = 600, ((12, 12), (12, 12), (21, 13), (9, 30))
# For processes that start on a machine that does much else.
LONGEST_WAIT_SECONDS = 600
WRONG = 3

State = dict[str, Any]
Step = list[str]


class Truth(NamedTuple):
    """Digests of the rows of each step, and the state before each (one more) as JSON."""

    steps: list[Step]
    states: list[str]


def make_config(folder: Path) -> Config:
    """Digits, colours and reference text in rows of 512; makes them and a tokenizer where they are missing."""
    for name, kind in (("digits", "digits"), ("docs", "python-docs")):
        prepare(kind, folder / name)
    if not (folder / "colours").exists():
        write_shards(coloured(random.Random(0)), folder / "colours" / "validation")
    model = folder / "tokenizer.model"
    if not model.exists():
        train_tokenizer(Texts(expand(f"{folder}/*/train/*.tar")), model, vocabulary=1024)
    shares = {"digits": 0.25, "colours": 0.25, "docs": 0.5}
    sources = [
        {"name": name, "shards": f"{folder}/{name}/validation/*.tar", "weight": share}
        for name, share in shares.items()
    ]
    data = {"sources": sources, "tokenizer": str(model), "sequence_length": 512, "global_batch_size": ROWS}
    return Config.model_validate({"codec": {"channels": 3, "image_size": 8}, "data": data})


def coloured(chance: random.Random) -> Iterator[Sample]:
    """Transparent images of several shapes: those of one shape in a row are resampled together."""
    for number in range(COLOURED):
        width, height = chance.choice(SHAPES)
        values = np.frombuffer(chance.randbytes(4 * width * height), np.uint8).reshape(height, width, 4)
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, "PNG")
        yield image_sample(stream.getvalue(), "png", f"image {number} of {width} by {height}")


def open_loader(config: Config, rank: int, world_size: int, workers: int, state: str | None) -> Loader:
    """One rank's loader, from a state as JSON."""
    changed = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    tokenizer = Tokenizer(config.data.tokenizer)
    resumed = json.loads(state) if state else None
    return Loader(changed, config.data.sources, tokenizer, rank=rank, world_size=world_size, state=resumed)


def row_digests(batches: Sequence[Batch]) -> Step:
    """A digest of everything that the batches hold of each row."""
    return [_row_digest(batch, row) for batch in batches for row in range(len(batch.token_ids_BS))]


def _row_digest(batch: Batch, row: int) -> str:
    length = batch.token_ids_BS.shape[1]
    columns = (
        batch.token_ids_BS,
        batch.modality_BS,
        batch.position_BSA,
        batch.target_ids_BS,
        batch.text_weight_BS,
        batch.mask.first_key,
        batch.mask.end_key,
    )
    found: list[Tensor] = [column[row] for column in columns]
    for group in batch.media:
        slots = group.patch_slot_IP - row * length
        here = (slots[:, 0] >= 0) & (slots[:, 0] < length) & (group.image_weight_I > 0)
        if here.any():
            values = group.values if group.value_I is None else group.values[group.value_I]
            fields = (values, group.timestep_I, group.noise_key_I, slots)
            found += [field[here] for field in fields]
    digest = hashlib.blake2b(digest_size=12)
    for tensor in found:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_truth(config: Config, steps: int) -> Truth:
    """One rank, no workers, from the beginning."""
    with open_loader(config, 0, 1, 0, None) as loader:
        states, found = [json.dumps(loader.state())], []
        for _ in range(steps):
            found.append(row_digests(loader.next_step()))
            states.append(json.dumps(loader.state()))
    return Truth(found, states)


class Tally:
    """What was compared, and what differed."""

    def __init__(self) -> None:
        self.global_batches = 0
        self.states = 0
        self.kills = 0
        self.differences: list[str] = []

    def batch(self, truth: Truth, step: int, rows: Step, what: str) -> None:
        self.global_batches += 1
        if rows != truth.steps[step]:
            self.differences.append(f"{what}: rows of step {step}")

    def state(self, truth: Truth, step: int, state: str, what: str) -> None:
        self.states += 1
        if state != truth.states[step]:
            self.differences.append(f"{what}: state before step {step}")


def run_ranks(
    config: Config,
    truth: Truth,
    tally: Tally,
    chance: random.Random,
    *,
    first: int,
    steps: int,
    world_size: int,
    workers: int,
    state: str,
) -> str:
    """Compare some steps of all ranks of a world, killing a worker of each; returns the state after them."""
    what = f"world size {world_size}, workers {workers}"
    rows: list[Step] = [[""] * ROWS for _ in range(steps)]
    after = state
    for rank in range(world_size):
        with open_loader(config, rank, world_size, workers, state) as loader:
            killed_at = chance.randrange(steps)
            for step in range(steps):
                with _killing(loader, chance, tally) if step == killed_at else contextlib.nullcontext():
                    rows[step][rank::world_size] = row_digests(loader.next_step())
                after = json.dumps(loader.state())
                tally.state(truth, first + step + 1, after, what)
    for step in range(steps):
        tally.batch(truth, first + step, rows[step], what)
    return after


@contextlib.contextmanager
def _killing(loader: Loader, chance: random.Random, tally: Tally) -> Iterator[None]:
    """SIGKILL for one of the loader's workers, some milliseconds into what is done meanwhile."""
    workers = loader._workers
    if not isinstance(workers, ProcessWorkers):
        yield
        return
    process = chance.choice(workers._workers)._process
    timer = threading.Timer(chance.uniform(0, 0.02), process.kill)
    timer.start()
    yield
    timer.join()
    tally.kills += 1


def grid(
    config: Config,
    truth: Truth,
    tally: Tally,
    chance: random.Random,
    world_sizes: Sequence[int] = WORLD_SIZES,
    workers: Sequence[int] = WORKERS,
) -> None:
    for world_size in world_sizes:
        for count in workers:
            first = chance.randrange(len(truth.steps) - GRID_STEPS)
            run_ranks(
                config, truth, tally, chance, first=first, steps=GRID_STEPS,
                world_size=world_size, workers=count, state=truth.states[first],
            )  # fmt: skip


def chain(config: Config, truth: Truth, tally: Tally, chance: random.Random) -> None:
    """From the first step to the last, changing world size and workers on the way."""
    first, state = 0, truth.states[0]
    while first < len(truth.steps):
        steps = min(chance.randint(1, max(2, len(truth.steps) // 6)), len(truth.steps) - first)
        state = run_ranks(
            config, truth, tally, chance, first=first, steps=steps,
            world_size=chance.choice(WORLD_SIZES[:6]), workers=chance.choice(WORKERS[:3]), state=state,
        )  # fmt: skip
        first += steps


def killed_processes(config: Config, truth: Truth, tally: Tally, chance: random.Random, folder: Path) -> int:
    """Two real processes, killed at a random moment, compared and taken up; returns the steps they had done."""
    first = chance.randrange(len(truth.steps) // 2)
    journals = [folder / f"journal-{rank}.jsonl" for rank in range(2)]
    processes = []
    for rank, journal in enumerate(journals):
        journal.unlink(missing_ok=True)
        command = [
            sys.executable, __file__, "--rank", str(rank), "--workers", str(chance.choice(WORKERS[:3])),
            "--folder", str(folder), "--journal", str(journal), "--first", truth.states[first],
            "--steps", str(len(truth.steps) - first),
        ]  # fmt: skip
        processes.append(subprocess.Popen(command))
    wanted, begin = chance.randint(1, 8), time.monotonic()
    while time.monotonic() - begin < LONGEST_WAIT_SECONDS:
        if all(len(read_journal(journal)) >= wanted for journal in journals):
            break
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.05))
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
        tally.kills += 1
    records = [read_journal(journal) for journal in journals]
    done = min(map(len, records))
    if not done:
        tally.differences.append("two processes: not one step was done")
        return 0
    for number in range(done):
        rows = [""] * ROWS
        for rank in range(2):
            rows[rank::2] = records[rank][number]["rows"]
            tally.state(truth, first + number + 1, records[rank][number]["state"], "two processes")
        tally.batch(truth, first + number, rows, "two processes")
    at = first + done
    steps = min(2, len(truth.steps) - at)
    if steps:
        run_ranks(
            config, truth, tally, chance, first=at, steps=steps,
            world_size=chance.choice(WORLD_SIZES[:5]), workers=0, state=records[0][done - 1]["state"],
        )  # fmt: skip
    return done


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """Whole lines: the last one may have been cut by the signal."""
    lines = journal.read_text(encoding="utf-8").split("\n")[:-1] if journal.exists() else []
    return [json.loads(line) for line in lines]


def be_a_rank(options: argparse.Namespace) -> None:
    """One of two processes: rows and state of each step, a line each, until killed or done."""
    torch.set_num_threads(1)
    config = make_config(options.folder)
    with (
        open_loader(config, options.rank, 2, options.workers, options.first) as loader,
        options.journal.open("a", encoding="utf-8") as journal,
    ):
        for _ in range(options.steps):
            rows = row_digests(loader.next_step())
            journal.write(json.dumps({"rows": rows, "state": json.dumps(loader.state())}) + "\n")
            journal.flush()
        # The other end decides when this is over.
        time.sleep(LONGEST_WAIT_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random points")
    parser.add_argument("--steps", type=int, default=60, help="global batches that are compared with")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--killed", type=int, default=8, help="times that two processes are killed")
    parser.add_argument("--out", type=Path, default=RESULT)
    for name, kind in (("rank", int), ("workers", int), ("folder", Path), ("journal", Path), ("first", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        be_a_rank(options)
        return 0
    torch.set_num_threads(1)
    chance, tally, begin = random.Random(options.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(folder)
        truth = find_truth(config, options.steps)
        grid(config, truth, tally, chance)
        print(f"grid: {tally.global_batches} global batches, {tally.kills} kills", flush=True)
        for _ in range(options.chains):
            chain(config, truth, tally, chance)
        print(f"chains: {tally.global_batches} global batches, {tally.kills} kills", flush=True)
        done = [killed_processes(config, truth, tally, chance, folder) for _ in range(options.killed)]
    record = record_head(torch.device("cpu")) | {
        "seed": options.seed,
        "global_batch_size": ROWS,
        "world_sizes": WORLD_SIZES,
        "workers": WORKERS,
        "steps": options.steps,
        "chains": options.chains,
        "steps_done_before_two_processes_were_killed": done,
        "kills": tally.kills,
        "global_batches_compared": tally.global_batches,
        "states_compared": tally.states,
        "largest_state_bytes": max(map(len, truth.states)),
        "distinct_rows": len({row for step in truth.steps for row in step}),
        "differences": tally.differences,
        "seconds": round(time.monotonic() - begin),
    }
    write_json(record, options.out)
    print(
        f"{tally.global_batches} global batches and {tally.states} states compared over {tally.kills} kills:"
    )
    print("\n".join(tally.differences) or "no difference")
    return WRONG if tally.differences else 0


if __name__ == "__main__":
    sys.exit(main())
