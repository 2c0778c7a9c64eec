"""What is made of masks before attention, kept as long as the masks live and their tensors stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from transfusion_kernels.attention.layout import IntervalMask

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """The plans of one kind. A plan must not refer to what it is kept by, or neither would ever be dropped.

    The last owner leads to the one before, and so on, and the first to the plans, so that they go with whichever goes
    first.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakIdKeyDictionary()

    def of(
        self,
        owners: Sequence[IntervalMask | Tensor | None],
        key: Hashable,
        make: Callable[[], Plan],
    ) -> Plan:
        """Find the plan of some masks and tensors, or make it.

        A tensor that was changed in place makes the plan anew. So does a CUDA graph, whose replays bring other bounds.

        Args:
            owners: What the plan is made from, one or more. None stands for what is not there.
            key: What else the plan depends on, such as the shapes of the queries and keys.
            make: Makes the plan.
        """
        present = [owner for owner in owners if owner is not None]
        tensors: list[Tensor] = []
        for owner in present:
            tensors += [owner] if isinstance(owner, Tensor) else [owner.first_key, owner.end_key]
        if any(tensor.is_inference() for tensor in tensors):
            return make()  # inference tensors carry no version
        captured = tensors[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        version = (*(tensor._version for tensor in tensors), captured)
        kept = self._kept
        for owner in reversed(present[1:]):
            if owner not in kept:
                kept[owner] = WeakIdKeyDictionary()
            kept = kept[owner]
        of_first: dict[Hashable, tuple[Hashable, Plan]] = kept.setdefault(present[0], {})
        if key not in of_first or of_first[key][0] != version:
            with torch.inference_mode(False), torch.no_grad():  # it may later be saved for a backward pass
                of_first[key] = (version, make())
        return of_first[key][1]
