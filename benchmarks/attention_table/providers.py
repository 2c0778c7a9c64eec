"""Who computes attention for attention.py: our kernels, and what else can, where it is installed.

Shape suffixes: B rows, S positions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_table.cases import Inputs
from transfusion_kernels import IntervalMask, explain, interval_attention
from transfusion_kernels.attention.cpu_plan import make_plan
from transfusion_kernels.rivals import cudnn, flex
from verify import Attend

# What a user who tunes FlexAttention on Hopper by hand arrives at. Both of its backward loops take the same tiles.
FLEX_TUNED = {
    "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2,
    "BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64,
}  # fmt: skip
# FlexAttention with the kernels of FlashAttention 4, which must be installed.
FLEX_FLASH = {"BACKEND": "FLASH"}


class Unsupported(Exception):  # noqa: N818  (no failure: not what this provider is for)
    """The provider does not do this case. The message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute it.

    prepare: the function to time, with all that can be made of the mask beforehand. It raises Unsupported.
    build: makes that anew from the spans, as every step of a training has to. It is timed apart.
    ours: memory is poisoned while it is checked, and its failure fails the run.
    slow: it compiles for long, so the others come first.
    """

    name: str
    prepare: Callable[[Inputs], Attend]
    build: Callable[[Inputs], object] | None = None
    ours: bool = False
    slow: bool = False


def _interval(implementation: str, *, deterministic: bool = False) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        try:
            explain(inputs.q, inputs.k, inputs.v, inputs.mask, backend=implementation)
        except ValueError as error:
            raise Unsupported(str(error)) from None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = interval_attention(
                q, k, v, inputs.mask, backend=implementation, deterministic=deterministic
            )
            assert isinstance(out, Tensor)
            return out

        return attend

    return prepare


def _build_interval_mask(inputs: Inputs) -> object:
    mask = _from_spans(inputs)
    if mask.device.type == "cpu":
        return make_plan(mask.first_key, mask.end_key)
    return mask.first_query, mask.end_query, mask.query_order, mask.key_order


def _from_spans(inputs: Inputs) -> IntervalMask:
    return IntervalMask.from_spans(inputs.document_start_BS, inputs.image_end_BS)


def _sdpa_causal(backend: SDPBackend, *, gpu_only: bool) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        _needs_causal(inputs)
        if gpu_only:
            _needs_gpu(inputs)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend

    return prepare


def _sdpa_dense(inputs: Inputs) -> Attend:
    dense_B1SS = _build_dense_mask(inputs)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense_B1SS)


def _build_dense_mask(inputs: Inputs) -> Tensor:
    return _from_spans(inputs).dense()[:, None]


def _flash_attention(module: str) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        _needs_causal(inputs)
        _needs_gpu(inputs)
        attend = _imported(module).flash_attn_func

        def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return causal_attention

    return prepare


def _flex(options: dict[str, Any] | None) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        _refuse(flex.problem(inputs.q))
        if options == FLEX_FLASH:
            _imported("flash_attn.cute")
        _let_backward_repeat()
        scale = inputs.q.shape[-1] ** -0.5
        return lambda q, k, v: flex.attention(q, k, v, inputs.mask, scale, options=options)[0]

    return prepare


def _build_block_mask(inputs: Inputs) -> object:
    return flex.block_mask(_from_spans(inputs))


def _let_backward_repeat() -> None:
    """Compiled functions otherwise give away memory in their first backward, and here the same one runs many times."""
    import torch._functorch.config

    settings: Any = torch._functorch.config
    settings.donated_buffer = False


def _cudnn_flex(inputs: Inputs) -> Attend:
    _refuse(cudnn.problem(inputs.q))
    scale = inputs.q.shape[-1] ** -0.5
    return lambda q, k, v: cudnn.attention(q, k, v, inputs.mask, scale)[0]


def _build_cudnn_plan(inputs: Inputs) -> object:
    return cudnn.make_plan(_from_spans(inputs), inputs.q, inputs.k, inputs.v, backward=True)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"cannot be imported: {error}") from None


def _needs_causal(inputs: Inputs) -> None:
    if not inputs.is_causal:
        raise Unsupported("cannot express this mask")


def _needs_gpu(inputs: Inputs) -> None:
    if not inputs.q.is_cuda:
        raise Unsupported("runs on GPUs only")


def _refuse(problem: str) -> None:
    if problem:
        raise Unsupported(problem)


# In the order in which they are measured.
PROVIDERS = (
    Provider("ours-hopper", _interval("hopper"), _build_interval_mask, ours=True),
    Provider("ours-triton", _interval("triton"), _build_interval_mask, ours=True),
    Provider("ours-triton-split", _interval("triton", deterministic=True), _build_interval_mask, ours=True),
    Provider("ours-cpu", _interval("cpu"), _build_interval_mask, ours=True),
    Provider("sdpa-cudnn-causal", _sdpa_causal(SDPBackend.CUDNN_ATTENTION, gpu_only=True)),
    Provider("sdpa-flash-causal", _sdpa_causal(SDPBackend.FLASH_ATTENTION, gpu_only=False)),
    Provider("flash-attn-3", _flash_attention("flash_attn_interface")),
    Provider("flash-attn-4", _flash_attention("flash_attn.cute")),
    Provider("flash-attn-2", _flash_attention("flash_attn")),
    Provider("sdpa-dense", _sdpa_dense, _build_dense_mask),
    Provider("flex", _flex(None), _build_block_mask, slow=True),
    Provider("flex-tuned", _flex(FLEX_TUNED), _build_block_mask, slow=True),
    Provider("cudnn-flex", _cudnn_flex, _build_cudnn_plan, slow=True),
    Provider("flex-flash", _flex(FLEX_FLASH), _build_block_mask, slow=True),
)
