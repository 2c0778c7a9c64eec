"""Diffusion mode: images from noise, behind cached prefixes that end in <BOI>.

I images, R rows of the network (twice the images under guidance), P patches an image, C channels, H/W latent
height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.config import Config, DiffusionConfig
from transfusion.config.objectives import PREDICTED, SAMPLERS
from transfusion.diffusion.sampler import Denoiser, Sampler, guide, start_noise
from transfusion.diffusion.samplers import BUILDERS
from transfusion.errors import UserError
from transfusion.inference.cache import KeyValueCache
from transfusion.inference.runner import ModelRunner
from transfusion.model import Transfusion
from transfusion.model.patches import unpatchify
from transfusion.sequence.sizes import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSampling:
    """How images are drawn. guidance 1 is the model itself; steps are calls of the model for each image.

    sampler "auto": the first of `SAMPLERS` for the model's objective. heun calls twice a step, but once in the last.
    size: one of the model's; None: the first. on_call: called before each call of the model that draws.
    """

    guidance: float = 3.0
    steps: int = 25
    sampler: str = "auto"
    seed: int = 0
    size: Size | None = None
    on_call: Callable[[], object] = int


def check(sampling: ImageSampling, config: Config) -> None:
    """Raise UserError for settings that cannot be carried out as asked."""
    if sampling.size not in (None, *config.codec.sizes):
        raise UserError(
            f"size {sampling.size} is none of this model's images; choose {config.image_sizes.named()}"
        )
    fitting = SAMPLERS[config.diffusion.prediction]
    if sampling.sampler not in ("auto", *fitting):
        raise UserError(
            f"sampler {sampling.sampler!r} cannot draw with this model, which predicts"
            f" {PREDICTED[config.diffusion.prediction]}; choose {' or '.join(fitting)}"
        )
    if not 1 <= sampling.steps <= config.diffusion.steps:
        raise UserError(f"steps {sampling.steps} must lie in [1, {config.diffusion.steps}]")
    if not math.isfinite(sampling.guidance) or sampling.guidance < 0:
        raise UserError(f"guidance {sampling.guidance} must be a number of at least 0; 1 is no guidance")
    if sampling.guidance != 1 and config.data.caption_dropout == 0:
        raise UserError(
            f"guidance {sampling.guidance} cannot be applied: this model was trained without dropped captions"
            " (data.caption_dropout=0), so it has no unconditional branch; use guidance 1"
        )


def build_sampler(sampling: ImageSampling, config: DiffusionConfig, *, clip: float | None) -> Sampler:
    """The sampler of checked settings, for a model of this objective. clip: bound of the clean latents."""
    return BUILDERS[_sampler_name(sampling, config)](config, sampling.steps, clip)


def calls(sampling: ImageSampling, config: DiffusionConfig) -> int:
    """How often images of these settings call the model."""
    return (2 if _sampler_name(sampling, config) == "heun" else 1) * (sampling.steps - 1) + 1


def _sampler_name(sampling: ImageSampling, config: DiffusionConfig) -> str:
    return SAMPLERS[config.prediction][0] if sampling.sampler == "auto" else sampling.sampler


def draw(
    runner: ModelRunner,
    prefixes: KeyValueCache,
    rows: Sequence[int],
    keys: Sequence[int],
    sampling: ImageSampling,
    config: DiffusionConfig,
) -> Tensor:
    """Latents fp32 [I, C, H, W]: image i continues row rows[i] of `prefixes`, from the noise of keys[i]."""
    key_I = torch.tensor(keys, device=runner.device)
    sampler = build_sampler(sampling, config, clip=runner.codec.bound)
    start_ICHW = start_noise(key_I, runner.latent_shape(sampling.size or runner.sizes.first))
    return sampler.sample(start_ICHW, denoiser(runner, prefixes, rows, sampling), key_I)


def denoiser(
    runner: ModelRunner, prefixes: KeyValueCache, rows: Sequence[int], sampling: ImageSampling
) -> Denoiser:
    """The network's answer to noisy latents, guidance included: image i continues row rows[i] of `prefixes`.

    The model is called on the image blocks alone, both branches of the guidance in one batch, and once on the
    unconditional prefix. `prefixes` stays as it is.
    """
    model = runner.model
    assert isinstance(model, Transfusion)
    images, guided, size = len(rows), sampling.guidance != 1, sampling.size or runner.sizes.first
    patches, latent_shape = runner.sizes.patches(size), runner.latent_shape(size)
    view = runner.branches(prefixes, rows, size, guided=guided).view()
    position_RPA = runner.image_positions(view.lengths, size)[:, :patches]
    mask = view.mask(runner.image_ends(len(position_RPA), patches))

    def predict(latent_ICHW: Tensor, timestep: float) -> Tensor:
        sampling.on_call()
        timestep_I = torch.full((images,), timestep, device=runner.device)
        encoding = model.encode_patches([latent_ICHW], timestep_I)
        if guided:
            encoding = encoding.repeat_for_guidance()
        patches_RPD = encoding.patch_ND.unflatten(0, (-1, patches))
        hidden_RPD = model.run_blocks(patches_RPD, position_RPA, mask, view.layers)
        predicted_NE = model.decode_patches(model.norm(hidden_RPD).flatten(0, 1), encoding)
        answer_RCHW = unpatchify(predicted_NE, *latent_shape, model.config.patch_size).float()
        if not guided:
            return answer_RCHW
        conditional, unconditional = answer_RCHW.chunk(2)
        return guide(conditional, unconditional, sampling.guidance)

    return predict
