"""Traces of chosen steps by torch's own profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(trace: Path | None) -> Iterator[Callable[[], None]]:
    """Trace what runs inside: operators with their shapes on the host, kernels on the GPU. None: do nothing.

    Yields the function that, once it is over, writes `trace` (.json.gz, for ui.perfetto.dev or chrome://tracing);
    it raises OSError where that cannot be.
    """
    if trace is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:

        def write() -> None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))

        yield write
