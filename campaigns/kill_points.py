"""Kills, freezes and starves training runs, lets the same command go on, and compares with a run left in peace.

    .venv/bin/python campaigns/kill_points.py [--only NAME,...] [--points 20] [--out FILE]

A tiny network on the handwritten digits, two processes over gloo under ZeRO-3; the random points in one process. After
each blow every checkpoint that counts as saved is read and its digests compared, then the run goes on to its end: the
figures of all steps must be those of the undisturbed run, bit for bit at the same number of processes. Scenarios that
are named with --only replace their own entries of the record, so the campaign can be run in parts. Exits with 3 when
one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "kill-points.json"
STEPS = 9
SETTINGS = (
    "codec.channels=1", "codec.image_size=8", "model.layers=2", "model.hidden_size=64", "model.heads=2",
    "data.tokenizer=tokenizer.model", "data.sources=[{name: digits, shards: digits/train/*.tar}]",
    "data.validation=[{name: digits, shards: digits/validation/*.tar}]", "data.sequence_length=128",
    "data.global_batch_size=4", "data.micro_batch_size=0",
    "optimizer.warmup_steps=2", "optimizer.learning_rate=0.003", "optimizer.ema_decay=0.9",
    f"train.steps={STEPS}", "train.precision=fp32", "train.threads=1", "train.zero.persistence_threshold=0",
    "checkpoint.every=3", "log.every=1",
)  # fmt: skip
# Of the random points, so that most of them fall between the start and the end.
LONGER = ("train.steps=120", "checkpoint.every=7")
COMPARED = ("loss", "text_loss", "image_loss", "image_loss_by_timestep", "gradient_norm", "tokens", "images")
# A lost rank must have ended the others by then.
MAX_SECONDS = 120.0
# From a signal amid validation losses to the end of all processes, the launcher's own end included.
MAX_STOP = 10.0
# Of other numbers of processes, where sums are rounded in another order.
CLOSE = 1e-4
# More than the first line of metrics, less than a rank's part of a checkpoint.
FULL_DISK_BYTES = 100_000


@dataclass
class Outcome:
    """What became of a command. seconds_after: from the blow to the end of every process."""

    code: int
    printed: str
    seconds_after: float


class Place:
    """A folder with prepared digits, in which runs are started as a user would start them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._straight: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}

    def prepare(self) -> None:
        """The digits and a tokenizer."""
        transfusion = [sys.executable, "-m", "transfusion"]
        self._call([*transfusion, "prepare", "digits", "--out", "digits"])
        tokenizer = [
            "tokenizer",
            "train",
            "digits/train/*.tar",
            "--out",
            "tokenizer.model",
            "--vocabulary",
            "320",
        ]
        self._call([*transfusion, *tokenizer])

    def start(self, run: str, ranks: int, blow: str = "none", *more: str) -> subprocess.Popen[str]:
        """Start a run; `blow` is what its ranks do to themselves."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *(launcher if ranks > 1 else []), __file__, "--as-rank", blow]
        config = ROOT / "configs" / "train" / "own-data.yaml"
        arguments = ["train", str(config), f"run.dir=runs/{run}", *SETTINGS, *more]
        return subprocess.Popen(
            [*command, *arguments], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def run(self, run: str, ranks: int, blow: str = "none", *more: str) -> Outcome:
        """Start a run and wait for the end of all its processes."""
        return self.end_of(self.start(run, ranks, blow, *more), run)

    def end_of(self, process: subprocess.Popen[str], run: str) -> Outcome:
        printed, _ = process.communicate(timeout=400)
        mark = self.folder / "runs" / run / "blow"
        struck = mark.stat().st_mtime if mark.exists() else time.time()
        return Outcome(process.returncode, printed, time.time() - struck)

    def figures(self, run: str) -> list[tuple[Any, ...]]:
        """What each step measured, time and speed left out."""
        from transfusion.observe.metrics import read_metrics

        lines = read_metrics(self.folder / "runs" / run / "metrics.jsonl")
        return [tuple(line[name] for name in COMPARED) for line in lines]

    def straight(self, ranks: int, *more: str) -> list[tuple[Any, ...]]:
        """The figures of the undisturbed run."""
        key = (ranks, *more)
        if key not in self._straight:
            run = f"straight-{len(self._straight)}"
            require(self.run(run, ranks, "none", *more).code == 0, "the undisturbed run ends with 0")
            self._straight[key] = self.figures(run)
        return self._straight[key]

    def check_published(self, run: str) -> list[str]:
        """Read every checkpoint that counts as saved; the names of their folders."""
        from transfusion.checkpoint import layout

        folder = self.folder / "runs" / run
        complete = layout.complete_checkpoints(folder)
        for checkpoint in complete:
            for name, record in layout.read_manifest(checkpoint).files.items():
                layout.check_file(checkpoint, name, record)
        latest = layout.checkpoints_folder(folder) / layout.LATEST
        if latest.exists():
            require(
                latest.read_text().strip() in [path.name for path in complete], "latest names a whole one"
            )
        return [path.name for path in complete]

    def goes_on(self, run: str, ranks: int, *more: str) -> dict[str, Any]:
        """Nothing is torn; the same command, with `more`, ends well, with the figures of the undisturbed run."""
        found = self.check_published(run)
        ended = self.run(run, ranks, "none", *more)
        require(ended.code == 0, f"the same command ends with 0: {ended.printed[-2000:]}")
        require(
            self.figures(run) == self.straight(ranks, *more), "the figures are those of the undisturbed run"
        )
        self.check_published(run)
        return {"published_at_the_blow": found}

    def _call(self, command: list[str]) -> None:
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)


class ClaimError(Exception):
    """A scenario's claim that did not hold."""


