"""The only training loop: `train` sets a run up, `Trainer.run` loops, `Trainer.train_step` is one step."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from transfusion.checkpoint.resume import resume
from transfusion.checkpoint.save import save
from transfusion.config import Config
from transfusion.data.evaluation import EvaluationLoader
from transfusion.data.loader import Loader
from transfusion.data.scan import Fault
from transfusion.data.tokenizer import Tokenizer
from transfusion.evaluate.held_out import held_out_losses
from transfusion.generate.pictures import write_grid
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.observe.clock import Clock
from transfusion.observe.memory import peak_gib
from transfusion.observe.metrics import MetricsLog, StepMetrics
from transfusion.observe.progress import Progress
from transfusion.observe.runfolder import RunFolder, start_logging
from transfusion.observe.sinks import open_sink
from transfusion.optim.schedule import learning_rate
from transfusion.parallel import environment
from transfusion.parallel.agree import StopRequest, agree, group_device
from transfusion.parallel.engine import Engine, Weights, build_engine, global_counts
from transfusion.parallel.environment import Environment
from transfusion.schema import Decision, LossTerms, StepResult, TrainState

log = logging.getLogger(__name__)

# The conventional "try again" of sysexits.h: stopped early, everything saved, run the same command again.
EXIT_STOPPED_EARLY = 75


def train(config: Config) -> int:
    """Train `config` to its last step, going on from the newest checkpoint of its run folder.

    Returns the exit code: 0 when done, 75 when a signal stopped the run after saving. Raises UserError.
    """
    here = environment.start(config.train.threads)
    try:
        return Trainer(config, here).run()
    finally:
        environment.stop()


class Trainer:
    """One run on this process: engine, data, and the state that a checkpoint carries."""

    def __init__(self, config: Config, here: Environment) -> None:
        self.here = here
        self.tokenizer = Tokenizer(config.data.tokenizer)
        self.config = config = with_vocabulary(config, self.tokenizer)
        self.folder = RunFolder(Path(config.run.folder))
        if here.is_main:
            self.lock = self.folder.lock()
            self.folder.create(config, arguments=sys.argv)
        start_logging(self.folder, rank=here.rank)
        self.engine: Engine = build_engine(config, here)
        self.state = resume(self.folder.path, self.engine) or TrainState()
        ranks = {"rank": here.rank, "world_size": here.world_size}
        self.loader = Loader(
            config, config.data.sources, self.tokenizer, state=self.state.data or None, **ranks
        )
        self.held_out = (
            EvaluationLoader(config, config.data.held_out, self.tokenizer, **ranks)
            if config.data.held_out
            else None
        )
        self.clock = Clock()
        # Samples of the last step that this rank could not read.
        self.faults = 0
        # Loss sums of the steps since the last line of metrics.
        self.pending: list[LossTerms] = []

    def run(self) -> int:
        """Steps until the last one or until asked to stop; saves on the way. Returns the exit code."""
        steps = self.config.train.steps
        if self.state.step >= steps:
            log.info("already at step %d of %d: nothing to do", self.state.step, steps)
            return 0
        self._announce()
        with ExitStack() as stack:
            stack.enter_context(self.loader)
            stop = stack.enter_context(StopRequest())
            record = stack.enter_context(Record(self)) if self.here.is_main else None
            if self.state.step == 0:
                self._draw_grid(record)
            while self.state.step < steps:
                result = self.train_step()
                decision = self._agree(stop)
                at_end = self.state.step == steps
                saves = (
                    at_end
                    or decision > Decision.CONTINUE
                    or self.state.step % self.config.checkpoint.every == 0
                )
                if saves or self.state.step % self.config.log.every == 0:
                    self._log(record, result, held_out=saves)
                if saves:
                    self._save(record)
                if decision == Decision.SAVE_AND_STOP and not at_end:
                    log.warning(
                        "stopped at step %d after saving; the same command continues", self.state.step
                    )
                    return EXIT_STOPPED_EARLY
        log.info("done: step %d of %d", self.state.step, steps)
        return 0

    def train_step(self) -> StepResult:
        """One optimiser step over this rank's micro-batches of the next global batch."""
        with self.clock.span("data"):
            batches = [batch.to(self.engine.device) for batch in self.loader.next_step()]
        counts = global_counts(batches)
        for number, batch in enumerate(batches, start=1):
            self.pending.append(self.engine.forward_backward(batch, counts, last=number == len(batches)))
        result = self.engine.step(
            learning_rate(self.state.step, self.config.optimizer, self.config.train.steps)
        )
        tokens = self.config.data.rows * self.config.data.row_length
        self.clock.step_done(tokens)
        self.state.step += 1
        self.state.skipped_steps += int(result.skipped)
        self.state.tokens += tokens
        self.state.data = self.loader.state()
        self.faults = sum(batch.counts.faults for batch in batches)
        return result

    def _agree(self, stop: StopRequest) -> Decision:
        """What all ranks do next, and how many samples of the step could not be read, in one collective."""
        decision, (faults,) = agree(stop.decision, self.faults)
        self.state.faults += faults
        return decision

    def _log(self, record: Record | None, result: StepResult, *, held_out: bool) -> None:
        """Sum the losses over steps and ranks (all ranks together) and write a line (the main process)."""
        losses = MeanLosses.over_ranks(self.pending, self.config)
        self.pending = []
        self.state.images += losses.images
        judged = self._held_out_losses() if held_out else None
        if record is None:
            return
        lap = self.clock.lap()
        record.write(
            StepMetrics(
                step=self.state.step,
                loss=losses.total,
                text_loss=losses.text,
                image_loss=losses.image,
                image_loss_by_timestep=losses.image_by_timestep,
                gradient_norm=result.gradient_norm,
                learning_rate=learning_rate(
                    self.state.step - 1, self.config.optimizer, self.config.train.steps
                ),
                skipped=self.state.skipped_steps,
                faults=self.state.faults,
                tokens=self.state.tokens,
                images=self.state.images,
                tokens_per_second=lap.tokens_per_second,
                data_wait=lap.shares.get("data", 0.0),
                memory_gib=peak_gib(self.engine.device),
                held_out_text_loss=judged.text if judged else None,
                held_out_image_loss=judged.image if judged else None,
            ),
            seconds_left=self.clock.seconds_left(self.config.train.steps - self.state.step),
        )

    def _held_out_losses(self) -> MeanLosses | None:
        if self.held_out is None:
            return None
        with self.clock.pause(), self.engine.evaluation(self._best_weights()) as module:
            terms = held_out_losses(module, self.held_out, self.config, self.engine.device)
            return MeanLosses.over_ranks([terms], self.config)

    def _best_weights(self) -> Weights:
        return "ema" if self.engine.averages else "raw"

    def _save(self, record: Record | None) -> None:
        self._draw_grid(record)
        with self.clock.pause():
            self._write_quarantine()
            save(self.folder.path, self.engine, self.state, keep=self.config.checkpoint.keep)

    def _draw_grid(self, record: Record | None) -> None:
        """The fixed-seed pictures, each rank drawing its share with the same number of forwards."""
        if not self.config.sample.prompts:
            return
        with self.clock.pause(), self.engine.evaluation(self._best_weights()) as module:
            pipeline = Pipeline(module, self.tokenizer, self.config, self.engine.device)
            mine = pipeline.sample_grid(self.config.sample, rank=self.here.rank, ranks=self.here.world_size)
            everyone = [mine]
            if self.here.world_size > 1:
                everyone = [[] for _ in range(self.here.world_size)]
                dist.all_gather_object(everyone, mine)
        if record is not None:
            pictures = sorted(
                (picture for part in everyone for picture in part), key=lambda picture: picture.seed
            )
            record.grid(self.state.step, pictures)

    def _announce(self) -> None:
        log.info(
            "%s: %d process(es) on %s, step %d to %d, run folder %s",
            self.config.run.name,
            self.here.world_size,
            self.engine.device.type,
            self.state.step,
            self.config.train.steps,
            self.folder.path,
        )
        if faults := self.loader.counters()["faults"]:
            log.warning("samples left out, by reason: %s; see %s", faults, self.folder.quarantine)
        self._write_quarantine()

    def _write_quarantine(self) -> None:
        """One line for each sample left out so far, by the index or by any rank at run time."""
        indexed = sum(len(index.faults) for index in self.loader.indexes)
        mine = self.loader.faults()
        found = [mine if self.here.is_main else mine[indexed:]]
        if self.here.world_size > 1:
            everyone: list[list[Fault]] = [[] for _ in range(self.here.world_size)]
            dist.all_gather_object(everyone, found[0])
            found = everyone
        faults = [fault for part in found for fault in part]
        if self.here.is_main and faults:
            lines = (json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in faults)
            self.folder.quarantine.write_text("".join(lines), encoding="utf-8")


