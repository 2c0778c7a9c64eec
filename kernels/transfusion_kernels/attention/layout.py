"""The mask as data: for each query the range of keys it sees, and what the kernels derive from it.

Shape suffixes: B rows of the mask (the batch, or 1 for a mask that all rows share), S query positions,
N key positions, T tiles of `TILE_ROWS` positions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# The granularity of the orders in which tiles are started. Every kernel's own tile divides it, so that one
# order, made once per mask, serves them all.
TILE_ROWS = 128
# Below this many visible keys a query, on average, most steps of large tiles are masked: small ones waste less.
NARROW_WIDTH = 1024


@dataclass(frozen=True, eq=False, init=False)
class IntervalMask:
    """Which keys each query sees: those in `[first_key, end_key)`.

    A padded position has `first_key == end_key`, namely the number of valid positions, so that the bounds never
    decrease. Its output is 0, its log-sum-exp minus infinity, and its gradients are 0.

    Keys and values must be finite everywhere, padding included. A partly visible tile multiplies hidden values by a
    weight of 0, and 0 times NaN is NaN. `validate(k, v)` checks that, and the values of the bounds.

    Args:
        first_key: int32 [B, S], the first key that each query sees. It never decreases along S. B is the batch, or 1
            where all rows share the mask. The tensor is not copied.
        end_key: The same for one past the last key.
        num_keys: How many keys there are, S unless given. It is larger where a block of queries reads a cache.
        narrow: Whether a query sees fewer than 1,024 keys on average, as in packed short documents. It is a hint for
            speed, and no result depends on it. It is known where there are fewer keys than that, and `to` finds it out
            on the way from the host to a GPU. Give it for a mask that is made on a GPU.

    Raises:
        ValueError: For wrong shapes, dtypes or devices.
    """

    first_key: Tensor
    end_key: Tensor
    num_keys: int
    narrow: bool

    def __init__(
        self, first_key: Tensor, end_key: Tensor, *, num_keys: int | None = None, narrow: bool = False
    ) -> None:
        for name, bound in (("first_key", first_key), ("end_key", end_key)):
            check_tensor(name, bound)
            if bound.dim() != 2:
                raise ValueError(f"{name}: got shape {tuple(bound.shape)}, takes [rows, queries]")
            if bound.dtype != torch.int32:
                raise ValueError(f"{name}: got {bound.dtype}, takes torch.int32")
        if first_key.shape != end_key.shape:
            raise ValueError(
                f"end_key: got shape {tuple(end_key.shape)}, takes first_key's, {tuple(first_key.shape)}"
            )
        if first_key.device != end_key.device:
            raise ValueError(f"end_key: got device {end_key.device}, takes first_key's, {first_key.device}")
        if num_keys is not None and (
            not isinstance(num_keys, int | torch.SymInt) or isinstance(num_keys, bool) or num_keys < 0
        ):
            raise ValueError(f"num_keys: got {num_keys!r}, takes a number of keys, 0 or more")
        object.__setattr__(self, "first_key", first_key)
        object.__setattr__(self, "end_key", end_key)
        num_keys = first_key.shape[1] if num_keys is None else num_keys
        object.__setattr__(self, "num_keys", num_keys)
        object.__setattr__(self, "narrow", narrow or num_keys < NARROW_WIDTH)
        object.__setattr__(self, "_derived", {})

    @staticmethod
    def from_spans(
        document_start: Tensor, image_end: Tensor, *, length: Tensor | None = None, narrow: bool = False
    ) -> IntervalMask:
        """Make the mask of packed documents: causal, bidirectional inside an image, closed between documents.

        It is made on the device of `document_start`, without waiting for it.

        Args:
            document_start: Integers [B, S], where in the row the document of each position starts.
            image_end: Integers [B, S], one past the last position of the image that a position is in, else 0.
            length: Integers [B], how many positions of each row are real. The others are padding. None pads nothing.
            narrow: As for the class.

        Raises:
            ValueError: With the argument's name, for what is no tensor of integers of its shape, all on one device.
        """
        for name, tensor in (
            ("document_start", document_start),
            ("image_end", image_end),
            ("length", length),
        ):
            if name != "length" or tensor is not None:
                _check_integers(name, tensor, device_of=document_start)
        if document_start.dim() != 2:
            raise ValueError(
                f"document_start: got shape {tuple(document_start.shape)}, takes [rows, positions]"
            )
        if image_end.shape != document_start.shape:
            raise ValueError(
                f"image_end: got shape {tuple(image_end.shape)}, takes document_start's, "
                f"{tuple(document_start.shape)}"
            )
        if length is not None and length.shape != document_start.shape[:1]:
            raise ValueError(f"length: got shape {tuple(length.shape)}, takes [{document_start.shape[0]}]")
        if _launches_kernels(document_start):
            from transfusion_kernels.attention.derived import bounds_from_spans

            first_BS, end_BS = bounds_from_spans(document_start, image_end, length)
        else:
            first_BS, end_BS = _bounds_from_spans(document_start, image_end, length)
        return IntervalMask(first_BS, end_BS, narrow=narrow)

    @property
    def device(self) -> torch.device:
        return self.first_key.device

    @property
    def num_queries(self) -> int:
        return self.first_key.shape[1]

    @property
    def first_query(self) -> Tensor:
        """The first query that sees each key, int32 [B, N]."""
        return self._cached("columns", self._columns)[0]

    @property
    def end_query(self) -> Tensor:
        """One past the last query that sees each key, int32 [B, N]. It is `first_query` where none does."""
        return self._cached("columns", self._columns)[1]

    @property
    def query_order(self) -> Tensor:
        """The tiles of queries, int32 [B * T]. Those with most keys come first, so that no long one starts last."""
        return self._cached("query_order", lambda: (longest_first(self.first_key, self.end_key),))[0]

    @property
    def key_order(self) -> Tensor:
        """The tiles of keys, int32 [B * T]. Those with most queries come first."""
        return self._cached("key_order", lambda: (longest_first(self.first_query, self.end_query),))[0]

    def dense(self) -> Tensor:
        """The mask as bool [B, S, N], true where a query sees a key."""
        key_N = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        return (key_N >= self.first_key[..., None]) & (key_N < self.end_key[..., None])

    def visible_pairs(self) -> int:
        """How many (query, key) pairs are visible, over the rows that the mask holds. Waits for the device."""
        return int((self.end_key.long() - self.first_key.long()).sum())

    def flops(self, heads: int, head_dim: int, backward: bool = False) -> int:
        """Floating-point operations of the matrix products over visible pairs. Waits for the device.

        A mask of one row that a batch shares counts once.

        Args:
            heads: Query heads.
            head_dim: Width of a head.
            backward: Count the five products of the backward pass, in place of the two of the forward pass.
        """
        products = 5 if backward else 2
        return 2 * products * heads * head_dim * self.visible_pairs()

    def validate(self, k: Tensor | None = None, v: Tensor | None = None) -> None:
        """Check the bounds, and keys and values if given. Waits for the device.

        On CPU tensors `interval_attention` checks the bounds by itself.

        Args:
            k: [B, K, num_keys, D], keys that must be finite everywhere, padding included.
            v: The same for values.

        Raises:
            ValueError: For a bound that leaves `[0, num_keys]`, decreases, or ends before it starts. For the first
                value that is not finite, with its place and whether any query sees it.
        """
        validate_bounds(self.first_key, self.end_key, self.num_keys)
        for name, tensor in (("k", k), ("v", v)):
            if tensor is not None:
                check_tensor(name, tensor)
                self._validate_finite(name, tensor)

    def _validate_finite(self, name: str, tensor: Tensor) -> None:
        rows = self.first_key.shape[0]
        if tensor.dim() != 4 or tensor.shape[2] != self.num_keys or rows not in (1, tensor.shape[0]):
            batch = "batch" if rows == 1 else rows
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, takes [{batch}, key heads, {self.num_keys}, head_dim]"
            )
        if tensor.device != self.device:
            raise ValueError(f"{name}: got device {tensor.device}, takes the mask's, {self.device}")
        broken_BKND = ~tensor.isfinite()
        if not bool(broken_BKND.any()):
            return
        row, head, position, column = broken_BKND.nonzero()[0].tolist()
        mask_row = row if rows > 1 else 0
        first_S, end_S = self.first_key[mask_row], self.end_key[mask_row]
        seen = bool(((first_S <= position) & (position < end_S)).any())
        raise ValueError(
            f"{name}: got {float(tensor[row, head, position, column])} in row {row}, key head {head}, position "
            f"{position}, which {'queries see' if seen else 'no query sees'}; takes finite numbers everywhere, for "
            "hidden values are multiplied by 0"
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> IntervalMask:
        """Take the mask to another device.

        On a GPU all that the kernels derive from it is made at once, so that layers find it, compiled ones too. Those
        do not notice a bound that is changed in place afterwards. Make another mask for them.

        Args:
            device: Where to.
            non_blocking: As in `Tensor.to`.

        Returns:
            The mask there, which is this one if it is there already.
        """
        first_key = self.first_key.to(device, non_blocking=non_blocking)
        end_key = self.end_key.to(device, non_blocking=non_blocking)
        if first_key is self.first_key and end_key is self.end_key:
            return self
        leaves_host = self.device.type == "cpu" and first_key.device.type != "cpu"
        narrow = self.narrow
        if leaves_host:
            narrow = self.visible_pairs() < NARROW_WIDTH * self.first_key.numel()
        moved = IntervalMask(first_key, end_key, num_keys=self.num_keys, narrow=narrow)
        if moved.device.type == "cuda":
            _ = moved.query_order, moved.key_order
        return moved

    def _columns(self) -> tuple[Tensor, Tensor]:
        if _launches_kernels(self.first_key):
            from transfusion_kernels.attention.derived import columns

            return columns(self.first_key, self.end_key, self.num_keys)
        # Both bounds are non-decreasing, so the queries that see key n are those from the first whose end passes n
        # up to the first whose start passes n.
        key_BN = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        key_BN = key_BN.expand(self.first_key.shape[0], -1).contiguous()
        end_key, first_key = self.end_key.contiguous(), self.first_key.contiguous()
        first_query = torch.searchsorted(end_key, key_BN, right=True, out_int32=True)
        end_query = torch.searchsorted(first_key, key_BN, right=True, out_int32=True)
        return first_query, torch.maximum(first_query, end_query)

    def _cached(self, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Derived tensors, kept for the other layers until a bound is changed in place.

        A compiled function takes those that are kept, and makes the others itself; it knows nothing of changes in
        place, see `to`. A CUDA graph does not take those from before its capture: it must make them anew from the
        bounds of each replay.
        """
        derived: dict[str, tuple[tuple[int, int, bool], tuple[Tensor, ...]]] = self._derived  # type: ignore[attr-defined]
        if torch.compiler.is_compiling():
            return derived[name][1] if name in derived else compute()
        if self.first_key.is_inference() or self.end_key.is_inference():
            return compute()  # inference tensors carry no version
        version = (self.first_key._version, self.end_key._version, _is_captured(self.device))
        kept = derived.get(name)
        if kept is None or kept[0] != version:
            with torch.inference_mode(False):  # what is kept may later be saved for a backward pass
                kept = derived[name] = (version, compute())
        return kept[1]


