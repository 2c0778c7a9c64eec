"""Initial weights that depend on the seed and a parameter's name only, never on rank or creation order."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from transfusion.files import name_hash

STANDARD_DEVIATION = 0.02
# Of what tells a patch its place. With 0.3 a Chameleon, whose tokens are not normed before the first block, learnt less
# (docs/LOG.md).
POSITION_GAIN = 0.1
_OF_MEDIA = re.compile(r"^media\.[a-z_]+\.")
# What writes to the residual stream of a U-Net.
ADDED_BY_A_UNET = (".second.weight", ".merge.weight")


def initialise(module: nn.Module, *, seed: int, layers: int) -> None:
    """Fill every parameter in place: norms with one, biases with zero, the last layer of the patch decoder with zero,
    matrices with a truncated normal of deviation 0.02, those that write to the residual stream divided by
    sqrt(2 * layers). Inside a U-Net layers keep their input's variance, and what they add at first is zero. Vectors of
    rows and columns have the size of sines and cosines."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            parameter.copy_(initial_value(name, parameter, seed=seed, layers=layers))


def initial_value(name: str, parameter: Tensor, *, seed: int, layers: int) -> Tensor:
    """The initial value of one parameter, fp32 on the CPU."""
    in_unet = ".unet." in name
    # Parts of a further modality begin as those of images do.
    part = _OF_MEDIA.sub("patch_", name)
    if name.endswith("bias") or part.startswith("patch_decoder.projection"):
        return torch.zeros(parameter.shape)
    if part == "patch_position.gain":
        return torch.full(parameter.shape, POSITION_GAIN)
    if "norm" in name:
        return torch.ones(parameter.shape)
    if in_unet and name.endswith(ADDED_BY_A_UNET):
        return torch.zeros(parameter.shape)
    # The head keeps the key that it began with, so that recorded runs come out the same.
    key = name.replace("lm_head.", "text_head.")
    generator = torch.Generator().manual_seed(name_hash(f"{seed}/{key}") >> 1)
    deviation = STANDARD_DEVIATION
    if in_unet:
        deviation = parameter[0].numel() ** -0.5
    elif name.endswith(("attention.out.weight", "feed_forward.down.weight")):
        deviation /= math.sqrt(2 * layers)
    if part.startswith("patch_encoder.projection"):
        # Few inputs of unit variance: keeps patches as large as token embeddings.
        deviation = parameter.shape[-1] ** -0.5 * STANDARD_DEVIATION
    elif part.startswith("patch_position."):
        # A row's and a column's add up to the mean square of sines and cosines.
        deviation = 0.5
    value = torch.empty(parameter.shape)
    return nn.init.trunc_normal_(value, std=deviation, a=-3 * deviation, b=3 * deviation, generator=generator)
