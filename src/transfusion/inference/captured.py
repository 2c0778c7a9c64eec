"""Calls that come again and again, each launched at once as the CUDA graph of an earlier one of its shape.

A step of a small model is hundreds of kernels, which take longer to launch one by one than to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Tensor]

# A shape is run plainly so often first: what is chosen, compiled or allocated at first use is then ready.
WARM_UPS = 2
# Shapes of one cache. Each graph takes some megabytes of the device.
MOST_GRAPHS = 64


class CapturedCalls:
    """Calls functions of tensors, plainly or as recorded.

    Args:
        record: Makes the recorded form of a function for inputs of the shapes of those given.
    """

    def __init__(self, record: Callable[[Call, tuple[Tensor, ...]], Call] | None = None) -> None:
        self._record = record or _CudaGraphs()
        self._recorded: dict[Hashable, Call] = {}
        self._seen: dict[Hashable, int] = {}
        self._fails = False

    def __call__(self, name: Hashable, function: Call, *inputs: Tensor) -> Tensor:
        """The function's result.

        Args:
            name: Of the function, with all that it depends on beside its inputs and their shapes.
            function: From tensors on the device to one. It waits for nothing and makes no tensor of host values.
            inputs: Its.
        """
        key = (name, *(input.shape for input in inputs))
        if key not in self._recorded:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._fails or self._seen[key] <= WARM_UPS or len(self._recorded) == MOST_GRAPHS:
                return function(*inputs)
            try:
                self._recorded[key] = self._record(function, inputs)
            except RuntimeError as error:
                # Slower, and right.
                self._fails = True
                warnings.warn(
                    f"no CUDA graph can be made, so steps are launched one by one: {error}", stacklevel=2
                )
                return function(*inputs)
        return self._recorded[key](*inputs)


class _CudaGraphs:
    """Records CUDA graphs, which share their memory: what one gives is copied before another is launched."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Call, inputs: tuple[Tensor, ...]) -> Call:
        kept = [input.clone() for input in inputs]
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function(*kept)
        self._pool = graph.pool()

        def launch(*inputs: Tensor) -> Tensor:
            for place, input in zip(kept, inputs, strict=True):
                place.copy_(input)
            graph.replay()
            return output.clone()

        return launch


def next_power_of_two(number: int) -> int:
    """The least power of two that is at least so much."""
    return 1 << (number - 1).bit_length()
