"""Which implementation of the attention runs: the one place that chooses, and that can say why."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from transfusion_kernels.attention.layout import IntervalMask

ENVIRONMENT_VARIABLE = "TRANSFUSION_ATTENTION"
IMPLEMENTATIONS = ("hopper", "triton", "cpu", "reference")
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_DTYPES = (torch.float16, torch.bfloat16)
TRITON_HEAD_DIMS = (32, 64, 96, 128, 256)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Whether this process has said that the Hopper kernels fail.
_warned = False


@dataclass(frozen=True)
class Choice:
    """Which implementation runs.

    Attributes:
        implementation: "hopper", "triton", "cpu" or "reference".
        reason: Why, in words.
    """

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"


def explain(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *, backend: str = "auto") -> Choice:
    """Tell which implementation `interval_attention` runs for these arguments, and why.

    `interval_attention_with_kvcache` chooses alike, except that it runs Triton where this says "hopper".

    Args:
        q: As `interval_attention` takes it.
        k: As `interval_attention` takes it.
        v: As `interval_attention` takes it.
        mask: As `interval_attention` takes it.
        backend: "hopper" (GPUs of compute capability 9), "triton", "cpu", or "reference", which runs anywhere. "auto"
            asks the environment variable `TRANSFUSION_ATTENTION`. Where that is unset, the device, the dtype and the
            head width decide.

    Returns:
        The implementation and the reason. `str` of it is one line.

    Raises:
        ValueError: Where `interval_attention` would raise it.
    """
    from transfusion_kernels.attention import check_arguments

    check_arguments(q, k, v, mask)
    return choose(backend, q)


def choose(backend: str, q: Tensor) -> Choice:
    """Choose an implementation.

    Args:
        backend: As in `explain`.
        q: Queries [B, H, S, D], of which the device, the dtype and the width count.

    Raises:
        ValueError: If the implementation asked for does not exist or cannot take `q`.
    """
    wanted, by = _wanted(backend)
    return _automatic(q) if wanted == "auto" else _asked_for(wanted, by, q)


def choose_for_cache(backend: str, q: Tensor) -> Choice:
    """Choose an implementation of attention to a cache, where Triton stands in for the Hopper kernels.

    Args:
        backend: As in `explain`.
        q: As in `choose`.

    Raises:
        ValueError: As `choose`, and if the Hopper kernels are asked for.
    """
    wanted, by = _wanted(backend)
    if wanted == "hopper":
        raise ValueError(
            f"backend: got 'hopper' by {by}, takes 'auto', 'triton', 'cpu' or 'reference' with a cache"
        )
    choice = choose(backend, q)
    if choice.implementation != "hopper":
        return choice
    return Choice("triton", f"the Hopper kernels take no cache; {choice.reason}")


def _wanted(backend: str) -> tuple[str, str]:
    """What is asked for, "auto" where nothing is, and by what."""
    if backend not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"backend: got {backend!r}, takes 'auto' or one of {IMPLEMENTATIONS}")
    if backend != "auto":
        return backend, "the argument 'backend'"
    from_environment = _environment()
    if from_environment not in ("", "auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: got {from_environment!r}, takes 'auto' or one of {IMPLEMENTATIONS}"
        )
    return from_environment or "auto", f"the environment variable {ENVIRONMENT_VARIABLE}"


@torch.compiler.assume_constant_result
def backward_implementation(implementation: str, head_dim: int, deterministic: bool) -> str:
    """Which implementation computes the gradients where `implementation` computed the output.

    The Hopper kernels leave to Triton those with the same bits on every run, and head widths at which this version of
    its compiler would spill registers.

    Args:
        implementation: Of the output.
        head_dim: Width of a head.
        deterministic: Whether every run must give the same bits.
    """
    if implementation != "hopper":
        return implementation
    from transfusion_kernels.attention.hopper import BACKWARD

    return "hopper" if head_dim in BACKWARD and not deterministic else "triton"


def _automatic(q: Tensor) -> Choice:
    device = q.device.type
    if device == "cpu":
        return Choice("cpu", "tensors on the CPU")
    if device != "cuda":  # ROCm's devices are called cuda too
        return Choice("reference", f"no kernel is written for device {device!r}")
    problem = _triton_problem(q)
    if problem:
        return Choice("reference", f"the Triton kernels cannot run: {problem}")
    inputs = f"tensors on {device}, head_dim {q.shape[-1]}, {q.dtype}"
    problem = _hopper_problem(q) or _hopper_failure(q.device, q.dtype, q.shape[-1])
    if problem:
        return Choice("triton", f"{inputs}; not hopper: {problem}")
    backward = backward_implementation("hopper", q.shape[-1], deterministic=False)
    return Choice("hopper", f"{inputs}; gradients by {backward}")


def _asked_for(implementation: str, by: str, q: Tensor) -> Choice:
    problem = ""
    if implementation == "cpu" and q.device.type != "cpu":
        problem = f"q is on {q.device}"
    elif implementation == "hopper":
        problem = _hopper_problem(q)
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


def _hopper_problem(q: Tensor) -> str:
    if not _has_triton():
        return "triton is not installed"
    if q.shape[-1] not in HOPPER_HEAD_DIMS:
        return f"head_dim is {q.shape[-1]}, its kernels take {HOPPER_HEAD_DIMS}"
    if q.dtype not in HOPPER_DTYPES:
        return f"the dtype is {q.dtype}, its kernels take {HOPPER_DTYPES}"
    if q.device.type != "cuda":
        return f"q is on {q.device}"
    capability = _capability(q.device)
    return "" if capability[0] == 9 else f"the compute capability is {capability[0]}.{capability[1]}, not 9"


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


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) for others."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _hopper_failure(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the Hopper kernels do not work here, found out by running them once; nothing if they do."""
    global _warned
    failure = _try_hopper(device, dtype, head_dim)
    if failure and not _warned:
        _warned = True
        warnings.warn(f"attention runs on Triton's portable kernels: Hopper's fail, {failure}", stacklevel=2)
    return failure


@functools.cache
def _try_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    try:
        from transfusion_kernels.attention import hopper
    except Exception as error:  # Gluon is experimental: what a version lacks shows when it is imported
        return f"{type(error).__name__}: {error}"
    with _disable_current_modes():  # tensors may be fake, or counted, where the choice is made
        return hopper.trial(device, dtype, head_dim)
