"""Runs a grid: every cell and seed an ordinary run folder, made by ordinary commands in processes of their own.

    OUT/cells.jsonl                 one line a finished run: cell, axes, seed, FLOPs, steps, metrics
    OUT/transfusion.s.seed-0/       the run folder; export/, metrics.json and cell.json in it once it is finished

Killed and started again, it goes on: finished runs are kept, a half-trained one continues from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion.checkpoint.export import export
from transfusion.config import Config
from transfusion.config.experiments import SEPARATOR, Cell, Grid
from transfusion.errors import UserError
from transfusion.evaluate.suites.run import METRICS
from transfusion.files import FINGERPRINT_BYTES, atomic_write_text, digest, fingerprint
from transfusion.scaling.cost import cost_of, within

TABLE, RECORD, EXPORT = "cells.jsonl", "cell.json", "export"
# What a cell's record leaves out of its configuration's mark: where it stands.
_PLACES = ("name", "dir")

Say = Callable[[str], None]


# Settings that are younger than the first grids. As by default they change nothing, and these grids go on.
_LATER = {
    "model": ("modality_weights", "attention_bias", "head_dim", "rope_scaling", "tie_embeddings"),
    "diffusion": ("logit_mean", "logit_std", "context"),
    "optimizer": ("name", "ema_half_life"),
    "train": ("freeze",),
    "eval": ("every", "suites"),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a grid: a cell with a seed, in its folder."""

    grid: Grid
    cell: Cell
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    def words(self) -> list[str]:
        """The overrides that make the cell's configuration this run's."""
        return [*self.overrides, f"run.seed={self.seed}", f"run.name={self.name}", f"run.dir={self.folder}"]

    def config(self) -> Config:
        return self.cell.config(self.words())

    def mark(self, config: Config) -> str:
        """Changes with whatever would make another result."""
        values = config.as_dict()
        values["run"] = {key: value for key, value in values["run"].items() if key not in _PLACES}
        defaults = Config().as_dict()
        for section, names in _LATER.items():
            for name in names:
                if values[section].get(name) == defaults[section].get(name):
                    values[section].pop(name, None)
            if not values[section]:
                del values[section]
        if not values["modalities"]:
            del values["modalities"]
        return fingerprint([values, self.cell.flops, self.grid.suites, _digest(self.grid.classifier)])


def jobs_of(grid: Grid, out: Path, *, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> list[Job]:
    """All runs of a grid, or those of the cells in `only`, seed after seed. Every configuration is checked.

    Seeds come last, so that a grid that is stopped early has seen each cell. Raises UserError.
    """
    cells = [grid.cell(name) for name in only] if only else list(grid.cells)
    jobs = [
        Job(grid, cell, seed, out / f"{cell.name.replace('/', '.')}.seed-{seed}", tuple(overrides))
        for seed in grid.seeds
        for cell in cells
    ]
    for job in jobs:
        record = _record(job)
        if record is not None and record["mark"] != job.mark(job.config()):
            raise UserError(
                f"{job.folder} holds another configuration than {job.cell.name} of {grid.path} now; name another"
                " --out, or delete it"
            )
    return jobs


def run_grid(
    jobs: Sequence[Job], out: Path, *, processes: int = 1, launcher: str = "", say: Say = print
) -> list[str]:
    """Train, export and measure all that is not there yet, `processes` at a time; returns the names that failed.

    launcher: the command that starts a training, such as `torchrun --nproc-per-node 8 -m transfusion`.
    """
    failed = []
    out.mkdir(parents=True, exist_ok=True)
    with _ended_by_signals(), ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(_run, job, launcher, say): job for job in jobs if _record(job) is None}
        try:
            for future in as_completed(running):
                job = running[future]
                try:
                    say(f"{job.name}: {future.result()}")
                except UserError as error:
                    failed.append(job.name)
                    say(f"{job.name}: {error}")
                write_table(out)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    write_table(out)
    return failed


# Commands that run now. A grid that is told to end tells them, and trainings save before they do.
_running: set[subprocess.Popen[bytes]] = set()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the running commands too, and then the grid. Only in the main thread."""

    def end(number: int, _: object) -> None:
        for command in list(_running):
            command.send_signal(signal.SIGTERM)
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def write_table(out: Path) -> None:
    """Gather the records of all finished runs into OUT/cells.jsonl, in the grid's order."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob(f"*/{RECORD}")]
    records.sort(key=lambda record: (record["place"], record["seed"]))
    atomic_write_text(out / TABLE, "".join(json.dumps(record) + "\n" for record in records))


def _digest(classifier: str) -> str:
    """Of the bytes of the grid's classifier; empty where there is none (yet)."""
    path = Path(classifier)
    return digest(path.read_bytes(), FINGERPRINT_BYTES) if path.is_file() else ""


def _record(job: Job) -> dict[str, Any] | None:
    path = job.folder / RECORD
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _run(job: Job, launcher: str, say: Say) -> str:
    """One run from wherever it stands to its record; returns a line that sums it up."""
    begin = time.monotonic()
    config = job.config()
    cost = cost_of(config)
    if job.cell.flops is not None:
        cost = within(cost, job.cell.flops)
    job.folder.mkdir(parents=True, exist_ok=True)
    say(
        f"{job.name}: {cost.steps} steps of {cost.step_flops:.3g} FLOPs, {cost.parameters / 1e6:.2f} M parameters"
    )
    here = shlex.join([sys.executable, "-m", "transfusion"])
    words = [f"{job.grid.path}{SEPARATOR}{job.cell.name}", *job.words(), f"train.steps={cost.steps}"]
    _call(job, [*shlex.split(launcher or here), "train", *words])
    trained = time.monotonic() - begin
    model = export(job.folder, job.folder / EXPORT)
    details: dict[str, Any] = {}
    if job.grid.suites:
        options = [word for suite in job.grid.suites for word in ("--suite", suite)]
        if job.grid.classifier:
            options += ["--classifier", job.grid.classifier]
        _call(job, [*shlex.split(here), "eval", str(model), *options, "--out", str(job.folder)])
        details = json.loads((job.folder / METRICS).read_text(encoding="utf-8"))["details"]
    seconds = time.monotonic() - begin
    record = {
        "cell": job.cell.name,
        "axes": job.cell.values,
        "place": job.cell.place,
        "seed": job.seed,
        "run": job.name,
        "mark": job.mark(config),
        "flops": cost.flops,
        "steps": cost.steps,
        "parameters": cost.parameters,
        "metrics": {name: detail["value"] for name, detail in details.items()},
        "higher_is_better": {name: detail["higher_is_better"] for name, detail in details.items()},
        "train_seconds": round(trained, 1),
        "seconds": round(seconds, 1),
    }
    atomic_write_text(job.folder / RECORD, json.dumps(record, indent=1) + "\n")
    figures = ", ".join(f"{name} {detail['value']:.4g}" for name, detail in details.items())
    return f"done in {seconds:.0f} s; {figures}"


def _call(job: Job, command: Sequence[str]) -> None:
    """Run a command with its output in the run's log. Raises UserError with its last line where it fails."""
    log = job.folder / "grid.log"
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
            _running.add(process)
            code = process.wait()
            _running.discard(process)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise UserError(f"exit code {code}, see {log}: {lines[-1][:300] if lines else 'no output'}")
