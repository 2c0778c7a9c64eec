"""The flight recorder of torch.distributed: the newest collectives of this process, and those it still waits in."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
import torch.distributed as dist


def flight_record() -> dict[str, Any]:
    """The recorder's own JSON, newest collective last; empty where there is no process group or no recorder."""
    # It has no public name, and builds of torch without distributed lack it.
    recorder = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if recorder is None or not dist.is_initialized():
        return {}
    record: dict[str, Any] = json.loads(recorder())
    return record


def waiting_in(record: dict[str, Any]) -> list[str]:
    """The collectives that were begun and have not ended, in words."""
    now = time.time_ns()
    return [
        f"{entry['profiling_name']} of {sum(map(math.prod, entry['input_sizes'])):,} elements, number"
        f" {entry['collective_seq_id']} of its group, for {(now - entry['time_created_ns']) / 1e9:.0f} s"
        for entry in record.get("entries", [])
        if not entry.get("retired", True)
    ]


def stuck_seconds(record: dict[str, Any]) -> float:
    """How long ago the newest collective was begun, if it has not ended; 0 where it has, or there is none.

    Of a process that goes on, however slowly, the newest collective is never old.
    """
    entries = record.get("entries", [])
    if not entries or entries[-1].get("retired", True):
        return 0.0
    return max(0.0, (time.time_ns() - int(entries[-1]["time_created_ns"])) / 1e9)
