"""Which calls the CPU implementation makes for a mask of packed rows: index tensors, made once per mask.

Shape suffixes: B batch, S positions; R = B * S rows of the whole batch, V the rows among them that see something,
C documents, L padded length of the documents of one call, G slots of one call (documents * L).
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from transfusion_kernels.attention.layout import validate_bounds

# Documents up to this length take an explicit mask: the causal flag saves nothing there, and images need no second
# call.
SHORT_DOCUMENT = 128
SLOTS_WORTH_A_CALL = 192
VECTOR = 16
PLANS_KEPT = 8


@dataclass(frozen=True)
class Bucket:
    """Documents of like length, for one call.

    rows_G: int64, the row that each slot takes, document by document; slots past a document's end repeat its last
        row. None where the documents are whole rows of the batch in order, so that nothing need be gathered.
    into_G: int64, the row that each slot gives its result to; slots past a document's end give it to row R, which
        no one reads. None where rows_G is.
    padding: int64, the slots past their document's end, or None.
    bias: float32 [C, 1, L, L], 0 where visible and minus infinity elsewhere, or None for a causal call.
    """

    rows_G: Tensor | None
    into_G: Tensor | None
    padding: Tensor | None
    bias: Tensor | None
    documents: int
    length: int


@dataclass(frozen=True)
class Images:
    """What tokens of images of one length see beyond themselves, for one call.

    query_rows_G: int64, all but the last token of each image.
    key_rows_G: int64, all tokens of each image, the last repeated up to a length that the kernel likes.
        The repeated ones are hidden, so that their gradients are 0 and may be added to any row.
    bias: float32 [1, 1, queries of an image, keys of an image].
    """

    query_rows_G: Tensor
    key_rows_G: Tensor
    bias: Tensor
    count: int


@dataclass(frozen=True)
class Plan:
    """The calls for a mask, and the rows that see nothing (int64, or None where all see something)."""

    buckets: tuple[Bucket, ...]
    images: tuple[Images, ...]
    empty_rows: Tensor | None

    @property
    def gathers(self) -> bool:
        """Whether any call takes rows out of the batch, rather than the batch as it is."""
        return bool(self.images) or self.buckets[0].rows_G is not None


_kept: list[tuple[Tensor, Tensor, int, Plan | None]] = []
_lock = threading.Lock()


def plan_for(first_key: Tensor, end_key: Tensor, batch: int) -> Plan | None:
    """The plan for bounds [B or 1, S] over S keys, or None where they are not those of packed rows.

    Made once and found again by the values of the bounds, which takes microseconds, so that a mask changed in
    place, copied by a compiler or made again for a recomputed forward can neither mislead nor miss.

    Raises ValueError, once for each new mask, if the bounds are not those of an interval mask.
    """
    with _lock:
        for position, (first, end, rows, plan) in enumerate(_kept):
            if rows == batch and torch.equal(first, first_key) and torch.equal(end, end_key):
                _kept.insert(0, _kept.pop(position))
                return plan
        validate_bounds(first_key, end_key, first_key.shape[1])
        with torch.inference_mode(False):
            plan = make_plan(first_key.expand(batch, -1), end_key.expand(batch, -1))
            _kept.insert(0, (first_key.clone(), end_key.clone(), batch, plan))
        del _kept[PLANS_KEPT:]
        return plan


def make_plan(first_BS: Tensor, end_BS: Tensor) -> Plan | None:
    """The plan for valid bounds, or None where they are not those of packed rows."""
    size = first_BS.shape[1]
    row_BS = torch.arange(first_BS.numel()).view(first_BS.shape)
    # Bounds as rows of the whole batch.
    first_R = (first_BS + row_BS[:, :1]).flatten()
    end_R = (end_BS + row_BS[:, :1]).flatten()
    row_V, first_V, end_V, empty_rows = row_BS.flatten(), first_R, end_R, None
    sees_R = first_R < end_R
    if not bool(sees_R.all()):
        empty_rows = (~sees_R).nonzero().flatten()
        row_V = sees_R.nonzero().flatten()
        first_V, end_V = first_R[row_V], end_R[row_V]
    if row_V.numel() == 0 or not _is_packed(row_V, first_V, end_V, first_R, end_R):
        return None

    starts_V = first_V == row_V
    start_C = row_V[starts_V]
    document_V = starts_V.cumsum(0) - 1
    length_C = torch.bincount(document_V, minlength=start_C.numel())
    images = _images(row_V, end_V, length_C[document_V])
    lengths = length_C.tolist()
    if lengths == [size] * first_BS.shape[0]:
        whole = _bucket(start_C, length_C, size, end_R)
        return Plan((Bucket(None, None, None, whole.bias, len(lengths), size),), images, None)

    padded_C = torch.tensor(_padded_lengths(lengths))
    buckets = []
    for length in torch.unique(padded_C).tolist():
        chosen = (padded_C == length).nonzero().flatten()
        buckets.append(_bucket(start_C[chosen], length_C[chosen], length, end_R))
    return Plan(tuple(buckets), images, empty_rows)


def _is_packed(row_V: Tensor, first_V: Tensor, end_V: Tensor, first_R: Tensor, end_R: Tensor) -> bool:
    """Whether these rows are causal documents whose images see all of themselves and nothing later."""
    if not bool(((first_V <= row_V) & (row_V < end_V)).all()):
        return False
    last_V = end_V - 1
    starts_document_V = (first_R[first_V] == first_V) & (end_R[first_V] > first_V)
    ends_image_V = (end_R[last_V] == end_V) & (first_R[last_V] == first_V)
    return bool((starts_document_V & ends_image_V).all())


def _padded_lengths(lengths: list[int]) -> list[int]:
    """For each document the length of the call it goes into: rounded up, so that a call holds many of them.

    Lengths that few short documents have go with the next, where a call costs more than their padding.
    """
    rounded = {length: _round_up(length) for length in set(lengths)}
    documents = Counter(rounded[length] for length in lengths)
    step_up: dict[int, int] = {}
    short = sorted(length for length in documents if length <= SHORT_DOCUMENT)
    for length, longer in pairwise(short):
        if documents[length] * longer <= SLOTS_WORTH_A_CALL:
            documents[longer] += documents[length]
            step_up[length] = longer
    for length in reversed(short):
        if length in step_up:
            step_up[length] = step_up.get(step_up[length], step_up[length])
    return [step_up.get(rounded[length], rounded[length]) for length in lengths]


def _round_up(length: int) -> int:
    # The flash kernel takes longer over 24 or 40 keys than over the next multiple of its vectors.
    step = VECTOR if length <= 256 else 64
    return -(-length // step) * step


def _bucket(start_C: Tensor, length_C: Tensor, length: int, end_R: Tensor) -> Bucket:
    slot_L = torch.arange(length)
    rows_CL = torch.minimum(slot_L, length_C[:, None] - 1) + start_C[:, None]
    past_end_CL = slot_L >= length_C[:, None]
    padding = past_end_CL.flatten().nonzero().flatten()
    into_CL = rows_CL.masked_fill(past_end_CL, end_R.numel())
    bias = None
    if length <= SHORT_DOCUMENT:
        # For each number of keys the row that shows as many: quicker than to compare every pair.
        shown_L = _bias(slot_L >= torch.arange(length + 1)[:, None])
        end_CL = end_R[rows_CL] - start_C[:, None]
        bias = shown_L.index_select(0, end_CL.flatten()).view(-1, 1, length, length)
    return Bucket(
        rows_CL.flatten(),
        into_CL.flatten(),
        padding if padding.numel() else None,
        bias,
        start_C.numel(),
        length,
    )


def _images(row_V: Tensor, end_V: Tensor, document_length_V: Tensor) -> tuple[Images, ...]:
    """The images of two tokens or more in documents that take a causal call."""
    # The rows of an image but its last see past themselves, up to the same end: where such a run begins, it does.
    ahead_V = (end_V > row_V + 1) & (document_length_V > SHORT_DOCUMENT)
    begins_V = ahead_V.clone()
    begins_V[1:] &= ~(ahead_V[:-1] & (end_V[:-1] == end_V[1:]))
    begin_I, length_I = row_V[begins_V], (end_V - row_V)[begins_V]
    groups = []
    for length in torch.unique(length_I).tolist():
        begin_C1 = begin_I[length_I == length][:, None]
        query_L, key_L = torch.arange(length - 1), torch.arange(_round_up(length))
        query_rows_CL = begin_C1 + query_L
        key_rows_CL = begin_C1 + key_L.clamp(max=length - 1)
        bias = _bias((key_L <= query_L[:, None]) | (key_L >= length))[None, None]
        groups.append(Images(query_rows_CL.flatten(), key_rows_CL.flatten(), bias, begin_C1.numel()))
    return tuple(groups)


def _bias(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
