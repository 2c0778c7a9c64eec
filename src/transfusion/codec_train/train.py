"""The training loop of a codec: one process, one device, a run folder like that of the transformer's training.

I images, C channels, H/W height and width, h/w of latents, N encoded patches, K entries of a codebook.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfusion.codec import pixels as codec_pixels
from transfusion.codec.networks import Network, load_network, new_network, save_network
from transfusion.codec.preview import write_preview
from transfusion.codec_train import codebook, state
from transfusion.codec_train.images import ImageSet
from transfusion.codec_train.losses import CodecLoss, PatchDiscriminator, discriminator_loss, reconstruct
from transfusion.codec_train.measure import latent_statistics, preview_map, reconstruction_psnr
from transfusion.codec_train.settings import CodecTrainConfig
from transfusion.config.weights_folder import check_tensors
from transfusion.errors import EXIT_STOPPED_EARLY, UserError
from transfusion.files import (
    atomic_write_text,
    fingerprint,
    remove_leftover,
    replace_folder,
    unfinished_path,
)
from transfusion.observe.console import start_logging
from transfusion.observe.environment import describe_environment
from transfusion.observe.runfolder import RunFolder
from transfusion.optim.ema import MovingAverage
from transfusion.parallel import environment
from transfusion.parallel.collectives import Signals
from transfusion.schema import Decision

log = logging.getLogger(__name__)

# Images on which a checkpoint is measured, and by which latents are measured.
_VALIDATION_IMAGES, _MEASURED = 64, 1024
CODEC, RECORD = "codec", "codec.json"


def train_codec(config: CodecTrainConfig) -> int:
    """Train to the last step, going on from the newest checkpoint, and write RUN/codec for diffusers and for us.

    Returns the exit code: 0 when done, 75 when a signal stopped it after saving. Raises UserError.
    """
    here = environment.start(config.threads)
    try:
        if here.world_size > 1:
            raise UserError("a codec is trained by one process; start it without torchrun")
        with contextlib.closing(CodecTrainer(config, here.device)) as trainer:
            return trainer.run()
    finally:
        environment.stop()


class CodecTrainer:
    """Network, discriminator, their optimisers, and where they stand."""

    def __init__(self, config: CodecTrainConfig, device: torch.device) -> None:
        """Raises UserError for images, weights or a run folder that cannot be used; then nothing is written."""
        self.config, self.device = config, device
        self.folder = RunFolder(Path(config.run.folder))
        start_logging(None)
        images = config.images
        size = {"channels": images.channels, "image_size": images.image_size}
        self.images = ImageSet(images.shards, **size, workers=images.workers)
        self.validation = (
            ImageSet(images.validation, **size, workers=images.workers) if images.validation else self.images
        )
        self.loss = CodecLoss(config.loss).to(device)
        torch.manual_seed(config.run.seed)
        self.network = build(config).to(device, memory_format=torch.channels_last)
        self.discriminator = PatchDiscriminator(images.channels, images.image_size).to(device)
        self.average = MovingAverage(
            list(self.network.parameters()) if config.optimizer.ema_decay else [], config.optimizer.ema_decay
        )
        self.optimizer, self.discriminator_optimizer = map(self._adam, (self.network, self.discriminator))
        # By the names under which a checkpoint holds them.
        self.trained = (
            ("network", self.network, self.optimizer),
            ("discriminator", self.discriminator, self.discriminator_optimizer),
        )
        self.step = 0
        # CPU seconds of the steps so far: what a busy machine does not change.
        self.seconds = 0.0
        self.chosen_K = torch.zeros(config.network.codebook_size if config.kind == "vq" else 0, device=device)
        self.codebook_use: codebook.CodebookUse | None = None
        self._resume()
        self.lock = self.folder.lock()
        self.folder.create(config, arguments=sys.argv)
        start_logging(self.folder)

    def run(self) -> int:
        """Steps until the last one or until asked to stop. Returns the exit code."""
        for name, words in self.loss.describe(self.config.steps).items():
            log.info("%s loss: %s", name, words)
        log.info(
            "%s: %s with %.2f M parameters, %d images, step %d to %d",
            self.config.run.name,
            self.config.kind,
            self.network.num_parameters() / 1e6,
            len(self.images),
            self.step,
            self.config.steps,
        )
        with Signals() as signals, open(self.folder.metrics, "a", encoding="utf-8") as metrics:
            while self.step < self.config.steps:
                parts = self.train_step()
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self._log(metrics, parts)
                asked = signals.take()
                measures = self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps
                if asked or measures:
                    self._save()
                if asked == Decision.SAVE_AND_STOP and self.step < self.config.steps:
                    break
                if measures:
                    self._measure(metrics)
        if self.step < self.config.steps:
            log.warning("stopped at step %d after saving; the same command continues", self.step)
            return EXIT_STOPPED_EARLY
        self.write_codec()
        return 0

    def train_step(self) -> dict[str, Tensor]:
        """One step of the codec, and of the discriminator once it takes part. Returns the parts of the loss."""
        started = time.process_time()
        config = self.config
        self._set_learning_rate()
        values_ICHW = self.images.batch(
            self.step, config.batch, seed=config.run.seed, flip=config.images.flip
        )
        real_ICHW = codec_pixels.encode(values_ICHW.to(self.device)).contiguous(
            memory_format=torch.channels_last
        )
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + self.step)
        has_discriminator = config.loss.adversarial > 0 and self.step >= config.loss.adversarial_from
        self.network.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            found = reconstruct(self.network, real_ICHW, config, generator)
        total, parts = self.loss(found.made_ICHW, real_ICHW)
        parts |= found.parts
        objective = total + found.bottleneck
        if has_discriminator:
            self.discriminator.requires_grad_(False)
            weighted, parts["adaptive"] = self.loss.adversarial(
                self.discriminator(found.made_ICHW), total, self.network.decoder.conv_out.weight
            )
            objective = objective + weighted
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.gradient_clip)
        if norm.isfinite():
            self.optimizer.step()
            self.average.update()
        parts["gradient_norm"] = norm
        if has_discriminator:
            self.discriminator.requires_grad_(True)
            loss = discriminator_loss(
                self.discriminator(real_ICHW), self.discriminator(found.made_ICHW.detach())
            )
            self.discriminator_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.discriminator_optimizer.step()
            parts["discriminator"] = loss
        if found.token_N is not None and found.encoded_NC is not None:
            self._count(found.token_N, found.encoded_NC, generator)
        self.step += 1
        self.seconds += time.process_time() - started
        return {name: part.detach() for name, part in parts.items()}

    def _count(self, token_N: Tensor, encoded_NC: Tensor, generator: torch.Generator) -> None:
        """Note which entries were chosen; now and then revive those that were not."""
        self.chosen_K += torch.bincount(token_N, minlength=len(self.chosen_K))
        every = self.config.loss.revive_every
        # In the first step too: the entries begin near zero, far from all that is encoded.
        self.codebook_use = None
        if not every or (self.step and (self.step + 1) % every):
            return
        self.codebook_use = found = codebook.use(self.chosen_K)
        entry_KC = self.network.quantize.embedding.weight
        dead = codebook.revive(entry_KC.data, self.chosen_K, encoded_NC, generator)
        moments = self.optimizer.state[entry_KC]
        for moment in moments.keys() - {"step"}:
            moments[moment][dead] = 0
        if self.config.optimizer.ema_decay:
            names = [name for name, _ in self.network.named_parameters()]
            average_KC = self.average.averages[names.index("quantize.embedding.weight")]
            average_KC[dead] = entry_KC.data[dead]
        log.info("step %d: %s, now revived", self.step + 1, found)
        self.chosen_K.zero_()

    def _adam(self, module: nn.Module) -> torch.optim.Adam:
        optimizer = self.config.optimizer
        return torch.optim.Adam(module.parameters(), lr=optimizer.learning_rate, betas=optimizer.betas)

    def _set_learning_rate(self) -> None:
        optimizer = self.config.optimizer
        rate = optimizer.learning_rate * min(1.0, (self.step + 1) / max(1, optimizer.warmup_steps))
        left = self.config.steps - self.step
        if left <= optimizer.decay_steps:
            rate *= 0.01 + 0.99 * left / optimizer.decay_steps
        for _, _, adam in self.trained:
            for group in adam.param_groups:
                group["lr"] = rate

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Network]:
        """The network with the weights that are saved, without gradients."""
        self.average.exchange()
        self.network.eval()
        try:
            with torch.no_grad():
                yield self.network
        finally:
            self.network.train()
            self.average.exchange()

    def _log(self, metrics: Any, parts: dict[str, Tensor]) -> None:
        line: dict[str, Any] = {"step": self.step, "cpu_seconds": round(self.seconds, 1)}
        line |= {name: float(part) for name, part in parts.items()}
        line["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if len(self.chosen_K):
            # In a step that revived entries the count has just begun anew.
            found = self.codebook_use or codebook.use(self.chosen_K)
            line |= {"codebook_used": found.used, "codebook_perplexity": found.perplexity}
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()

    def _measure(self, metrics: Any) -> None:
        with self.averaged() as network:
            psnr = reconstruction_psnr(network, self.validation, self.device, _VALIDATION_IMAGES)
        log.info("step %d: validation PSNR %.2f dB", self.step, psnr)
        metrics.write(json.dumps({"step": self.step, "validation_psnr": psnr}) + "\n")
        metrics.flush()

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {"chosen": self.chosen_K}
        for prefix, module, adam in self.trained:
            tensors |= {f"{prefix}/weight/{name}": value for name, value in module.state_dict().items()}
            tensors |= state.optimiser_tensors(prefix, module, adam)
        names = [name for name, _ in self.network.named_parameters()]
        tensors |= {
            f"network/average/{name}": value
            for name, value in zip(names, self.average.averages, strict=False)
        }
        updates = [
            max((int(each["step"]) for each in adam.state.values() if "step" in each), default=0)
            for _, _, adam in self.trained
        ]
        facts = {"seconds": self.seconds, "model": self._identity(), "updates": updates}
        state.save(self.folder.checkpoints, self.step, tensors, facts)

    def _resume(self) -> None:
        found = state.load_newest(self.folder.checkpoints)
        if found is None:
            return
        tensors, facts = found
        if facts["model"] != self._identity():
            raise UserError(
                f"{self.folder.path} holds the training of another codec (kind, network or image size differ);"
                " choose another run.dir"
            )
        try:
            check_tensors({name: value.shape for name, value in tensors.items()}, self._shapes(tensors))
        except ValueError as error:
            raise UserError(
                f"{self.folder.checkpoints}: step {facts['step']} does not fit this codec: {error}; delete its file to"
                " continue from the one before, or choose another run.dir"
            ) from None
        self.step, self.seconds = facts["step"], facts["seconds"]
        for (prefix, module, adam), updates in zip(self.trained, facts["updates"], strict=True):
            start = f"{prefix}/weight/"
            module.load_state_dict(
                {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            )
            state.load_optimiser(prefix, module, adam, tensors, updates)
        for (name, parameter), average in zip(
            self.network.named_parameters(), self.average.averages, strict=False
        ):
            # A run may have turned its moving average on since.
            average.copy_(tensors.get(f"network/average/{name}", parameter.detach()))
        self.chosen_K.copy_(tensors["chosen"])

    def _shapes(self, saved: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        """What `_save` writes; averages and the moments of a network all or not at all, as in `saved`."""
        wanted = {"chosen": self.chosen_K.shape}
        parameters = self.network.named_parameters()
        groups = [{f"network/average/{name}": value.shape for name, value in parameters}]
        for prefix, module, _ in self.trained:
            wanted |= {f"{prefix}/weight/{name}": value.shape for name, value in module.state_dict().items()}
            groups.append(state.optimiser_shapes(prefix, module))
        for group in groups:
            if group.keys() & saved.keys():
                wanted |= group
        return wanted

    def _identity(self) -> str:
        config = self.config
        images = config.images
        return fingerprint([config.kind, config.network.as_dict(), images.channels, images.image_size])

    def write_codec(self) -> None:
        """RUN/codec: the averaged network, its latents measured, its preview map, and how it came about."""
        out = self.folder.path / CODEC
        unfinished = unfinished_path(out)
        with self.averaged() as network:
            measured = latent_statistics(network, self.images, self.device, self.config.kind, _MEASURED)
            fitted = preview_map(network, self.images, self.device, self.config.kind)
            remove_leftover(unfinished)
            save_network(network, unfinished, **measured.diffusers_config())
        record = {
            "step": self.step,
            "cpu_seconds": round(self.seconds, 1),
            "parameters": self.network.num_parameters(),
            "losses": self.loss.describe(self.config.steps),
            "statistics": asdict(measured),
            "images_left_out": self.images.left_out,
            "config": self.config.as_dict(),
            "environment": describe_environment(sys.argv),
        }
        atomic_write_text(unfinished / RECORD, json.dumps(record, indent=1) + "\n")
        if fitted is not None:
            write_preview(unfinished, fitted)
            log.info("%s: %s", out, fitted.describe())
        replace_folder(unfinished, out)
        log.info("%s: %s", out, measured.describe())

    def close(self) -> None:
        """End the threads that decode."""
        self.images.close()
        self.validation.close()
        self.lock.close()


def build(config: CodecTrainConfig) -> Network:
    """The network with fresh weights, or with those of `start` where names and shapes agree. Raises UserError."""
    images = config.images
    network = new_network(
        config.kind, channels=images.channels, image_size=images.image_size, **config.network.as_dict()
    )
    if config.start:
        given, mine = load_network(config.start).state_dict(), network.state_dict()
        taken = {
            name: value for name, value in given.items() if name in mine and value.shape == mine[name].shape
        }
        if not taken:
            raise UserError(f"start {config.start} has no weight of the same name and shape as this network")
        network.load_state_dict(taken, strict=False)
        log.info("%d of %d weights are from %s", len(taken), len(mine), config.start)
    return network