def require(holds: bool, claim: str) -> None:
    if not holds:
        raise ClaimError(claim)


def one_rank(place: Place) -> dict[str, Any]:
    """kill -9 of the second rank in the forward pass of step 5."""
    ended = place.run("one-rank", 2, "one rank")
    require(ended.code != 0 and ended.seconds_after < MAX_SECONDS, "the other rank ends in time")
    return {"seconds_to_end": round(ended.seconds_after, 1), **place.goes_on("one-rank", 2)}


def all_ranks(place: Place) -> dict[str, Any]:
    """kill -9 of both ranks before the update of step 6."""
    ended = place.run("all-ranks", 2, "all ranks")
    require(ended.code != 0, "the launcher tells it")
    return place.goes_on("all-ranks", 2)


def save(place: Place) -> dict[str, Any]:
    """kill -9 of the main process when all is written but the folder has not its name yet."""
    place.run("save", 2, "save")
    require(any((place.folder / "runs/save/checkpoints").glob("*.tmp")), "it was killed while saving")
    return place.goes_on("save", 2)


def half_a_file(place: Place) -> dict[str, Any]:
    """kill -9 of the second rank with half of its file written."""
    place.run("half", 2, "half a file")
    require(any((place.folder / "runs/half/checkpoints").glob("*.tmp")), "it was killed while saving")
    return place.goes_on("half", 2)


