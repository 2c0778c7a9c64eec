"""Calls that come again and again, each launched at once as the CUDA graph of an earlier one of its shape.

A step of a small model is hundreds of kernels, which take longer to launch one by one than to run.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Tensor]

# A shape is run plainly so often first: what is chosen, compiled or allocated at first use is then ready.
WARM_UPS = 2
# Shapes of one cache. Each graph takes some megabytes of the device. The one that was not used for longest gives way.
MOST_GRAPHS = 64
# CUDA records in one thread at a time.
_RECORDING = threading.Lock()


class CapturedCalls:
    """Calls functions of tensors, plainly or as recorded.

    Args:
        record: Makes the recorded form of a function for inputs of the shapes of those given.
    """

    def __init__(self, record: Callable[[Call, tuple[Tensor, ...]], Call] | None = None) -> None:
        self._record = record or _CudaGraphs()
        # The last used last.
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
        call = self._recorded.pop(key, None)
        if call is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._fails or self._seen[key] <= WARM_UPS:
                return function(*inputs)
            if len(self._recorded) == MOST_GRAPHS:
                del self._recorded[next(iter(self._recorded))]
            try:
                call = self._record(function, inputs)
            except RuntimeError as error:
                # Slower, and right.
                self._fails = True
                warnings.warn(
                    f"no CUDA graph can be made, so steps are launched one by one: {error}", stacklevel=2
                )
                return function(*inputs)
        self._recorded[key] = call
        return call(*inputs)


class _CudaGraphs:
    """Records CUDA graphs, which share their memory: what one gives is copied before another is launched."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Call, inputs: tuple[Tensor, ...]) -> Call:
        kept, device = [input.clone() for input in inputs], inputs[0].device
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            # `torch.cuda.graph` would leave this thread on its stream where a recording fails.
            with torch.cuda.stream(stream):
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    output = function(*kept)
                finally:
                    graph.capture_end()
        self._pool = graph.pool()

        def launch(*inputs: Tensor) -> Tensor:
            for place, input in zip(kept, inputs, strict=True):
                place.copy_(input)
            with torch.cuda.device(device):
                graph.replay()
            return output.clone()

        return launch


def next_power_of_two(number: int) -> int:
    """The least power of two that is at least so much."""
    return 1 << (number - 1).bit_length()
