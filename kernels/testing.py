"""What the tests of every implementation share: masks, errors as one number, poisoned memory, exact gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.attention.reference import reference_attention

Span = tuple[int, int]


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The norm of the difference over the norm of what is expected, in float64; NaN anywhere gives NaN.

    floor: the least norm to divide by, for what may be exactly 0, such as the gradient of the scores of a query with
    one key. Where both are 0 the norm of the difference is returned.
    """
    difference = (actual.detach().double() - expected.detach().double()).norm()
    norm = max(float(expected.detach().double().norm()), floor)
    return float(difference) / norm if norm > 0 else float(difference)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that is allocated but not initialised with NaN, so that what a kernel fails to write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, grad_out: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The reference in float64: output, log-sum-exp, and the gradients of q, k and v."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = reference_attention(q, k, v, mask, scale)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out.double())
    return out.detach(), lse, (dq, dk, dv)


def mask_of(
    size: int, documents: Sequence[Span], images: Sequence[Span] = (), *, length: int | None = None
) -> IntervalMask:
    """A mask of one row of `size` positions, from its documents, images and, if it is padded, its valid length."""
    document_start, image_end = torch.arange(size), torch.zeros(size, dtype=torch.int64)
    for start, end in documents:
        document_start[start:end] = start
    for start, end in images:
        image_end[start:end] = end
    lengths = None if length is None else torch.tensor([length])
    return IntervalMask.from_spans(document_start[None], image_end[None], length=lengths)


def mask_families(size: int) -> dict[str, IntervalMask]:
    """Masks [2, size] (or near it, or [1, ...] to be shared) that between them reach every edge of the kernels.

    The first row is the family's; the second is plain causal unless the name says otherwise. `size` is 64 or more.
    """
    causal = mask_of(size, [(0, size)])
    third, tenth = size // 3, size // 10
    tiny = [(start, min(start + 7, size)) for start in range(0, size, 7)]
    rows = {
        "causal": causal,
        "one_token_images": mask_of(size, [(0, size)], [(5, 6), (40, 41)]),
        "images_at_both_ends": mask_of(size, [(0, size)], [(0, third), (size - third, size)]),
        "images_fill_documents": mask_of(size, [(0, third), (third, size)], [(0, third), (third, size)]),
        "image_longer_than_a_block": mask_of(size, [(0, size)], [(tenth, size - tenth)]),
        "adjacent_images": mask_of(size, [(0, size)], [(10, 26), (26, 42), (42, 43), (43, size - 2)]),
        "tiny_documents": mask_of(size, tiny, [(1, 4), (15, 20), (28, 35)]),
        "documents_of_one": mask_of(size, []),
        "uneven_documents": mask_of(
            size,
            [(0, third), (third, third + 9), (third + 9, size)],
            [(8, third - 4), (third + 2, third + 8)],
        ),
        "padded_tail": mask_of(size, [(0, third), (third, size)], [(third, size - 20)], length=size - 17),
        "padding_only": mask_of(size, [(0, size)], length=0),
    }
    families = {
        name: IntervalMask(*(torch.cat(bounds) for bounds in zip(_bounds(row), _bounds(causal), strict=True)))
        for name, row in rows.items()
    }
    families["shared_row"] = mask_of(size, [(0, third), (third, size)], [(4, 20), (third, third + 30)])
    families["size_one"] = mask_of(1, [(0, 1)])
    position = torch.arange(size, dtype=torch.int32).expand(2, -1)
    families["sliding_window"] = IntervalMask((position - 20).clamp(min=0), position + 1)
    families["block_against_cache"] = _block_against_cache(size, queries=21)
    families["one_query"] = IntervalMask(
        torch.zeros(2, 1, dtype=torch.int32),
        torch.tensor([[size - 5], [9]], dtype=torch.int32),
        num_keys=size,
    )
    return families


def _bounds(mask: IntervalMask) -> tuple[Tensor, Tensor]:
    return mask.first_key, mask.end_key


def _block_against_cache(size: int, queries: int) -> IntervalMask:
    """Rows of a batch that have come to different lengths: text in the first, an image's patches in the second."""
    offset = torch.arange(queries, dtype=torch.int32)
    end_key = torch.stack([size - queries + 1 + offset, torch.full_like(offset, 40)])
    return IntervalMask(torch.zeros_like(end_key), end_key, num_keys=size)
