"""Rotary positions and timestep embeddings.

B rows, S positions, A position axes, H heads, E head dimension, F = E / 2 frequencies, D width, I images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from transfusion.config import RopeScalingConfig

TIMESTEP_FREQUENCIES = 256
# Over 2 pi, of sinusoids (Vaswani et al., 2017, section 3.5).
LONGEST_WAVELENGTH = 10_000.0


UNSCALED = RopeScalingConfig()


def scaled(frequency_F: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Rotary frequencies as they were lowered for longer sequences.

    With llama3 waves that turn rarely in the original length are slowed down in full, waves that turn often stay, and
    those between go over from one to the other by how often they turn.
    """
    if scaling.type == "none":
        return frequency_F
    if scaling.type == "linear":
        return frequency_F / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turn_F = frequency_F * scaling.original_max_position_embeddings / (2 * math.pi)
    kept_F = ((turn_F - low) / (high - low)).clamp(0, 1)
    return (1 - kept_F) * frequency_F / scaling.factor + kept_F * frequency_F


def rotary_angles(
    position_BSA: Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig = UNSCALED
) -> Tensor:
    """Angles [B, S, F] in fp32 for positions [B, S, A].

    With one axis every frequency turns with it. With three (running position, patch row, patch column)
    frequency f turns with axis f mod 3: text, whose three positions are equal, is embedded exactly as with
    one axis, and patches tell rows from columns at every scale.
    """
    frequencies = head_dim // 2
    exponent_F = torch.arange(frequencies, device=position_BSA.device, dtype=torch.float32) / frequencies
    frequency_F = scaled(theta**-exponent_F, scaling)
    axes = position_BSA.shape[-1]
    if axes == 1:
        return position_BSA.float() * frequency_F
    axis_F = torch.arange(frequencies, device=position_BSA.device) % axes
    return position_BSA[..., axis_F].float() * frequency_F


def rotation(
    position_BSA: Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig = UNSCALED
) -> tuple[Tensor, Tensor]:
    """What `rotate` takes for positions [B, S, A]: cosines and signed sines [B, 1, S, E] in fp32."""
    angle_B1SF = rotary_angles(position_BSA, head_dim, theta, scaling)[:, None]
    cosine, sine = angle_B1SF.cos(), angle_B1SF.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def rotate(x_BHSE: Tensor, cosine_B1SE: Tensor, sine_B1SE: Tensor) -> Tensor:
    """Turn head dimensions pairwise, (i, i + E/2) being a pair; computed in fp32, returned in x's dtype."""
    x = x_BHSE.float()
    return (x * cosine_B1SE + x.roll(x.shape[-1] // 2, -1) * sine_B1SE).to(x_BHSE.dtype)


def sinusoid_angles(value_N: Tensor, frequencies: int) -> Tensor:
    """Angles [N, frequencies] in fp32, of geometric wavelengths."""
    exponent = torch.arange(frequencies, device=value_N.device, dtype=torch.float32) / frequencies
    return value_N.float()[:, None] * torch.exp(-math.log(LONGEST_WAVELENGTH) * exponent)


class TimestepEmbedding(nn.Module):
    """256 sinusoids of the timestep through a two-layer perceptron (reference: Peebles and Xie, 2023)."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(TIMESTEP_FREQUENCIES, out_features)
        self.out = nn.Linear(out_features, out_features)

    def forward(self, timestep_I: Tensor) -> Tensor:
        """Embedding [I, out_features] of integer timesteps [I]."""
        angle = sinusoid_angles(timestep_I, TIMESTEP_FREQUENCIES // 2)
        sinusoids = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.hidden.weight.dtype)
        return self.out(nn.functional.silu(self.hidden(sinusoids)))
