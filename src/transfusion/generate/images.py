"""Diffusion mode: images from noise, behind cached prefixes that end in <BOI>.

I images, R rows of the network (twice the images under guidance), P patches an image, C channels, H/W latent
height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.diffusion.guidance import guide
from transfusion.diffusion.sampler import DDIM, DDPM, Sampler, start_noise
from transfusion.diffusion.schedule import CosineSchedule
from transfusion.errors import UserError
from transfusion.generate.cache import KeyValueCache
from transfusion.generate.reader import Reader
from transfusion.model.patches import unpatchify

SamplerName = Literal["ddpm", "ddim"]
SAMPLERS: dict[str, type[DDPM] | type[DDIM]] = {"ddpm": DDPM, "ddim": DDIM}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSampling:
    """How images are drawn. guidance 1 is the model itself; steps are calls of the model for each image."""

    guidance: float = 3.0
    steps: int = 100
    sampler: SamplerName = "ddpm"
    seed: int = 0


def check(sampling: ImageSampling, config: Config) -> None:
    """Raise UserError for settings that cannot be carried out as asked."""
    if sampling.sampler not in SAMPLERS:
        raise UserError(f"sampler {sampling.sampler!r} does not exist; choose one of {', '.join(SAMPLERS)}")
    if not 1 <= sampling.steps <= config.diffusion.steps:
        raise UserError(f"steps {sampling.steps} must lie in [1, {config.diffusion.steps}]")
    if not math.isfinite(sampling.guidance) or sampling.guidance < 0:
        raise UserError(f"guidance {sampling.guidance} must be a number of at least 0; 1 is no guidance")
    if sampling.guidance != 1 and config.data.caption_drop == 0:
        raise UserError(
            f"guidance {sampling.guidance} cannot be applied: this model was trained without dropped captions"
            " (data.caption_drop=0), so it has no unconditional branch; use guidance 1"
        )


def draw(
    reader: Reader,
    prefixes: KeyValueCache,
    rows: Sequence[int],
    keys: Sequence[int],
    sampling: ImageSampling,
    schedule: CosineSchedule,
) -> Tensor:
    """Latents fp32 [I, C, H, W]: image i continues row rows[i] of `prefixes`, from the noise of keys[i].

    The model is called `sampling.steps` times on the image blocks alone, both branches of the guidance in one
    batch, and once on the unconditional prefix. `prefixes` stays as it is.
    """
    images, guided = len(rows), sampling.guidance != 1
    parts: list[tuple[KeyValueCache, Sequence[int]]] = [(prefixes, rows)]
    if guided:
        parts.append((reader.unconditional(), [0] * images))
    longest = max(cache.lengths[row] for cache, chosen in parts for row in chosen)
    view = KeyValueCache.gathered(parts, longest + reader.patches).view()
    position_RPA = reader.image_positions(view.lengths)[:, : reader.patches]
    mask = view.mask(torch.full(position_RPA.shape[:2], reader.patches, device=reader.device))

    sampler: Sampler = SAMPLERS[sampling.sampler](schedule, sampling.steps, clip=reader.codec.bound)
    key_I = torch.tensor(keys, device=reader.device)
    latent_ICHW = start_noise(key_I, reader.latent_shape)
    for index, timestep in enumerate(sampler.timesteps):
        timestep_I = torch.full((images,), timestep, device=reader.device)
        encoding = reader.model.encode_patches([latent_ICHW], timestep_I)
        if guided:
            encoding = encoding.twice()
        patches_RPD = encoding.patch_ND.unflatten(0, (-1, reader.patches))
        hidden_RPD = reader.model.run_blocks(patches_RPD, position_RPA, mask, view.layers)
        predicted_NE = reader.model.decode_patches(reader.model.norm(hidden_RPD).flatten(0, 1), encoding)
        noise_RCHW = unpatchify(predicted_NE, *reader.latent_shape, reader.model.config.patch_size).float()
        if guided:
            conditional, unconditional = noise_RCHW.chunk(2)
            noise_RCHW = guide(conditional, unconditional, sampling.guidance)
        latent_ICHW = sampler.step(index, latent_ICHW, noise_RCHW, key_I)
    return latent_ICHW
