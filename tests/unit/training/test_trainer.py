"""The training loop in one process, on real digits: skipped steps, and lines that survive a kill."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "dist"))
from handmade import HostReads

from transfusion.config import Config
from transfusion.data.index.source_index import SourceIndex
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.data.prepare.prepare import prepare
from transfusion.errors import UserError
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.observe.clock import TimeLimit
from transfusion.observe.console import start_logging
from transfusion.observe.metrics import read_metrics
from transfusion.optim import groups
from transfusion.parallel import collectives
from transfusion.parallel.environment import Environment
from transfusion.schema import Batch, Decision, LossTerms
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.training.reporting import Reporter
from transfusion.training.trainer import Trainer

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
# Of a line of metrics, all but time and speed.
TIMED = {"time", "attempt", "tokens_per_second", "data_wait", "memory_gib", "gemm_share"}


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare("digits", folder / "digits")
    return folder / "digits" / "validation"


@pytest.fixture
def build_config(digits: Path, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Callable[..., Config]]:
    """build_config(run, steps=..., log=..., checkpoint=...) -> Config of a tiny run in a folder of its own."""

    def build(
        run: str,
        *,
        steps: int,
        log: int = 1,
        checkpoint: int = 100,
        telemetry: dict[str, Any] | None = None,
        **train: Any,
    ) -> Config:
        return Config.model_validate(
            {
                "run": {"dir": str(tmp_path / run)},
                "model": {"layers": 1, "hidden_size": 32, "heads": 2},
                "codec": {"channels": 1, "image_size": 8},
                "data": {
                    "tokenizer": str(tokenizer.path),
                    "sources": [{"name": "digits", "shards": f"{digits}/*.tar"}],
                    "sequence_length": 64,
                    "global_batch_size": 4,
                    "micro_batch_size": 2,
                },
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.5},
                "train": {"steps": steps, "precision": "fp32", "engine": "local", "threads": 1, **train},
                # Waited for, so that a kill in a later step always finds it.
                "checkpoint": {"every": checkpoint, "asynchronous": False},
                "log": {"every": log, **(telemetry or {})},
            }
        )

    yield build
    start_logging(None)


def run(config: Config) -> int:
    """A whole run, as `train` makes it; its folder is free again afterwards."""
    trainer = Trainer(config, ALONE)
    try:
        return trainer.run()
    finally:
        trainer.lock.close()


def lines(config: Config) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.run.folder) / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMED} for line in found]


def scaled(terms: LossTerms, **factors: float) -> LossTerms:
    """The terms with some of their sums times a number."""
    return replace(terms, sums={name: total * factors.get(name, 1.0) for name, total in terms.sums.items()})


def dies_at(micro_batch: int) -> Callable[[int, LossTerms], LossTerms]:
    """The process ends in this micro-batch."""

    def change(number: int, terms: LossTerms) -> LossTerms:
        if number == micro_batch:
            raise Killed
        return terms

    return change


def spoilt_at(*steps: int) -> Callable[[int, LossTerms], LossTerms]:
    """The losses of these steps, two micro-batches each, are not finite."""
    return lambda number, terms: scaled(terms, text=math.nan) if (number + 1) // 2 in steps else terms


def interfere(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, LossTerms], LossTerms]
) -> Callable[[], None]:
    """Let `change` see the number of each micro-batch from now on and replace its losses; returns the undoing."""
    honest = TransfusionLoss.terms
    micro_batches = 0

    def terms(self: TransfusionLoss, model: Any, batch: Batch) -> LossTerms:
        nonlocal micro_batches
        micro_batches += 1
        return change(micro_batches, honest(self, model, batch))

    monkeypatch.setattr(TransfusionLoss, "terms", terms)
    return lambda: monkeypatch.setattr(TransfusionLoss, "terms", honest)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_step_is_skipped_counted_and_left_behind(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, broken: float
) -> None:
    """The second micro-batch of step 3 has no finite loss: no update, one more skipped, and training goes on."""
    config = build_config("broken", steps=6)
    interfere(
        monkeypatch,
        lambda number, terms: scaled(terms, text=broken) if number == 6 else terms,
    )
    trainer = Trainer(config, ALONE)
    weights: list[torch.Tensor] = []
    step = trainer.engine.step

    def watched(learning_rate: float, **asked: Any) -> Any:
        result = step(learning_rate, **asked)
        weights.append(torch.cat([shard.values["weight"].clone() for shard in trainer.engine.shards()]))
        return result

    monkeypatch.setattr(trainer.engine, "step", watched)
    try:
        assert trainer.run() == 0
    finally:
        trainer.lock.close()
    found = lines(config)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["skipped"] for line in found] == [0, 0, 1, 1, 1, 1]
    assert [line["loss"] is None for line in found] == [False, False, True, False, False, False]
    assert [line["gradient_norm"] is None for line in found] == [False, False, True, False, False, False]
    assert [line["tokens"] for line in found] == [256 * step for step in range(1, 7)]
    unchanged = [torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert unchanged == [False, True, False, False, False]
    assert found[-1]["loss"] < found[0]["loss"] and weights[-1].isfinite().all()


def test_a_step_between_logs_reads_nothing_and_is_settled_late(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: steps 3 and 6 of 7 are not finite, which is counted when it is read, at the latest at a log."""
    monkeypatch.setattr(groups, "runs_fused", lambda device: True)
    places: list[str] = []
    honest = Trainer.train_step

    def watched(self: Trainer) -> Any:
        # Read, and counted, while still on the host.
        batches = self._next_step()
        with monkeypatch.context() as patch, HostReads() as reads:
            patch.setattr(self, "_next_step", lambda: batches)
            result = honest(self)
        places.extend(reads.places)
        return result

    found = []
    for late in (0, 1):
        config = build_config(f"late {late}", steps=7, log=3)
        undo = interfere(monkeypatch, spoilt_at(3, 6))
        trainer = Trainer(config, ALONE)
        trainer.recovery.steps_late = late
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", watched)
            try:
                assert trainer.run() == 0
            finally:
                trainer.lock.close()
        undo()
        found.append(lines(config))
    assert places == []
    assert found[0] == found[1]
    assert [(line["step"], line["skipped"]) for line in found[0]] == [(3, 1), (6, 2), (7, 2)]