def check_tensor(name: str, value: Any) -> None:
    """Raise ValueError unless this is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, takes a tensor")


def _check_integers(name: str, value: Any, device_of: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name}: got {value.dtype}, takes integers")
    if value.device != device_of.device:
        raise ValueError(f"{name}: got device {value.device}, takes document_start's, {device_of.device}")


def validate_bounds(first_key: Tensor, end_key: Tensor, num_keys: int) -> None:
    """Raise ValueError unless the bounds, int32 [B, S], are those of an interval mask over `num_keys` keys."""
    if first_key.numel() == 0:
        return
    if first_key.shape[1] > 1:
        _refuse_falls(first_key, end_key)
    lowest, highest = min(first_key[:, 0].tolist()), max(end_key[:, -1].tolist())
    if lowest < 0:
        raise ValueError(f"first_key: got {lowest}, takes keys from 0 to num_keys, {num_keys}")
    if highest > num_keys:
        raise ValueError(f"end_key: got {highest}, takes keys from 0 to num_keys, {num_keys}")
    crossed_BS = end_key < first_key
    if bool(crossed_BS.any()):
        row, position = crossed_BS.nonzero()[0].tolist()
        raise ValueError(
            f"end_key: got {int(end_key[row, position])} at query {position} of row {row}, takes first_key, "
            f"{int(first_key[row, position])}, or more"
        )


def _refuse_falls(first_key: Tensor, end_key: Tensor) -> None:
    for name, bound in (("first_key", first_key), ("end_key", end_key)):
        falls_BS = bound[:, 1:] < bound[:, :-1]
        if bool(falls_BS.any()):
            row, position = falls_BS.nonzero()[0].tolist()
            before, after = bound[row, position : position + 2].tolist()
            raise ValueError(
                f"{name}: got {before} then {after} at queries {position} and {position + 1} of row {row}, "
                "takes bounds that never decrease along a row"
            )


def _bounds_from_spans(
    document_start: Tensor, image_end: Tensor, length: Tensor | None
) -> tuple[Tensor, Tensor]:
    position_S = torch.arange(document_start.shape[1], device=document_start.device, dtype=torch.int32)
    first_BS = document_start.to(torch.int32)
    end_BS = torch.maximum(position_S + 1, image_end.to(torch.int32))
    if length is not None:
        length_B1 = length.to(torch.int32)[:, None]
        first_BS = torch.where(position_S < length_B1, first_BS, length_B1)
        end_BS = torch.where(position_S < length_B1, end_BS, length_B1)
    return first_BS, end_BS


def longest_first(first: Tensor, end: Tensor) -> Tensor:
    """int32 [B * T]: `row * T + tile` for the tiles of intervals [B, S], widest union first."""
    if _launches_kernels(first):
        from transfusion_kernels.attention import derived

        return derived.longest_first(first, end, TILE_ROWS)
    size = first.shape[1]
    start_T = torch.arange(0, size, TILE_ROWS, device=first.device)
    last_T = (start_T + TILE_ROWS).clamp(max=size) - 1
    width_BT = end.index_select(1, last_T) - first.index_select(1, start_T)
    return torch.argsort(width_BT.flatten(), descending=True, stable=True).to(torch.int32)


def _launches_kernels(tensor: Tensor) -> bool:
    """Whether kernels of our own make what is derived: on a GPU with Triton, unless a compiler or a fake looks on."""
    return (
        tensor.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and importlib.util.find_spec("triton") is not None
    )


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _flatten(mask: IntervalMask) -> tuple[list[Any], tuple[int, bool]]:
    return [mask.first_key, mask.end_key], (mask.num_keys, mask.narrow)


def _unflatten(children: Any, context: tuple[int, bool]) -> IntervalMask:
    # A tree may carry placeholders where the tensors were, which the constructor would refuse.
    mask = object.__new__(IntervalMask)
    first_key, end_key = children
    num_keys, narrow = context
    fields = {
        "first_key": first_key,
        "end_key": end_key,
        "num_keys": num_keys,
        "narrow": narrow,
        "_derived": {},
    }
    for name, value in fields.items():
        object.__setattr__(mask, name, value)
    return mask


pytree.register_pytree_node(
    IntervalMask, _flatten, _unflatten, serialized_type_name="transfusion_kernels.IntervalMask"
)