def evaluation(place: Place) -> dict[str, Any]:
    """kill -9 of the second rank amid the validation losses of step 6."""
    place.run("evaluation", 2, "evaluation")
    require(len(place.figures("evaluation")) == 6, "the line of step 6 was written before")
    found = place.goes_on("evaluation", 2)
    metrics = (place.folder / "runs/evaluation/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    validated = [line["step"] for line in map(json.loads, metrics) if "validation_text_loss" in line]
    require(validated == [3, 6, 9], "what was left out is measured by the next start")
    return found


def stop_amid_validation(place: Place) -> dict[str, Any]:
    """SIGTERM to both ranks amid the validation losses of step 3, over far more documents than a stop may wait for."""
    sources = ", ".join(
        f"{{name: digits{number}, shards: digits/{part}/*.tar}}"
        for number, part in enumerate(["validation", *["train"] * 20])
    )
    more = (f"data.validation=[{sources}]", "data.validation_limit=0")
    ended = place.run("stop", 2, "stop amid validation", *more)
    require("stopped at step 3 after saving" in ended.printed, f"it stops: {ended.printed[-2000:]}")
    require("step_00000003" in place.check_published("stop"), "the step is saved")
    require(ended.seconds_after < MAX_STOP, f"within {MAX_STOP:.0f} s, not {ended.seconds_after:.1f}")
    require(len(place.figures("stop")) == 3, "its line is written")
    return {"seconds_to_end": round(ended.seconds_after, 1), **place.goes_on("stop", 2)}


def full_disk(place: Place) -> dict[str, Any]:
    """The second rank cannot write more than a tenth of a megabyte into a file, as on a full disk."""
    ended = place.run("full-disk", 2, "full disk")
    line = [text for text in ended.printed.splitlines() if text.startswith("transfusion: ")]
    require(ended.code != 0 and "free space or set another run.dir" in "".join(line), "the remedy is told")
    require(not any((place.folder / "runs/full-disk/checkpoints").glob("step_*")), "and no part is left")
    return {"told": line[0], **place.goes_on("full-disk", 2)}


def sigterm(place: Place) -> dict[str, Any]:
    """SIGTERM to the second rank in step 5: all save and end with 75."""
    ended = place.run("sigterm", 2, "sigterm 5")
    require("stopped at step 5 after saving" in ended.printed, "stopped after saving")
    require("exitcode  : 75" in ended.printed or "exitcode: 75" in ended.printed, "with code 75")
    require("step_00000005" in place.check_published("sigterm"), "the stop is a checkpoint")
    return place.goes_on("sigterm", 2)


def frozen_rank(place: Place, *more: str) -> dict[str, Any]:
    """SIGSTOP to the second rank in step 5: the first leaves stacks, samples and collectives, and ends."""
    ended = place.run("frozen", 2, "frozen rank", *more)
    require(ended.code != 0, "the first rank ended")
    told = place.folder / "runs/frozen/stalls/rank_00000.txt"
    struck = (place.folder / "runs/frozen/blow").stat().st_mtime
    text = told.read_text(encoding="utf-8")
    require(
        "another rank is late or gone" in text and "row 0: digits " in text, "it tells why, and the samples"
    )
    require(
        "trainer.py" in text and told.with_suffix(".json").exists(), "with stacks and the flight recorder"
    )
    require("rank 0 ends: it waited for another rank" in ended.printed, "and ends itself")
    ended_after = (place.folder / "runs/frozen/ended").stat().st_mtime - struck
    require(ended_after < MAX_SECONDS, f"within two minutes, not {ended_after:.0f} s")
    seconds = {
        "seconds_to_files": round(told.stat().st_mtime - struck, 1),
        "seconds_to_end": round(ended_after, 1),
    }
    return {**seconds, **place.goes_on("frozen", 2)}


def nan(place: Place) -> dict[str, Any]:
    """The second rank's loss is NaN in step 5: left out on both, counted, and the run goes on."""
    from transfusion.observe.metrics import read_metrics

    ended = place.run("nan", 2, "nan")
    require(ended.code == 0, "the run ends well")
    lines = read_metrics(place.folder / "runs/nan/metrics.jsonl")
    require([line["skipped"] for line in lines] == [0] * 4 + [1] * 5, "one step is skipped, and counted")
    require([line["loss"] is None for line in lines] == [step == 4 for step in range(STEPS)], "and told")
    require(place.figures("nan")[:4] == place.straight(2)[:4], "the steps before are as they were")
    return {"skipped": 1}


def other_worlds(place: Place) -> dict[str, Any]:
    """Two processes to step 3, one to step 6, four to the end."""
    for ranks, stop in ((2, 3), (1, 6)):
        ended = place.run("worlds", ranks, f"sigterm {stop}")
        require(
            f"stopped at step {stop} after saving" in ended.printed, f"{ranks} stop: {ended.printed[-2000:]}"
        )
    require(place.run("worlds", 4).code == 0, "four end well")
    pairs = zip(place.figures("worlds"), place.straight(2), strict=True)
    worst = max(abs(mine[0] / wanted[0] - 1) for mine, wanted in pairs)
    require(worst < CLOSE, f"losses within {CLOSE}, got {worst}")
    return {"greatest_relative_difference_of_losses": worst}


def random_points(place: Place, points: int) -> dict[str, Any]:
    """kill -9 at moments drawn over the whole of a longer run, its start included; one process."""
    begin = time.monotonic()
    place.straight(1, *LONGER)
    whole = time.monotonic() - begin
    draw = random.Random(0)
    reached = []
    for number in range(points):
        run = f"random-{number}"
        process = place.start(run, 1, "none", *LONGER)
        time.sleep(draw.uniform(0.0, whole))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        reached.append(len(place.figures(run)))
        place.goes_on(run, 1, *LONGER)
    return {"points": points, "steps_reached": reached}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "one rank": one_rank,
    "all ranks": all_ranks,
    "save": save,
    "half a file": half_a_file,
    "evaluation": evaluation,
    "stop amid validation": stop_amid_validation,
    "full disk": full_disk,
    "sigterm": sigterm,
    "frozen rank": frozen_rank,
    "nan": nan,
    "other worlds": other_worlds,
}
RANDOM = "random points"


def strike(kind: signal.Signals) -> None:
    """Note the moment for the campaign, then send this process a signal."""
    run = next(part.partition("=")[2] for part in sys.argv if part.startswith("run.dir="))
    (Path(run) / "blow").touch()
    os.kill(os.getpid(), kind)


