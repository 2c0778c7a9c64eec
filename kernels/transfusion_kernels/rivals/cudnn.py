"""NVIDIA's `cudnn.flex_attention` under an `IntervalMask`, where nvidia-cudnn-frontend is installed.

It takes a mask as intervals too. Three integers a query, F0, F1 and F2, show the keys `[0, F0)` and `[F1, F2)` of the
query's own row. So ours is F0 = 0, F1 = first_key and F2 = end_key. A second interval is `[F3, F4)`. No integer of a
query may be less than the one before it. From that it makes lists of tiles and packed bits on the device, and waits
for their sizes once a plan.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.attention.plans import Plans
from transfusion_kernels.attention.second import intervals

REMEDY = "pip install 'nvidia-cudnn-frontend>=1.32'"
CAPABILITIES = ((9, 0), (10, 0), (10, 3))
DTYPES = (torch.float16, torch.bfloat16)
# Multiples of 8 up to this, and one more.
MAX_HEAD_DIM, WIDE_HEAD_DIM = 128, 256
# Of addresses and strides, in bytes.
ALIGNMENT, WIDE_ALIGNMENT = 16, 128

_PLANS: Plans[Any] = Plans()


def problem(q: Tensor) -> str:
    """Tell why `cudnn.flex_attention` cannot run for these queries.

    Args:
        q: Queries [B, H, S, D], of which the device, the dtype and the shape count.

    Returns:
        The reason, with what to install where that is it. Nothing if it can run.
    """
    head_dim = q.shape[-1]
    if q.device.type != "cuda":
        return f"q is on {q.device}"
    if _capability(q.device) not in CAPABILITIES:
        major, minor = _capability(q.device)
        takes = ", ".join(f"{one}.{other}" for one, other in CAPABILITIES)
        return f"the compute capability is {major}.{minor}, it takes {takes}"
    if q.dtype not in DTYPES:
        return f"the dtype is {q.dtype}, it takes {DTYPES}"
    if head_dim != WIDE_HEAD_DIM and (head_dim > MAX_HEAD_DIM or head_dim % 8 != 0):
        return f"head_dim is {head_dim}, it takes multiples of 8 up to {MAX_HEAD_DIM}, and {WIDE_HEAD_DIM}"
    if q.numel() == 0:
        return "q is empty"
    if _captures():
        return "its plan of a mask waits for the device, which the capture of a CUDA graph forbids"
    return _missing()


def mask_func(mask: IntervalMask, batch: int, second: tuple[Tensor, IntervalMask] | None = None) -> Tensor:
    """Give a mask in the form that `cudnn.flex_attention` plans from.

    Args:
        mask: The mask, of `batch` rows or of one that all share.
        batch: Rows of the queries.
        second: Queries that see more keys, and their mask.

    Returns:
        int32 [1, 3, batch * S], contiguous: F0, F1 and F2 of the queries of all rows, one row after the other. The
        keys are counted from the start of the query's own row. It shares no memory with the mask. With `second` it is
        int32 [1, 5, batch * S].
    """
    bounds = [bound.expand(batch, -1).reshape(-1) for pair in intervals(mask, second) for bound in pair]
    functions = torch.stack([torch.zeros_like(bounds[0]), *bounds])
    # Sorted integers show the same keys: an empty interval inside the other one merely cuts it in two that touch.
    return (functions if second is None else functions.sort(dim=0).values.contiguous())[None]


def make_plan(
    mask: IntervalMask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    second: tuple[Tensor, IntervalMask] | None = None,
    *,
    backward: bool,
) -> Any:
    """Make the library's plan for a mask. Waits for the device.

    Args:
        mask: The mask.
        q: Queries [B, H, S, D], of which the shape, the dtype and the device count.
        k: Keys [B, K, N, D], of which the same counts.
        v: Values, of the shape of `k`.
        second: Queries that see more keys, and their mask.
        backward: Whether gradients will be asked for.

    Returns:
        A MaskPlan, good for all tensors of these shapes. It does not refer to the masks.
    """
    alike = (_aligned(x.detach().transpose(1, 2)) for x in (q, k, v))
    return _library().create_mask_plan(mask_func(mask, q.shape[0], second), *alike, build_backward=backward)


@torch.compiler.disable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    second: tuple[Tensor, IntervalMask] | None = None,
    *,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend with `cudnn.flex_attention`. A compiler leaves it out of its graph.

    Args:
        q: Queries [B, H, S, D]. What is not laid out in multiples of 16 bytes is copied.
        k: Keys [B, K, N, D].
        v: Values, of the shape of `k`.
        mask: Over S queries and N keys.
        scale: Of the scores.
        second: Queries that see more keys, and their mask.
        deterministic: Gradients with the same bits on every run.

    Returns:
        The output [B, H, S, D], laid out as [B, S, H, D] and differentiable, and the natural log-sum-exp [B, H, S],
        without gradient. A query that sees nothing gets 0 and minus infinity, as the library defines it.
    """
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    key = (q.shape, k.shape, q.dtype, backward)
    plan = _PLANS.of(
        (mask, *(second or ())), key, lambda: make_plan(mask, q, k, v, second, backward=backward)
    )
    out, lse = _library().flex_attn_func(
        *(_aligned(x.transpose(1, 2)) for x in (q, k, v)),
        mask_plan=plan,
        softmax_scale=scale,
        deterministic=deterministic,
        return_lse=True,
    )
    return _AlignedGradient.apply(out).transpose(1, 2), lse.detach()


class _AlignedGradient(torch.autograd.Function):
    """Passes a tensor on, and its gradient in a layout that the library takes: it does not copy by itself."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        return _aligned(grad_out)


def _aligned(x: Tensor) -> Tensor:
    """[B, S, H, D] with addresses and strides as the library wants them, copied only where they are not."""
    alignment = WIDE_ALIGNMENT if x.shape[-1] == WIDE_HEAD_DIM else ALIGNMENT
    strides = x.stride()
    fits = strides[-1] == 1 and x.data_ptr() % alignment == 0
    if fits and all(stride * x.element_size() % alignment == 0 for stride in strides[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _library() -> Any:
    """The one place that imports it."""
    return importlib.import_module("cudnn.flex_attention")


@functools.cache
def _import_failure() -> str:
    try:
        _library()
    except Exception as error:  # it is experimental: what its own dependencies lack shows when it is imported
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


# What a compiler is to take as fixed rather than trace.
@torch.compiler.assume_constant_result
def _missing() -> str:
    if importlib.util.find_spec("cudnn") is None:
        return f"nvidia-cudnn-frontend is not installed ({REMEDY})"
    failure = _import_failure()
    return f"cudnn.flex_attention cannot be imported, {failure} ({REMEDY})" if failure else ""


@torch.compiler.assume_constant_result
def _captures() -> bool:
    return torch.cuda.is_current_stream_capturing()


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU, and (0, 0) for others."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
