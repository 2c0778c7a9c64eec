"""The only training loop: `train` sets a run up, `Trainer.run` loops, `Trainer.train_step` is one step."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from transfusion.checkpoint.resume import resume
from transfusion.checkpoint.save import Saver
from transfusion.codec import open_codec
from transfusion.config import Config
from transfusion.data.evaluation import EvaluationLoader
from transfusion.data.index import too_many_faults
from transfusion.data.loader import Loader
from transfusion.data.tokenizer import Tokenizer
from transfusion.errors import UserError
from transfusion.evaluate.held_out import held_out_losses
from transfusion.generate.pictures import write_grid
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.observe.clock import Clock
from transfusion.observe.memory import peak_gib
from transfusion.observe.metrics import MetricsLog, StepMetrics
from transfusion.observe.progress import Progress
from transfusion.observe.runfolder import RunFolder, start_logging
from transfusion.observe.sinks import open_sink, refuse_missing_sink
from transfusion.observe.watchdog import LOADER, Watchdog
from transfusion.optim.schedule import learning_rate
from transfusion.parallel import environment
from transfusion.parallel.agree import StopRequest, agree, gather, group_device, together
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
        """Called by all ranks together; what one of them refuses, all refuse, and then nothing is written."""
        self.here = here
        self.folder = RunFolder(Path(config.run.folder))
        start_logging(None, rank=here.rank)
        # A run that is under way must not be read either: its checkpoints come and go.
        self.lock = together(lambda: self.folder.lock_existing() if here.is_main else None)
        self.tokenizer = together(lambda: Tokenizer(config.data.tokenizer))
        self.config = with_vocabulary(config, self.tokenizer)
        together(self._check)
        # Frozen and whole on every rank, outside of what the engine shards and trains.
        self.codec = together(lambda: open_codec(config.codec, here.device))
        self.engine: Engine = build_engine(self.config, here, self.codec)
        self.state = resume(self.folder.path, self.engine) or TrainState()
        self.loader = together(self._open_loader)
        self.held_out = together(self._open_held_out) if config.data.held_out else None
        together(self._create_folder)
        self.saver = Saver(
            self.folder.path,
            self.engine,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
        )
        self.watchdog = Watchdog(
            self.folder.stalls,
            here.rank,
            seconds=config.train.stall_seconds,
            samples=self.loader.samples,
        )
        self.clock = Clock()
        # Loss sums of the steps since the last line of metrics.
        self.pending: list[LossTerms] = []

    def run(self) -> int:
        """Steps until the last one or until asked to stop; saves on the way. Returns the exit code."""
        try:
            return self._run()
        except UserError:
            # On all ranks together, as all errors for users are: what is half saved can still be saved.
            with suppress(UserError):
                self.saver.finish()
            raise

    def _run(self) -> int:
        steps = self.config.train.steps
        if self.state.step >= steps:
            log.info("already at step %d of %d: nothing to do", self.state.step, steps)
            return 0
        self._announce()
        with ExitStack() as stack:
            stack.enter_context(self.loader)
            stop = stack.enter_context(StopRequest())
            stack.enter_context(self.watchdog)
            record = together(lambda: stack.enter_context(Record(self)) if self.here.is_main else None)
            if self.state.step == 0:
                self._draw_grid(record)
            while self.state.step < steps:
                result = self.train_step()
                decision = self._agree(stop)
                at_end = self.state.step == steps
                saves = (
                    at_end
                    or decision == Decision.SAVE_AND_STOP
                    or self.state.step % self.config.checkpoint.every == 0
                )
                if saves or self.state.step % self.config.log.every == 0:
                    self._log(record, result, held_out=saves)
                if saves:
                    self._save(record)
                if decision == Decision.SAVE_AND_STOP and not at_end:
                    self.saver.finish()
                    log.warning(
                        "stopped at step %d after saving; the same command continues", self.state.step
                    )
                    return EXIT_STOPPED_EARLY
            self.saver.finish()
        log.info("done: step %d of %d", self.state.step, steps)
        return 0

    def train_step(self) -> StepResult:
        """One optimiser step over this rank's micro-batches of the next global batch."""
        self.watchdog.note(LOADER, self.state.step)
        with self.clock.span("data"):
            # Together: the loader processes of a single rank may have died.
            batches = [batch.to(self.engine.device) for batch in together(self.loader.next_step)]
        self.watchdog.note("forward and backward", self.state.step)
        counts = global_counts(batches, self.config.codec)
        self.pending += [self.engine.forward_backward(batch, counts) for batch in batches]
        self.watchdog.note("optimiser step", self.state.step)
        result = self.engine.step(
            learning_rate(self.state.step, self.config.optimizer, self.config.train.steps)
        )
        tokens = self.config.data.rows * self.config.data.row_length
        self.clock.step_done(tokens)
        self.state.step += 1
        self.state.skipped_steps += int(result.skipped)
        self.state.tokens += tokens
        self.state.data = self.loader.state()
        return result

    def _check(self) -> None:
        """What can be refused at once, before anything large is built. Raises UserError."""
        if self.here.is_main:
            self.folder.refuse_other_tokenizer(self.tokenizer.path)
            refuse_missing_sink(self.config)

    def _open_loader(self) -> Loader:
        state = self.state.data or None
        return Loader(self.config, self.config.data.sources, self.tokenizer, state=state, **self._ranks())

    def _open_held_out(self) -> EvaluationLoader:
        return EvaluationLoader(self.config, self.config.data.held_out, self.tokenizer, **self._ranks())

    def _ranks(self) -> dict[str, int]:
        return {"rank": self.here.rank, "world_size": self.here.world_size}

    def _create_folder(self) -> None:
        """The first thing that a start writes, once nothing is left that could refuse it."""
        if self.here.is_main:
            self.lock = self.lock or self.folder.lock()
            self.folder.create(self.config, arguments=sys.argv)
            self.folder.keep_tokenizer(self.tokenizer.path)
            self.folder.keep_codec(self.config.codec)
            start_logging(self.folder)

    def _agree(self, stop: StopRequest) -> Decision:
        """What all ranks do next, how many samples of the step could not be read, and whether all have written the
        save under way, in one collective.

        Raises UserError, on all ranks together, once the run had more bad samples than data.max_faults.
        """
        self.watchdog.note("agreement of all ranks", self.state.step)
        decision, (faults, samples, written) = agree(
            stop.decision, *self.loader.reading, int(self.saver.written)
        )
        self.state.faults += faults
        self.state.samples += samples
        if written == self.here.world_size:
            self.saver.finish()
        if too_many_faults(self.state.faults, self.state.samples, self.config.data.max_faults):
            self._write_quarantine()
            complaint = self.loader.complaint()
            raise UserError(
                f"{self.state.faults} of {self.state.samples} samples could not be read, more than "
                f"data.max_faults ({self.config.data.max_faults}); {self.folder.quarantine} names them: "
                "mend the shards, or raise it" + (f" ({complaint})" if complaint else "")
            )
        return decision

    def _log(self, record: Record | None, result: StepResult, *, held_out: bool) -> None:
        """Sum the losses over steps and ranks (all ranks together) and write a line (the main process)."""
        self.watchdog.note("held-out losses and metrics", self.state.step)
        losses = MeanLosses.over_ranks(self.pending, self.config)
        self.pending = []
        self.state.images += losses.images
        judged = self._held_out_losses() if held_out else None
        line = self._metrics(result, losses, judged)
        seconds_left = self.clock.seconds_left(self.config.train.steps - self.state.step)
        together(lambda: record.write(line, seconds_left=seconds_left) if record else None)

    def _metrics(self, result: StepResult, losses: MeanLosses, judged: MeanLosses | None) -> StepMetrics:
        lap = self.clock.lap()
        return StepMetrics(
            step=self.state.step,
            loss=losses.total,
            text_loss=losses.text,
            image_loss=losses.image,
            image_loss_by_timestep=losses.image_by_timestep,
            gradient_norm=result.gradient_norm,
            learning_rate=learning_rate(self.state.step - 1, self.config.optimizer, self.config.train.steps),
            skipped=self.state.skipped_steps,
            faults=self.state.faults,
            tokens=self.state.tokens,
            images=self.state.images,
            tokens_per_second=lap.tokens_per_second,
            data_wait=lap.shares.get("data", 0.0),
            memory_gib=peak_gib(self.engine.device),
            held_out_text_loss=judged.text if judged else None,
            held_out_image_loss=judged.image if judged else None,
        )

    def _held_out_losses(self) -> MeanLosses | None:
        if self.held_out is None:
            return None
        with self.clock.pause(), self.engine.evaluation(self._best_weights()) as module:
            terms = held_out_losses(module, self.held_out, self.config, self.engine.device, self.codec)
            return MeanLosses.over_ranks([terms], self.config)

    def _best_weights(self) -> Weights:
        return "ema" if self.engine.averages else "raw"

    def _save(self, record: Record | None) -> None:
        self._draw_grid(record)
        self.watchdog.note("saving", self.state.step)
        with self.clock.pause():
            self._write_quarantine()
            self.saver.begin(self.state, copy=self.config.checkpoint.asynchronous)
            if not self.config.checkpoint.asynchronous:
                self.saver.finish()

    def _draw_grid(self, record: Record | None) -> None:
        """The fixed-seed pictures, each rank drawing its share with the same number of forwards."""
        if not self.config.sample.prompts:
            return
        self.watchdog.note("drawing the sample grid", self.state.step)
        with self.clock.pause(), self.engine.evaluation(self._best_weights()) as module:
            pipeline = Pipeline(module, self.tokenizer, self.config, self.engine.device, self.codec)
            mine = pipeline.sample_grid(self.config.sample, rank=self.here.rank, ranks=self.here.world_size)
            pictures = [picture for part in gather(mine) for picture in part]
        pictures.sort(key=lambda picture: picture.seed)
        together(lambda: record.grid(self.state.step, pictures) if record else None)

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
        # What the index left out is the same on every rank.
        indexed = sum(len(index.faults) for index in self.loader.indexes)
        mine = self.loader.faults()
        parts = gather(mine if self.here.is_main else mine[indexed:])
        faults = [fault for part in parts for fault in part]
        together(lambda: self.folder.add_to_quarantine(faults) if self.here.is_main else None)


class Record:
    """What the main process writes down of a run: metrics.jsonl, the progress line, wandb, sample grids."""

    def __init__(self, trainer: Trainer) -> None:
        self._config, self._folder = trainer.config, trainer.folder
        self._first_step = trainer.state.step

    def __enter__(self) -> Record:
        with ExitStack() as stack:
            self._metrics = stack.enter_context(MetricsLog(self._folder.metrics))
            self._sink = open_sink(self._config, self._folder.path, attempt=self._metrics.attempt)
            stack.callback(self._sink.close)
            progress = Progress(self._config.train.steps, first_step=self._first_step)
            self._progress = stack.enter_context(progress)
            self._stack = stack.pop_all()
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
        summed = functools.reduce(LossTerms.plus, (part.double() for part in parts))
        flat = torch.cat([term.reshape(-1) for term in summed])
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
            images=round(image_count / (config.codec.depth * config.codec.latent_size**2)),
        )


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with the embedding as large as the tokenizer, unless it asks for more rows."""
    size = max(config.model.vocabulary, tokenizer.vocabulary)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocabulary": size})})


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
