"""Finds out more about kernels that a probe found wrong or hanging: which case, which result, which rows.

    python -m gpu_check.diagnose --kernels hopper-128 ... --out FILE

Each step runs in a process of its own with CUDA_LAUNCH_BLOCKING=1: forward alone, then with either backward, at a few
lengths. Where NVIDIA's compute-sanitizer is installed the forward runs under that too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_check.record import read_json, write_json
from limits import DTYPES, find_device
from transfusion_kernels.probe.child import (
    CACHES,
    INTERPRETED_CACHES,
    THRESHOLDS,
    Case,
    Wrong,
    check_cache,
    error_of,
    make_inputs,
    make_mask,
    poisoned_memory,
)

PASSES = ("forward", "backward", "deterministic")
LENGTHS, INTERPRETED_LENGTHS = (128, 300, 2048), (40,)
LIMIT_SECONDS, SANITIZED_SECONDS, JOBS = 20.0, 50.0, 4
# Rows that are told one by one, and rows of a tile in which wrong ones are counted.
WORST, TILE = 8, 64


@dataclass(frozen=True)
class Step:
    """What one process tries.

    Attributes:
        implementation: "hopper", "triton" or "decode".
        head_dim: Width of a head.
        length: Positions of a row.
        direction: Of `PASSES`.
        sanitized: Whether it runs under compute-sanitizer.
    """

    implementation: str
    head_dim: int
    length: int
    direction: str
    sanitized: bool = False

    def __str__(self) -> str:
        under = " under compute-sanitizer" if self.sanitized else ""
        return f"{self.implementation} {self.head_dim}, {self.direction} at {self.length}{under}"


def steps_for(kernels: Sequence[str], device: torch.device) -> list[Step]:
    """What to try, small and simple things first."""
    on_gpu = device.type == "cuda"
    found = []
    for kernel in kernels:
        implementation, _, head_dim = kernel.rpartition("-")
        if implementation == "decode":
            found.append(Step(implementation, int(head_dim), 0, "forward"))
            continue
        lengths = LENGTHS if on_gpu else INTERPRETED_LENGTHS
        found += [Step(implementation, int(head_dim), *each) for each in itertools.product(lengths, PASSES)]
        if shutil.which("compute-sanitizer") and on_gpu:
            found.append(Step(implementation, int(head_dim), 300, "backward", sanitized=True))
    return found


def examine(step: Step, dtype: torch.dtype, device: torch.device, out: Path) -> None:
    """What a process of its own does. Writes what it is at before it launches."""
    found: dict[str, Any] = {"stage": "making inputs"}
    write_json(found, out)
    if step.implementation == "decode":
        found |= _examine_caches(step.head_dim, dtype, device)
    else:
        # The longest has more tiles than a GPU works on at a time.
        case = Case(step.length, length=step.length - step.length // 40, batch=2, heads=6, key_heads=3)
        mask = make_mask(case, device)
        inputs = make_inputs(case, step.head_dim, dtype, mask)
        deterministic = step.direction == "deterministic"
        write_json(found | {"stage": "forward"}, out)
        with poisoned_memory():
            results = inputs.forward(step.implementation, deterministic)
            _wait(device)
            if step.direction != "forward":
                write_json(found | {"stage": "backward"}, out)
                results |= inputs.backward(results["out"])
                _wait(device)
        for name, result in results.items():
            found[name] = _compare(name, result.detach(), inputs.exact[name], THRESHOLDS[dtype])
    write_json(found | {"stage": "done"}, out)


def _examine_caches(head_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    found = {}
    for keys, queries in CACHES if device.type == "cuda" else INTERPRETED_CACHES:
        try:
            check_cache(keys, queries, head_dim, dtype, device)
            told = "right"
        except Wrong as error:
            told = str(error)
        found[f"{queries} queries against {keys}"] = told
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compare(name: str, found: Tensor, exact: Tensor, threshold: float) -> dict[str, Any]:
    """How far a result is off, and where: [B, H, S, D], or [B, H, S] for the log-sum-exp."""
    found = found.double()
    error = error_of(name, found, exact)
    told: dict[str, Any] = {"error": error, "right": bool(error < threshold), "nan": int(found.isnan().sum())}
    if told["right"]:
        return told
    if name == "lse":
        found, exact = found.nan_to_num(neginf=-1e4)[..., None], exact.nan_to_num(neginf=-1e4)[..., None]
    off = (found - exact).norm(dim=-1).nan_to_num(nan=float("inf"))
    typical = exact.norm(dim=-1).square().mean().sqrt()
    wrong = off > 5 * threshold * typical
    told["wrong_rows"], told["rows"] = int(wrong.sum()), wrong.numel()
    by_tile = wrong.any(dim=1).any(dim=0)
    tiles = [int(tile) for tile in by_tile.nonzero().flatten().div(TILE, rounding_mode="floor").unique()]
    told["tiles_of_64"] = tiles[:64]
    told["heads"] = [int(head) for head in wrong.any(dim=2).any(dim=0).nonzero().flatten()]
    worst = off.flatten().topk(min(WORST, off.numel())).indices
    told["worst"] = [
        {
            "row": [int(index) for index in torch.unravel_index(place, off.shape)],
            "off": float(off.flatten()[place]),
            "typical": float(typical),
            "found": found.flatten(0, 2)[place][:4].tolist(),
            "exact": exact.flatten(0, 2)[place][:4].tolist(),
        }
        for place in worst
    ]
    return told


def run_step(step: Step, number: int, dtype: str, device: torch.device, out: Path) -> dict[str, Any]:
    """Run one step in a process of its own."""
    path, log = out.with_suffix("") / f"{number}.json", out.with_suffix("") / f"{number}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = ["compute-sanitizer", "--tool", "memcheck", "--print-limit", "20"] if step.sanitized else []
    command += [sys.executable, "-m", "gpu_check.diagnose", "--device", str(device), "--dtype", dtype]
    command += ["--step", step.implementation, str(step.head_dim), str(step.length), step.direction]
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--out", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"},
        )
        try:
            code = process.wait(SANITIZED_SECONDS if step.sanitized else LIMIT_SECONDS)
            ended = "ended" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = "hung"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    found = {**asdict(step), "ended": ended, "seconds": round(time.monotonic() - begin, 1)}
    if ended != "ended" or step.sanitized:
        found["tail"] = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return found | {"found": read_json(path)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", default=[], help="such as hopper-128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many steps run side by side")
    parser.add_argument("--step", nargs=4, help="implementation, head width, length and pass: try it here")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = find_device(given.device)
    if given.step:
        implementation, head_dim, length, direction = given.step
        examine(
            Step(implementation, int(head_dim), int(length), direction),
            DTYPES[given.dtype],
            device,
            given.out,
        )
        return 0
    found: list[dict[str, Any]] = []
    steps = steps_for(given.kernels, device)
    with ThreadPoolExecutor(given.jobs) as threads:
        ran = threads.map(
            lambda pair: run_step(pair[1], pair[0], given.dtype, device, given.out), enumerate(steps)
        )
        for step, outcome in zip(steps, ran, strict=True):
            found.append(outcome)
            write_json({"steps": found}, given.out)
            print(f"{step}: {outcome['ended']} {told(outcome['found'])}", flush=True)
    return 0


def told(found: dict[str, Any] | None) -> str:
    """What a step found, in short."""
    if not found:
        return "nothing written"
    results = {name: result for name, result in found.items() if isinstance(result, dict)}
    if found["stage"] != "done":
        return f"at {found['stage']}"
    wrong = [f"{name} by {result['error']:.2g}, tiles {result['tiles_of_64']}" for name, result in results.items()
             if not result["right"]]  # fmt: skip
    texts = [f"{name}: {text}" for name, text in found.items() if isinstance(text, str) and name != "stage"]
    return "; ".join([*wrong, *texts]) or "right"


if __name__ == "__main__":
    sys.exit(main())
