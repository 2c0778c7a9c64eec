"""Diffusion mode: images from noise, behind cached rows that end in <BOI>.

I images, R rows of the network (two for an image under guidance), P patches an image, C channels, H/W latent
height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.config import Config, DiffusionConfig
from transfusion.config.objectives import PREDICTED, SAMPLERS
from transfusion.diffusion.sampler import Sampler, guide, rescale, start_noise
from transfusion.diffusion.samplers import BUILDERS
from transfusion.errors import UserError
from transfusion.inference.cache import CacheRows, FixedRows, PagedCache, Row
from transfusion.inference.runner import ModelRunner
from transfusion.model import Transfusion
from transfusion.model.attention import Attend
from transfusion.model.grouping import ALL_IMAGES
from transfusion.model.patches import unpatchify
from transfusion.sequence.sizes import Size
from transfusion_kernels import IntervalMask

# More of them keep a GPU busy for longer than their kernels take to launch.
_MOST_RECORDED_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSampling:
    """How images are drawn.

    Attributes:
        guidance: Scale of classifier-free guidance. 1 is the model itself.
        guidance_interval: Guidance is applied while the timestep, as a share of those of training, lies in it. 1 is
            noise alone, 0 the image (Kynkaanniemi et al., 2024).
        guidance_rescale: From 0 to 1, how far a guided prediction takes the deviation of the conditional one.
        negative_prompt: What guidance leads away from. Empty: an image without a caption.
        steps: Of the sampler. Each calls the model once. heun does so twice, but for the last.
        sampler: A name of `SAMPLERS`. "auto" is the first for the model's objective.
        seed: The key of all random numbers.
        size: One of the model's. None is the first.
    """

    guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    negative_prompt: str = ""
    steps: int = 25
    sampler: str = "auto"
    seed: int = 0
    size: Size | None = None


def check(sampling: ImageSampling, config: Config) -> None:
    """Raise UserError for settings that cannot be carried out as asked."""
    if sampling.size not in (None, *config.media_sizes.all):
        raise UserError(
            f"size {sampling.size} is none of this model's images; choose {config.media_sizes.named()}"
        )
    diffusion = config.diffusion
    for modality in config.modalities:
        if sampling.size is not None and sampling.size.modality == modality.name:
            diffusion = modality.diffusion
    fitting = SAMPLERS[diffusion.prediction]
    if sampling.sampler not in ("auto", *fitting):
        raise UserError(
            f"sampler {sampling.sampler!r} cannot draw with this model, which predicts"
            f" {PREDICTED[diffusion.prediction]}; choose {' or '.join(fitting)}"
        )
    if not 1 <= sampling.steps <= diffusion.steps:
        raise UserError(f"steps {sampling.steps} must lie in [1, {diffusion.steps}]")
    if not math.isfinite(sampling.guidance) or sampling.guidance < 0:
        raise UserError(f"guidance {sampling.guidance} must be a number of at least 0; 1 is no guidance")
    if sampling.guidance != 1 and config.data.caption_dropout == 0:
        raise UserError(
            f"guidance {sampling.guidance} cannot be applied: this model was trained without dropped captions"
            " (data.caption_dropout=0), so it has no unconditional branch; use guidance 1"
        )
    low, high = sampling.guidance_interval
    if not 0 <= low < high <= 1:
        raise UserError(f"guidance_interval {low:g} to {high:g} must rise within [0, 1]; 0 to 1 is all steps")
    if not 0 <= sampling.guidance_rescale <= 1:
        raise UserError(f"guidance_rescale {sampling.guidance_rescale} must lie in [0, 1]; 0 is none")
    shaped = {
        "negative_prompt": sampling.negative_prompt,
        "guidance_interval": (low, high) != (0, 1),
        "guidance_rescale": sampling.guidance_rescale,
    }
    for name, is_set in shaped.items():
        if is_set and sampling.guidance == 1:
            raise UserError(f"{name} shapes guidance, and guidance 1 is none; ask for another guidance")
        if is_set and name != "negative_prompt" and config.model.family == "chameleon":
            raise UserError(f"{name} cannot be applied: this model draws token by token; leave it out")


def build_sampler(sampling: ImageSampling, config: DiffusionConfig, *, clip: float | None) -> Sampler:
    """The sampler of checked settings, for a model of this objective. clip: bound of the clean latents."""
    return BUILDERS[sampler_name(sampling, config)](config, sampling.steps, clip)


def calls(sampling: ImageSampling, config: DiffusionConfig) -> int:
    """How often images of these settings call the model."""
    return (2 if sampler_name(sampling, config) == "heun" else 1) * (sampling.steps - 1) + 1


def sampler_name(sampling: ImageSampling, config: DiffusionConfig) -> str:
    """What "auto" means for a model of this objective, else the name itself."""
    return SAMPLERS[config.prediction][0] if sampling.sampler == "auto" else sampling.sampler


class DiffusionDrawing:
    """One image in the making: a sampler's questions, until it has none left. An `ImageDrawing`.

    Args:
        runner: The network, with its codec and sizes.
        config: The section `diffusion`.
        sampling: How it is drawn, with its size. The seed is the key of its random numbers.
        rows: The row that it continues, which ends in <BOI>. Under guidance also one without a caption.
    """

    def __init__(
        self, runner: ModelRunner, config: DiffusionConfig, sampling: ImageSampling, rows: Sequence[Row]
    ) -> None:
        self.config, self.sampling, self.rows = config, sampling, list(rows)
        self.size = sampling.size or runner.sizes.first
        key_I = torch.tensor([sampling.seed], device=runner.device)
        sampler = build_sampler(sampling, config, clip=runner.bound(self.size))
        self._denoising = sampler.denoise(start_noise(key_I, runner.latent_shape(self.size)), key_I)
        self.question = next(self._denoising)
        self.calls, self.all_calls = 0, calls(sampling, config)
        self.result: Tensor | None = None

    @property
    def group(self) -> Size:
        """Drawings of one group can be advanced together."""
        return self.size

    @property
    def is_guided(self) -> bool:
        """Whether the question is asked of both rows."""
        low, high = self.sampling.guidance_interval
        share = (self.question.timestep + 1) / self.config.steps
        return len(self.rows) > 1 and low <= share <= high

    @property
    def preview(self) -> Tensor | None:
        """The clean latents [C, H, W] as the last answer lets them be predicted, None before the first."""
        clean_ICHW = self.question.clean_ICHW
        return None if clean_ICHW is None else clean_ICHW[0]

    def answer(self, output_ICHW: Tensor) -> None:
        """Take the network's output for the question."""
        self.calls += 1
        try:
            self.question = self._denoising.send(output_ICHW)
        except StopIteration as finished:
            self.result = finished.value[0]


