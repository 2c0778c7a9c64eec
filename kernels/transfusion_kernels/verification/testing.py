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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    grad_out: Tensor,
    scale: float | None = None,
    second: tuple[Tensor, IntervalMask] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The reference in float64: output, log-sum-exp, and the gradients of q, k and v."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = reference_attention(q, k, v, mask, scale, second)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out.double())
    return out.detach(), lse, (dq, dk, dv)


def paged(k: Tensor, v: Tensor, slots: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, K, N, D] on pages in a random order, and the int32 block table [B, pages of a row].

    Pages are [K, slots, D], one more than are needed; what no key is written to holds NaN, and no row of the table
    ends before its keys do.
    """
    batch, _, keys, _ = k.shape
    per_row = -(-keys // slots)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(batch * per_row + 1, generator=generator)[: batch * per_row].view(batch, per_row)
    caches = []
    for x in (k, v):
        padded = x.new_full((batch, x.shape[1], per_row * slots, x.shape[3]), float("nan"))
        padded[:, :, :keys] = x
        pages = x.new_full((batch * per_row + 1, x.shape[1], slots, x.shape[3]), float("nan"))
        pages[table.flatten()] = padded.unflatten(2, (per_row, slots)).transpose(1, 2).flatten(0, 1)
        caches.append(pages)
    return caches[0], caches[1], table.to(torch.int32)


def without_the_unseen(x: Tensor, mask: IntervalMask) -> tuple[Tensor, Tensor]:
    """Keys or values [B, K, N, D] twice: with NaN, and with 0, outside the bounds of each row."""
    key = torch.arange(mask.num_keys)
    unseen = ((key < mask.first_key[:, :1]) | (key >= mask.end_key[:, -1:]))[:, None, :, None]
    return x.masked_fill(unseen, float("nan")), x.masked_fill(unseen, 0.0)


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


def random_layout(rows: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed rows: where documents start, where images end, and an id of the document and the image (or -1)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    start, end = torch.zeros(2, rows, size, dtype=torch.int64)
    document, image = torch.zeros(rows, size, dtype=torch.int64), torch.full((rows, size), -1)
    for row in range(rows):
        position, count = 0, 0
        while position < size:
            document_end = min(size, position + draw(1, 60))
            start[row, position:document_end] = position
            document[row, position:document_end] = count
            cursor = position + draw(0, 5)
            while cursor < document_end:
                image_end = min(document_end, cursor + draw(1, 20))
                end[row, cursor:image_end] = image_end
                image[row, cursor:image_end] = cursor
                cursor = image_end + draw(0, 9)
            position, count = document_end, count + 1
    return start, end, document, image


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


def second_interval(mask: IntervalMask, side: str, batch: int = 1) -> tuple[Tensor, IntervalMask]:
    """Every third query of a mask, in each row others and as many, with keys that it does not see: a second interval.

    Args:
        mask: The first.
        side: "before" takes half of the keys before a query's first, "after" all from its end.
        batch: Rows to name queries for, where those of the mask are one.
    """
    rows, size = max(batch, mask.first_key.shape[0]), mask.num_queries
    count = (size + 1) // 3
    rows_BM = torch.stack(
        [torch.arange(count) * 3 + min(row % 3, size - 3 * count + 2) for row in range(rows)]
    )
    first, end = (x.expand(rows, -1).gather(1, rows_BM) for x in (mask.first_key, mask.end_key))
    bounds = (first // 2, first) if side == "before" else (end, torch.full_like(end, mask.num_keys))
    return rows_BM, IntervalMask(*(bound.contiguous() for bound in bounds), num_keys=mask.num_keys)
