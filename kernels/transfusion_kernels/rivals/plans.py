"""What rivals make of masks before they attend, kept as long as the masks live and their tensors stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from transfusion_kernels.attention.layout import IntervalMask

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """The plans of one rival. A plan must not refer to what it is kept by, or neither would ever be dropped.

    A mask leads to its plans. With a second interval the rows lead to its mask, that to the first, and that to the
    plans, so that they go with whichever goes first.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakIdKeyDictionary()

    def of(
        self,
        mask: IntervalMask,
        second: tuple[Tensor, IntervalMask] | None,
        key: Hashable,
        make: Callable[[], Plan],
    ) -> Plan:
        """Find the plan of a mask, or make it.

        A tensor that was changed in place makes the plan anew. So does a CUDA graph, whose replays bring other bounds.

        Args:
            mask: The mask.
            second: Queries that see more keys, and their mask.
            key: What else the plan depends on, such as the shapes of the queries and keys.
            make: Makes the plan from the bounds.
        """
        tensors, kept = [mask.first_key, mask.end_key], self._kept
        if second is not None:
            rows, other = second
            tensors += [rows, other.first_key, other.end_key]
            for owner in second:
                kept = kept.setdefault(owner, WeakIdKeyDictionary())
        if any(tensor.is_inference() for tensor in tensors):
            return make()  # inference tensors carry no version
        captured = mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        version = (*(tensor._version for tensor in tensors), captured)
        of_mask: dict[Hashable, tuple[Hashable, Plan]] = kept.setdefault(mask, {})
        if key not in of_mask or of_mask[key][0] != version:
            with torch.inference_mode(False), torch.no_grad():  # it may later be saved for a backward pass
                of_mask[key] = (version, make())
        return of_mask[key][1]
