"""Transfusion: images are latents, learned and drawn by diffusion (the paper)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from transfusion.config import DiffusionConfig
from transfusion.config.objectives import COMPARED
from transfusion.families.family import Family, ImageMetric
from transfusion.inference import image_diffusion
from transfusion.inference.image_scores import diffusion_bound
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import Transfusion
from transfusion.model.backbone import Backbone
from transfusion.sequence.sizes import IMAGE


def image_operations(
    network: Backbone, shape: tuple[int, int, int], recomputes: bool, modality: str = IMAGE
) -> int:
    """Counted, not derived. What a U-Net attends to inside of an image is counted with the products."""
    assert isinstance(network, Transfusion)
    network.recomputes_blocks = recomputes
    with FlopCounterMode(display=False) as counter:
        noisy = torch.zeros(1, *shape, device="meta")
        encoding = network.encode_patches([noisy], torch.zeros(1, device="meta").long(), modality)
        network.decode_patches(encoding.patch_ND, encoding).sum().backward()
    return int(counter.get_total_flops())


def image_metric(diffusion: DiffusionConfig) -> ImageMetric:
    """The squared error, with how the timesteps were drawn, where it is not evenly."""
    shift = "" if diffusion.timestep_shift == 1 else f"shift {diffusion.timestep_shift:g}"
    law = "" if diffusion.timestep_sampling == "uniform" else str(diffusion.timestep_sampling)
    if (diffusion.logit_mean, diffusion.logit_std) != (0, 1):
        law += f" of mean {diffusion.logit_mean:g} and deviation {diffusion.logit_std:g}"
    drawn = f" ({', '.join(filter(None, (law, shift)))})" if law or shift else ""
    how = f"mean squared error of the predicted {COMPARED[diffusion.prediction]}, validation {{}}, fixed noise and"
    return ImageMetric("image_loss", "", f"{how} timesteps{drawn}")


TRANSFUSION = Family(
    network=Transfusion,
    loss=lambda config, codec: TransfusionLoss(config.diffusion, codec, config.codec, config.modalities),
    drawing=image_diffusion.DiffusionDrawing,
    advance=image_diffusion.advance,
    score=diffusion_bound,
    image_calls=lambda sampling, config, patches: image_diffusion.calls(sampling, config),
    image_operations=image_operations,
    head_targets=lambda shape: 0,
    image_metric=image_metric,
)
