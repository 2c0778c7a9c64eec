"""Which implementation of the attention runs: the one place that chooses, and that can say why."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from transfusion_kernels.attention.layout import IntervalMask

ENVIRONMENT_VARIABLE = "TRANSFUSION_ATTENTION"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
TRITON_HEAD_DIMS = (32, 64, 96, 128, 256)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """An implementation, one of `IMPLEMENTATIONS`, and the reason for it."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"


def explain(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *, backend: str = "auto") -> Choice:
    """Which implementation `interval_attention` runs for these arguments, and why.

    Raises ValueError where `interval_attention` would.
    """
    from transfusion_kernels.attention import check_arguments

    check_arguments(q, k, v, mask)
    return choose(backend, q)


def choose(backend: str, q: Tensor) -> Choice:
    """The argument decides; where it is "auto", the environment variable; where that is unset, the device.

    Raises ValueError if the implementation asked for does not exist or cannot take `q`.
    """
    if backend not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"backend: got {backend!r}, takes 'auto' or one of {IMPLEMENTATIONS}")
    if backend != "auto":
        return _asked_for(backend, "the argument 'backend'", q)
    from_environment = _environment()
    if from_environment not in ("", "auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: got {from_environment!r}, takes 'auto' or one of {IMPLEMENTATIONS}"
        )
    if from_environment not in ("", "auto"):
        return _asked_for(from_environment, f"the environment variable {ENVIRONMENT_VARIABLE}", q)
    return _automatic(q)


def _automatic(q: Tensor) -> Choice:
    device = q.device.type
    if device == "cpu":
        return Choice("cpu", "tensors on the CPU")
    if device != "cuda":  # ROCm's devices are called cuda too
        return Choice("reference", f"no kernel is written for device {device!r}")
    problem = _triton_problem(q)
    if problem:
        return Choice("reference", f"the Triton kernels cannot run: {problem}")
    return Choice("triton", f"tensors on {device}, head_dim {q.shape[-1]}, {q.dtype}")


def _asked_for(implementation: str, by: str, q: Tensor) -> Choice:
    problem = ""
    if implementation == "cpu" and q.device.type != "cpu":
        problem = f"q is on {q.device}"
    elif implementation == "triton":
        problem = _triton_problem(q)
        if not problem and q.device.type != "cuda" and not _interprets():
            problem = f"q is on {q.device} (set TRITON_INTERPRET=1 before the first import to run on the CPU)"
    if problem:
        raise ValueError(f"backend: got {implementation!r} by {by}, which cannot run: {problem}")
    return Choice(implementation, f"asked for by {by}")


def _triton_problem(q: Tensor) -> str:
    if not _has_triton():
        return "triton is not installed"
    if q.shape[-1] not in TRITON_HEAD_DIMS:
        return f"head_dim is {q.shape[-1]}, they take {TRITON_HEAD_DIMS}"
    if q.dtype not in TRITON_DTYPES:
        return f"the dtype is {q.dtype}, they take {TRITON_DTYPES}"
    return ""


# What a compiler is to take as fixed rather than trace.
@torch.compiler.assume_constant_result
def _environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
