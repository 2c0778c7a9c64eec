"""What rivals make of a mask before they attend, kept as long as the mask lives and its bounds stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

from transfusion_kernels.attention.layout import IntervalMask

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """The plans of one rival. A plan must not refer to its mask, or neither would ever be dropped."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[IntervalMask, dict[Hashable, tuple[Hashable, Plan]]] = (
            WeakKeyDictionary()
        )

    def of(self, mask: IntervalMask, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """Find the plan of a mask, or make it.

        A bound that was changed in place makes the plan anew. So does a CUDA graph, whose replays bring other bounds.

        Args:
            mask: The mask.
            key: What else the plan depends on, such as the shapes of the queries and keys.
            make: Makes the plan from the bounds.
        """
        first_key, end_key = mask.first_key, mask.end_key
        if first_key.is_inference() or end_key.is_inference():
            return make()  # inference tensors carry no version
        captured = mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        version = (first_key._version, end_key._version, captured)
        of_mask = self._kept.setdefault(mask, {})
        if key not in of_mask or of_mask[key][0] != version:
            with torch.inference_mode(False), torch.no_grad():  # it may later be saved for a backward pass
                of_mask[key] = (version, make())
        return of_mask[key][1]
