"""The tensor memory accelerator's operations under one name each, whatever Triton 3.6 to 3.9 call them in Gluon.

Older versions lack the name of the adding store, yet compile it.
"""

# What a kernel is given has no Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["tma_add", "tma_load", "tma_store", "tma_store_wait"]


@builtin
def _add(tensor_desc, coord, src, _semantic=None):
    coordinates = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coordinates, src.handle)


def _first_of(*names: str):
    return next(getattr(tma, name) for name in names if name in tma.__all__)


tma_load = _first_of("async_load", "async_copy_global_to_shared")
tma_store = _first_of("async_store", "async_copy_shared_to_global")
tma_add = tma.async_atomic_add if "async_atomic_add" in tma.__all__ else _add
tma_store_wait = tma.store_wait
