"""Classifier-free guidance (Ho and Salimans, 2022)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale * (conditional - unconditional); scale 1 is the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)