def predict(
    runner: ModelRunner,
    view: CacheRows,
    latent_ICHW: Tensor,
    timestep_I: Tensor,
    size: Size,
    copies: Sequence[int] = (),
) -> Tensor:
    """The network's answer to noisy latents, fp32 [R, C, H, W], behind rows that end in <BOI>.

    copies: numbers of the images that the last rows are asked about once more. The rows stay as long as they are.
    """
    patches, captured = runner.sizes.patches(size), view.cache.captured
    if captured is None or len(view.lengths) > _MOST_RECORDED_ROWS:
        position_RPA = runner.image_positions(view.lengths, size)[:, :patches]
        mask = view.mask(runner.image_ends(len(position_RPA), patches), [patches] * len(position_RPA))
        return _predict(
            runner, latent_ICHW, timestep_I, position_RPA, size, mask=mask, layers=view.layers, copies=copies
        )

    def of_packed(latent_ICHW: Tensor, timestep_I: Tensor, shift_PA: Tensor, rows_RQ: Tensor) -> Tensor:
        rows = FixedRows(view.cache, rows_RQ, runner.image_ends(len(rows_RQ), patches))
        position_RPA = shift_PA + rows.length_R1[..., None]
        return _predict(
            runner,
            latent_ICHW,
            timestep_I,
            position_RPA,
            size,
            mask=rows.mask,
            layers=rows.layers,
            copies=copies,
        )

    inputs = (latent_ICHW, timestep_I, runner.image_shifts(size)[:patches], view.packed(patches))
    return captured(("image", size, tuple(copies)), of_packed, *inputs)


def _predict(
    runner: ModelRunner,
    latent_ICHW: Tensor,
    timestep_I: Tensor,
    position_RPA: Tensor,
    size: Size,
    *,
    mask: IntervalMask,
    layers: Sequence[Attend],
    copies: Sequence[int],
) -> Tensor:
    model = runner.model
    assert isinstance(model, Transfusion)
    encoding = model.encode_patches([latent_ICHW], timestep_I, size.modality).with_copies(copies)
    patches_RPD = encoding.patch_ND.unflatten(0, position_RPA.shape[:2])
    hidden_RPD = model.run_blocks(patches_RPD, position_RPA, mask, layers, ALL_IMAGES)
    predicted_NE = model.decode_patches(model.norm(hidden_RPD).flatten(0, 1), encoding)
    _, channels, height, width = latent_ICHW.shape
    return unpatchify(predicted_NE, channels, height, width, runner.patch_size(size)).float()


def advance(runner: ModelRunner, cache: PagedCache, drawings: Sequence[DiffusionDrawing]) -> None:
    """Call the model once for images of one size, on their patches alone, both branches of the guidance in one batch.

    The rows stay as long as they are.
    """
    size = drawings[0].size
    # Those that are guided come first, so that there are few different calls.
    drawings = sorted(drawings, key=lambda drawing: not drawing.is_guided)
    guided = [number for number, drawing in enumerate(drawings) if drawing.is_guided]
    view = cache.view([drawing.rows[0] for drawing in drawings] + [drawings[i].rows[1] for i in guided])
    latent_ICHW = torch.cat([drawing.question.latent_ICHW for drawing in drawings])
    timesteps = [drawing.question.timestep for drawing in drawings]
    timestep_I = torch.tensor(timesteps, dtype=torch.float32, device=runner.device)
    answer_RCHW = predict(runner, view, latent_ICHW, timestep_I, size, guided)
    unconditional = {number: len(drawings) + place for place, number in enumerate(guided)}
    for number, drawing in enumerate(drawings):
        answer = answer_RCHW[number : number + 1]
        if number in unconditional:
            other, sampling = unconditional[number], drawing.sampling
            conditional, answer = answer, guide(answer, answer_RCHW[other : other + 1], sampling.guidance)
            if sampling.guidance_rescale:
                answer = rescale(answer, conditional, sampling.guidance_rescale)
        drawing.answer(answer)
