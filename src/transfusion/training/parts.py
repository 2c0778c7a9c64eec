"""What a run consists of: opened by all ranks together, and refused by all where one of them refuses."""

from __future__ import annotations

import sys
from pathlib import Path

from transfusion.checkpoint.layout import find_latest
from transfusion.checkpoint.published_models import refuse_other_network
from transfusion.checkpoint.published_weights import start_from_published
from transfusion.checkpoint.resume import resume
from transfusion.checkpoint.save import Saver
from transfusion.codec import open_codec
from transfusion.config import Config
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.evaluate.suites.run import choose_for_training
from transfusion.observe.clock import Clock, TimeLimit
from transfusion.observe.console import start_logging
from transfusion.observe.runfolder import RunFolder
from transfusion.observe.sinks import refuse_missing_logger
from transfusion.observe.utilization import OperationMeter
from transfusion.parallel.build import build_engine
from transfusion.parallel.collectives import raise_together
from transfusion.parallel.engine import Engine
from transfusion.parallel.environment import Environment
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.training.out_of_memory import remember_allocations
from transfusion.training.watchdog import Watchdog


class RunParts:
    """Engine, data, run folder, and the state that a checkpoint carries."""

    def __init__(self, config: Config, here: Environment) -> None:
        """Called by all ranks together. Nothing is written before nothing is left that could refuse."""
        self.here = here
        self.limit = TimeLimit(config.train.time_limit_minutes)
        self.folder = RunFolder(Path(config.run.folder))
        start_logging(None, rank=here.rank)
        # A run that is under way must not be read either: its checkpoints come and go.
        self.lock = raise_together(lambda: self.folder.lock_existing() if here.is_main else None)
        self.tokenizer = raise_together(lambda: Tokenizer(config.data.tokenizer))
        self.config = config.with_vocabulary(self.tokenizer.vocabulary)
        raise_together(self._check)
        # Frozen and whole on every rank, outside of what the engine shards and trains.
        self.codec = raise_together(lambda: open_codec(config.codec, here.device))
        self.engine: Engine = build_engine(self.config, here, self.codec)
        self.state = resume(self.folder.path, self.engine) or self._begin()
        self.loader = raise_together(self._open_loader)
        self.validation = raise_together(self._open_validation) if config.data.validation else None
        raise_together(self._create_folder)
        self.saver = Saver(
            self.folder.path,
            self.engine,
            keep=config.checkpoint.keep,
            archive_interval=config.checkpoint.archive_interval,
        )
        self.watchdog = Watchdog(
            self.folder.stalls,
            here.rank,
            seconds=config.train.stall_seconds,
            exit_seconds=self._patience(),
            samples=self.loader.samples,
        )
        self.operation_meter = OperationMeter(self.config, here.device)
        self.clock = Clock()

    def _check(self) -> None:
        """What can be refused at once, before anything large is built. Raises UserError."""
        if self.here.is_main:
            self.folder.refuse_other_tokenizer(self.tokenizer.path)
            refuse_missing_logger(self.config)
            if self.config.eval.every:
                choose_for_training(self.config.eval.suites)
            if self.config.train.init_from and find_latest(self.folder.path) is None:
                refuse_other_network(Path(self.config.train.init_from), self.config)
        if self.config.log.memory_history:
            remember_allocations(self.here.device)

    def _begin(self) -> TrainState:
        """The state of a new run; its weights are drawn, or those of a published model."""
        if self.config.train.init_from:
            start_from_published(Path(self.config.train.init_from), self.engine, self.tokenizer)
        return TrainState()

    def _open_loader(self) -> Loader:
        state = self.state.data or None
        sequence = self.engine.sequence
        ranks = {"rank": sequence.data_rank, "world_size": sequence.data_world_size}
        return Loader(self.config, self.config.data.sources, self.tokenizer, state=state, **ranks)

    def _open_validation(self) -> EvaluationLoader:
        ranks = {"rank": self.here.rank, "world_size": self.here.world_size}
        data = self.config.data
        return EvaluationLoader(
            self.config, data.validation, self.tokenizer, limit=data.validation_limit, **ranks
        )

    def _create_folder(self) -> None:
        if self.here.is_main:
            self.lock = self.lock or self.folder.lock()
            self.folder.create(self.config, arguments=sys.argv)
            self.folder.keep_tokenizer(self.tokenizer.path)
            self.folder.keep_codec(self.config.codec)
            start_logging(self.folder)

    def _patience(self) -> float:
        """Seconds after which a rank that waits for another ends; a rank may itself wait for its downloads."""
        seconds, cache = self.config.train.lost_rank_timeout, self.config.data.cache
        if not seconds or self.loader.fetching is None:
            return seconds
        return seconds + cache.attempts * cache.timeout + cache.pause * (2 ** (cache.attempts - 1) - 1)