def as_rank(blow: str, arguments: list[str]) -> None:
    """Be one process of a run: `transfusion ARGUMENTS`, with a blow laid where it is to fall."""
    import transfusion.training.trainer as trainer
    from transfusion.checkpoint import save as saving
    from transfusion.cli import main
    from transfusion.training import reporting, watchdog

    rank = int(os.environ.get("RANK", 0))
    step = trainer.Trainer.train_step
    kind, _, number = blow.partition(" ")

    def at(wanted: int, hits: Callable[[], bool], does: Callable[[], None]) -> None:
        def struck(self: trainer.Trainer) -> None:
            if self.state.step + 1 == wanted and hits():
                does()
            step(self)

        trainer.Trainer.train_step = struck  # type: ignore[method-assign]

    def second() -> bool:
        return rank == 1

    if blow == "one rank":
        at(5, second, lambda: in_forward(lambda: strike(signal.SIGKILL)))
    elif blow == "all ranks":
        at(6, lambda: True, lambda: in_forward(lambda: strike(signal.SIGKILL)))
    elif blow == "nan":
        at(5, second, lambda: in_forward(None))
    elif kind == "sigterm":
        at(
            int(number),
            lambda: rank == int(os.environ.get("WORLD_SIZE", 1)) - 1,
            lambda: strike(signal.SIGTERM),
        )
    elif blow == "frozen rank":
        at(5, second, lambda: strike(signal.SIGSTOP))
        leave = os._exit

        def end(code: int) -> None:
            (Path(next(a for a in arguments if a.startswith("run.dir="))[8:]) / "ended").touch()
            leave(code)

        watchdog.Watchdog.__init__.__kwdefaults__["end"] = end  # type: ignore[index]
    elif blow == "save":
        saving.replace_folder = lambda *_: strike(signal.SIGKILL)
    elif blow == "half a file" and second():
        write = saving.write_tensors

        def half(path: Path, shapes: Any, read: Any, **more: Any) -> Any:
            names = list(shapes)

            def until(name: str) -> Any:
                if name == names[len(names) // 2]:
                    strike(signal.SIGKILL)
                return read(name)

            return write(path, shapes, until, **more)

        saving.write_tensors = half
    elif blow == "evaluation" and second():
        losses = reporting.validation_losses
        times = iter(range(2))

        def amid(*given: Any) -> Any:
            if next(times) == 1:
                in_forward(lambda: strike(signal.SIGKILL))
            return losses(*given)

        reporting.validation_losses = amid
    elif blow == "stop amid validation":
        show = reporting.Reporter._doing

        def doing(self: reporting.Reporter, what: str) -> None:
            show(self, what)
            if what.startswith("validation 5/"):
                strike(signal.SIGTERM)

        reporting.Reporter._doing = doing  # type: ignore[method-assign]
    elif blow == "full disk" and second():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, FULL_DISK_BYTES))
    sys.argv = ["transfusion", *arguments]
    main.main()


def in_forward(does: Callable[[], None] | None) -> None:
    """Do it when the next loss of this process is computed; None: make that loss NaN."""
    from transfusion.losses.transfusion import TransfusionLoss

    honest = TransfusionLoss.terms

    def terms(self: TransfusionLoss, model: Any, batch: Any) -> Any:
        TransfusionLoss.terms = honest  # type: ignore[method-assign]
        found = honest(self, model, batch)
        if does is not None:
            does()
            return found
        return replace(found, sums={name: total * float("nan") for name, total in found.sums.items()})

    TransfusionLoss.terms = terms  # type: ignore[method-assign]


def campaign(place: Place, names: list[str], points: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each scenario's name and what it found."""
    for name in names:
        begin = time.monotonic()
        try:
            found = random_points(place, points) if name == RANDOM else SCENARIOS[name](place)
            result = {"passed": True, **found}
        except ClaimError as failed:
            result = {"passed": False, "failed": str(failed)}
        yield name, {**result, "seconds": round(time.monotonic() - begin, 1)}


def main() -> int:
    if sys.argv[1:2] == ["--as-rank"]:
        as_rank(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*SCENARIOS, RANDOM]
    parser.add_argument("--only", default=",".join(every), help="scenarios, with commas between")
    parser.add_argument("--points", type=int, default=20, help="random points")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from limits import find_device, record_head, write_json

    names = given.only.split(",")
    if unknown := sorted(set(names) - set(every)):
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(every)}")
    record = json.loads(given.out.read_text()) if given.out.exists() else {"scenarios": {}}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        place.prepare()
        for name, found in campaign(place, names, given.points):
            print(f"{name:14} {'passed' if found['passed'] else 'FAILED'}  {found}", flush=True)
            record["scenarios"][name] = found
            record = {"environment": record_head(find_device("auto")), "scenarios": record["scenarios"]}
            write_json(record, given.out)
    return 0 if all(record["scenarios"][name]["passed"] for name in names) else 3


if __name__ == "__main__":
    sys.exit(main())