def test_a_skipped_step_stays_counted_after_a_resume(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = interfere(
        monkeypatch,
        lambda number, terms: scaled(terms, image=math.inf) if number == 3 else terms,
    )
    assert run(build_config("resumed", steps=3)) == 0
    undo()
    config = build_config("resumed", steps=5)
    assert run(config) == 0
    assert [line["skipped"] for line in lines(config)] == [0, 1, 1, 1, 1]


def test_too_many_bad_samples_end_the_run(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than a hundred samples are judged as if they were a hundred."""
    read = SourceIndex.read_image
    monkeypatch.setattr(
        SourceIndex,
        "read_image",
        lambda self, sample, *rest: b"torn" if sample % 5 == 0 else read(self, sample),
    )
    config = build_config("bad", steps=1000)
    with pytest.raises(
        UserError, match=r"could not be read, more than data\.max_bad_fraction \(0\.05\)"
    ) as refused:
        run(config)
    faults, samples = (int(number) for number in re.findall(r"\d+", str(refused.value))[:2])
    found = lines(config)
    assert faults > 0.05 * max(samples, 100) and len(found) > 1
    assert found[-1]["faults"] <= 0.05 * max(samples, 100)
    monkeypatch.setattr(SourceIndex, "read_image", read)
    again = build_config("good", steps=2)
    assert run(again) == 0 and lines(again)[-1]["faults"] == 0


def test_a_run_killed_between_lines_writes_the_same_lines(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """N11: lines average over steps since the one before, also those a resumed run has to do again.

    Lines at steps 3, 5 (a checkpoint), 6, 9, 10 (a checkpoint) and 12; killed in step 8, after the line of 6.
    """
    settings = {"steps": 12, "log": 3, "checkpoint": 5}
    straight, killed = build_config("straight", **settings), build_config("killed", **settings)
    seen: list[LossTerms] = []

    def remember(_: int, terms: LossTerms) -> LossTerms:
        seen.append(terms.detached())
        return terms

    undo = interfere(monkeypatch, remember)
    assert run(straight) == 0
    undo()
    ends = itertools.pairwise([0, 3, 5, 6, 9, 10, 12])
    for line, (first, last) in zip(lines(straight), ends, strict=True):
        # Two micro-batches a step.
        part = seen[2 * first : 2 * last]
        text = sum(terms.sums["text"] for terms in part) / sum(terms.counts["text"] for terms in part)
        image = sum(terms.sums["image"] for terms in part) / sum(terms.counts["image"] for terms in part)
        assert line["text_loss"] == pytest.approx(text.item(), rel=1e-5)
        assert line["image_loss"] == pytest.approx(image.item(), rel=1e-5)

    undo = interfere(monkeypatch, dies_at(16))
    with pytest.raises(Killed):
        run(killed)
    undo()
    assert [line["step"] for line in lines(killed)] == [3, 5, 6]
    assert run(killed) == 0
    assert [line["step"] for line in lines(killed)] == [3, 5, 6, 9, 10, 12]
    assert lines(killed) == lines(straight)
    first, second = (
        Path(config.run.folder) / "checkpoints" / "step_00000012" / "rank_00000.safetensors"
        for config in (killed, straight)
    )
    assert first.read_bytes() == second.read_bytes()


def spoilt(first: int, last: int, factor: float) -> Callable[[int, LossTerms], LossTerms]:
    """Losses of steps `first` to `last` times `factor`; there are two micro-batches a step."""

    def change(number: int, terms: LossTerms) -> LossTerms:
        if not 2 * first - 1 <= number <= 2 * last:
            return terms
        return scaled(terms, text=factor, image=factor)

    return change


def first_weight(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step_{step:08d}" / "rank_00000.safetensors").read_bytes()


def test_spikes_are_skipped_and_a_kill_changes_nothing(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 8 has ten times the loss of those before: left out and counted, and by a resumed run just so."""
    settings = {"steps": 10, "checkpoint": 5, "spike_factor": 4.0, "spike_window": 4}
    straight, killed, blind = (build_config(name, **settings) for name in ("straight", "killed", "blind"))
    blind = blind.model_copy(update={"train": blind.train.model_copy(update={"spike_factor": 0.0})})
    found = {}
    for config in (straight, blind):
        undo = interfere(monkeypatch, spoilt(8, 8, 10.0))
        assert run(config) == 0
        undo()
        found[config.run.dir] = lines(config)
    skipped = [line["skipped"] for line in found[straight.run.dir]]
    assert skipped == [0] * 7 + [1] * 3
    assert found[straight.run.dir][7]["gradient_norm"] > 4 * found[straight.run.dir][6]["gradient_norm"]
    assert [line["skipped"] for line in found[blind.run.dir]] == [0] * 10
    assert first_weight(Path(straight.run.dir), 10) != first_weight(Path(blind.run.dir), 10)

    undo = interfere(monkeypatch, dies_at(2 * 8 - 1))
    with pytest.raises(Killed):
        run(killed)
    undo()
    # Micro-batches are counted from the checkpoint of step 5 on.
    interfere(monkeypatch, spoilt(3, 3, 10.0))
    assert run(killed) == 0
    assert lines(killed) == found[straight.run.dir]


def test_bad_steps_in_a_row_bring_back_a_checkpoint_and_the_data_go_on(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 6 to 8 are not finite. The weights of step 5, changed meanwhile to show it, come back after the third.

    Every step is saved, two are kept: what is saved amid skipped steps is passed over, and pushes nothing out.
    """
    config = build_config("back", steps=10, checkpoint=1, rollback_after_skipped=3)
    interfere(monkeypatch, spoilt(6, 8, float("nan")))
    trainer = Trainer(config, ALONE)
    weights, step = {}, trainer.engine.step

    def watched(learning_rate: float, **asked: Any) -> Any:
        result = step(learning_rate, **asked)
        if trainer.state.step + 1 == 7:
            for shard in trainer.engine.shards():
                shard.values["weight"].mul_(2.0)
        return result

    saved = trainer.reporter.line

    def noted(*arguments: Any, **named: Any) -> None:
        weights[trainer.state.step] = torch.cat([s.values["weight"].clone() for s in trainer.engine.shards()])
        saved(*arguments, **named)

    monkeypatch.setattr(trainer.engine, "step", watched)
    monkeypatch.setattr(trainer.reporter, "line", noted)
    try:
        assert trainer.run() == 0
    finally:
        trainer.lock.close()
    found = lines(config)
    assert [line["step"] for line in found] == list(range(1, 11))
    assert [line["skipped"] for line in found] == [0] * 5 + [1, 2, 3, 3, 3]
    assert [line["roll_backs"] for line in found] == [0] * 7 + [1, 1, 1]
    assert torch.equal(weights[8], weights[5]) and not torch.equal(weights[7], weights[5])
    assert found[-1]["tokens"] == 256 * 10 and found[-1]["loss"] is not None
    kept = sorted(path.name for path in (Path(config.run.folder) / "checkpoints").glob("step_*"))
    assert kept == ["step_00000009", "step_00000010"]


def test_a_run_that_no_checkpoint_helps_ends_with_the_remedy(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config("helpless", steps=20, checkpoint=5, rollback_after_skipped=2)
    undo = interfere(monkeypatch, spoilt(7, 99, float("inf")))
    with pytest.raises(UserError, match=r"steps 7 to 10 were all skipped.*optimizer\.learning_rate"):
        run(config)
    undo()
    assert [line["roll_backs"] for line in lines(config)][-3:] == [0, 1, 1]
    early = build_config("early", steps=20, checkpoint=50, rollback_after_skipped=2)
    interfere(monkeypatch, spoilt(1, 99, float("inf")))
    with pytest.raises(UserError, match="no checkpoint from before them is left"):
        run(early)


def test_the_time_limit_saves_and_stops(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour a step, ten hours: the eighth hour leaves no room for another step and a save."""
    config = build_config("limited", steps=20, time_limit_minutes=600.0)
    trainer = Trainer(config, ALONE)
    hours = itertools.count()
    trainer.limit = TimeLimit(600.0, now=lambda: 3600.0 * next(hours) / 2)
    try:
        assert trainer.run() == 75
    finally:
        trainer.lock.close()
    stopped = lines(config)[-1]["step"]
    assert 1 < stopped < 10 and first_weight(Path(config.run.folder), stopped)
    unlimited = build_config("limited", steps=stopped + 2)
    assert run(unlimited) == 0 and lines(unlimited)[-1]["step"] == stopped + 2


def test_a_signal_saves_and_goes_on(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config("asked", steps=6)

    def ask(number: int, terms: LossTerms) -> LossTerms:
        if number == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        return terms

    interfere(monkeypatch, ask)
    assert run(config) == 0
    steps = sorted(path.name for path in (Path(config.run.folder) / "checkpoints").glob("step_*"))
    assert steps == ["step_00000003", "step_00000006"]


def measured_config(build_config: Callable[..., Config], digits: Path, run: str, steps: int) -> Config:
    """Of a run that saves, measures six batches, draws a grid and runs two suites after every second step."""
    config = build_config(run, steps=steps, checkpoint=2)
    suites = Path(config.run.folder).with_suffix(".suites.yaml")
    suites.parent.mkdir(parents=True, exist_ok=True)
    suites.write_text(
        "samples: {count: 1, captions: 2, steps: 2, max_tokens: 2}\ndenoise: {limit: 4, levels: [0.5]}\n"
    )
    validation = [config.data.sources[0]]
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation": validation, "validation_limit": 32}),
            "sample_grid": config.sample_grid.model_copy(
                update={"prompts": ["a"], "steps": 3, "guidance": 1.0}
            ),
            "eval": config.eval.model_copy(update={"every": 2, "suites": str(suites)}),
        }
    )


def saved(config: Config) -> list[int]:
    names = (Path(config.run.folder) / "checkpoints").glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in names if (path / "manifest.json").exists())


def validated(config: Config) -> list[int]:
    return [line["step"] for line in lines(config) if "validation_text_loss" in line]


def evaluated(config: Config) -> list[int]:
    return [line["step"] for line in lines(config) if "eval_caption_token_f1" in line]


def drawn(config: Config) -> list[int]:
    names = (Path(config.run.folder) / "samples").glob("*.png")
    return sorted(int(path.stem.removeprefix("step_")) for path in names)


@pytest.mark.parametrize("during", ["validation 2/", "sample grid 1/", "denoising images"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_is_saved_before_it_is_measured_and_a_stop_waits_for_no_measurement(
    build_config: Callable[..., Config],
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    during: str,
    number: signal.Signals,
) -> None:
    """The line of the step is there too, and what was left out is measured by the next start."""
    config = measured_config(build_config, digits, "measured", 4)
    real, seen = Reporter._doing, []

    def doing(self: Reporter, what: str) -> None:
        real(self, what)
        if self.parts.state.step == 2:
            seen.append(what)
            assert saved(config) == [2] and lines(config)[-1]["step"] == 2
            if what.startswith(during):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "_doing", doing)
    assert run(config) == 75
    assert seen[-1].startswith(during) and saved(config) == [2]
    amid_losses = during.startswith("validation")
    amid_suites = during.startswith("denoising")
    assert validated(config) == ([] if amid_losses else [2])
    assert drawn(config) == ([0, 2] if amid_suites else [0]) and not evaluated(config)
    monkeypatch.undo()
    assert run(config) == 0
    assert validated(config) == [2, 4] and drawn(config) == [0, 2, 4] and evaluated(config) == [2, 4]
    last = lines(config)[-1]
    assert any(name.endswith("_denoise_error_at_0.5") for name in last if name.startswith("eval_"))
    straight = measured_config(build_config, digits, "straight", 4)
    assert run(straight) == 0
    assert lines(straight) == lines(config)


def test_a_stop_amid_the_last_measurement_leaves_it_to_the_next_start(
    build_config: Callable[..., Config], digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = measured_config(build_config, digits, "last", 2)
    monkeypatch.setattr(
        Reporter, "_doing", lambda self, what: self.parts.state.step and os.kill(os.getpid(), signal.SIGTERM)
    )
    assert run(config) == 75 and saved(config) == [2] and not validated(config)
    monkeypatch.undo()
    assert run(config) == 0 and validated(config) == [2] and drawn(config) == [0, 2]
    assert evaluated(config) == [2]
    # A further one has nothing to do.
    assert run(config) == 0 and len((Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()) == 4


def test_suites_are_those_of_the_start(
    build_config: Callable[..., Config], digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = measured_config(build_config, digits, "kept", 2)
    monkeypatch.setattr(
        Reporter, "_doing", lambda self, what: Path(config.eval.suites).unlink(missing_ok=True)
    )
    assert run(config) == 0 and evaluated(config) == [2]


def test_a_run_that_a_cpu_takes_days_for_is_told_after_its_first_step(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = build_config("endless", steps=100_000_000)
    interfere(
        monkeypatch, lambda number, terms: (number == 7 and os.kill(os.getpid(), signal.SIGTERM)) or terms
    )
    assert run(config) == 75
    told = [line for line in capfd.readouterr().err.splitlines() if "at this pace" in line]
    assert len(told) == 1 and "on this CPU: train on a GPU, or lower train.steps" in told[0]
    monkeypatch.undo()
    assert run(build_config("short", steps=2)) == 0
    assert "at this pace" not in capfd.readouterr().err


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a launcher passes on to a process that had it from the terminal is no second one."""
    now = [100.0]
    monkeypatch.setattr(collectives.time, "monotonic", lambda: now[0])
    with collectives.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop and signals.take() == Decision.SAVE_AND_STOP
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_validation_is_limited_to_the_same_documents_each_time(
    build_config: Callable[..., Config], digits: Path, tokenizer: Tokenizer
) -> None:
    config = build_config("limited", steps=1)
    sources = [config.data.sources[0], config.data.sources[0].model_copy(update={"name": "again"})]

    def spans(ranks: int, limit: int) -> set[Any]:
        loaders = [
            EvaluationLoader(config, sources, tokenizer, rank=rank, world_size=ranks, limit=limit)
            for rank in range(ranks)
        ]
        return {
            (span.source, span.sample)
            for loader in loaders
            for plan in loader._plans[loader._rank :: ranks]
            for span in plan
        }

    whole = spans(1, 0)
    few = spans(1, 20)
    assert len(few) == 20 and few < whole and {source for source, _ in few} == {0, 1}
    assert spans(1, 20) == few == spans(3, 20)
    assert spans(1, len(whole) + 1) == whole and len(spans(1, 1)) == 2


def test_a_network_that_torch_cannot_compile_is_told_with_the_remedy(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int, terms: LossTerms) -> LossTerms:
        raise torch._dynamo.exc.Unsupported("no working compiler\nfound")

    config = build_config("uncompiled", steps=2)
    interfere(monkeypatch, fail)
    with pytest.raises(
        UserError, match=r"cannot compile the network here \(no working compiler found.*compile=false"
    ):
        run(config)


def test_telemetry_of_chosen_steps(build_config: Callable[..., Config]) -> None:
    """Gradient norms of the parts in logged steps, which together are the whole one, and a trace of step 2."""
    config = build_config("told", steps=4, log=2, telemetry={"gradient_norms": True, "profile_steps": [2]})
    assert run(config) == 0
    for line in lines(config):
        norms = line["gradient_norms"]
        assert list(norms) == [
            "embedding",
            "patch_encoder",
            "blocks.0",
            "norm",
            "lm_head",
            "patch_decoder",
            "patch_position",
        ]
        assert sum(norm**2 for norm in norms.values()) == pytest.approx(line["gradient_norm"] ** 2, rel=1e-5)
    (trace,) = (Path(config.run.folder) / "profiles").iterdir()
    assert trace.name == "step_0000002_rank_00000.json.gz"
    assert "aten::mm" in gzip.decompress(trace.read_bytes()).decode()


def test_out_of_memory_is_told_with_what_needs_less(
    build_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config("large", steps=6)

    def grow(number: int, terms: LossTerms) -> LossTerms:
        if number == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
        return terms

    interfere(monkeypatch, grow)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "all of it")
    with pytest.raises(UserError) as refused:
        run(config)
    told = str(refused.value)
    assert told.startswith("rank 0 ran out of memory in step 2 (CUDA out of memory)")
    assert "data.micro_batch_size=1" in told and "train.precision=bf16" in told
    folder = Path(config.run.folder)
    assert (folder / "memory" / "rank_00000.pickle").exists()
    assert (folder / "memory" / "rank_00000.txt").read_text() == "all of it"
    assert "ended in step 1: forward and backward" in (folder / "stalls" / "rank_00000.txt").read_text()
