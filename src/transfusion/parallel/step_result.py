"""What a step came to: known to the device first, and to the host once it asks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from transfusion.schema import StepResult


class PendingResult:
    """The outcome of an optimiser step, on its way to the host.

    `read` waits until the device has made the step, and for nothing that was begun after it: asked one step later,
    it leaves the device work to do.
    """

    def __init__(
        self, norm: Tensor, skipped: Tensor, module_norms: Mapping[str, float] | None = None
    ) -> None:
        """norm, skipped: 0-dim tensors. module_norms: dropped where the step was skipped."""
        values = torch.stack([norm.double(), skipped.double()])
        self._module_norms = module_norms
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = values

    def read(self) -> StepResult:
        """The same on every call. A norm that is not finite is told as infinite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, skipped = self._values.tolist()
        return StepResult(
            gradient_norm=norm if math.isfinite(norm) else math.inf,
            skipped=bool(skipped),
            module_norms=None if skipped or self._module_norms is None else dict(self._module_norms),
        )