class Record:
    """What the main process writes down of a run: metrics.jsonl, the progress line, wandb, sample grids."""

    def __init__(self, trainer: Trainer) -> None:
        self._config, self._folder = trainer.config, trainer.folder
        self._first_step = trainer.state.step
        self._stack = ExitStack()

    def __enter__(self) -> Record:
        self._metrics = self._stack.enter_context(MetricsLog(self._folder.metrics))
        self._sink = open_sink(self._config, self._folder.path, attempt=self._metrics.attempt)
        self._stack.callback(self._sink.close)
        self._progress = self._stack.enter_context(
            Progress(self._config.train.steps, first_step=self._first_step)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, metrics: StepMetrics, *, seconds_left: float | None) -> None:
        """One line of metrics, everywhere."""
        line = self._metrics.append(metrics)
        self._sink.write(line)
        self._progress.update(line, seconds_left=seconds_left)

    def grid(self, step: int, pictures: Sequence[SampledImage]) -> None:
        """The sample grid of a step."""
        path = self._folder.grid(step)
        write_grid(pictures, path, self._config.sample)
        self._sink.picture(step, path)


@dataclass(frozen=True, slots=True)
class MeanLosses:
    """Means over all ranks and steps of an interval; None where there was nothing to learn."""

    text: float | None
    image: float | None
    total: float | None
    image_by_timestep: list[float | None]
    images: int

    @classmethod
    def over_ranks(cls, parts: Sequence[LossTerms], config: Config) -> MeanLosses:
        """Add up the parts of all ranks, in one collective; all ranks get the same answer."""
        summed = functools.reduce(LossTerms.plus, parts)
        flat = torch.cat([term.reshape(-1).double() for term in summed])
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = flat.to(group_device())
            dist.all_reduce(flat)
        text_sum, text_count, image_sum, image_count, *buckets = flat.tolist()
        half = len(buckets) // 2
        text, image = _ratio(text_sum, text_count), _ratio(image_sum, image_count)
        return cls(
            text=text,
            image=image,
            total=(text or 0.0) + config.diffusion.image_loss_weight * (image or 0.0),
            image_by_timestep=[_ratio(a, b) for a, b in zip(buckets[:half], buckets[half:], strict=True)],
            images=round(image_count / (config.codec.channels * config.codec.image_size**2)),
        )


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with the embedding as large as the tokenizer, unless it asks for more rows."""
    size = max(config.model.vocabulary, tokenizer.vocabulary)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocabulary": size})})


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
