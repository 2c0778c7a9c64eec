"""Times variants of the kernels at one length, each in a process of its own, under the causal mask and the mix.

    python -m gpu_check.sweep --seconds 60 --out FILE [--without hopper-128 ...]

Several processes start at once, since starting takes longer than measuring. They take turns on the GPU by a lock. Each
variant is checked against float64 before it is timed, as in the attention table.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_table.cases import Case, Inputs
from gpu_check.record import read_json, write_json
from gpu_check.variants import VARIANTS, Variant, applied
from limits import Timer, find_device, tflops
from transfusion_kernels import interval_attention
from verify import Attend, exact_results, verify

FAMILIES = ("causal", "transfusion")
# What a rehearsal times: the same code, small and on the CPU.
REHEARSED = (Variant("cpu 16", "cpu", 16), Variant("cpu 32", "cpu", 32))
JOBS, CALL_SECONDS = 3, 0.1
# A variant that measures and writes nothing for so long is taken to hang.
SILENT_SECONDS = 15.0
POLL_SECONDS = 0.1


def variants_for(device: torch.device) -> Sequence[Variant]:
    """Those that can run on a device."""
    return VARIANTS if device.type == "cuda" else REHEARSED


def measure(variant: Variant, device: torch.device) -> Iterator[dict[str, Any]]:
    """What is found out about a variant, a mask at a time."""
    on_gpu = device.type == "cuda"
    length, dtype = (8192, "bf16") if on_gpu else (64, "fp32")
    heads = max(1, (2048 if on_gpu else 32) // variant.head_dim)
    timer = Timer(device)
    with applied(variant):
        for family in FAMILIES:
            inputs = Case(family, length, 2, heads, variant.head_dim, dtype).inputs(device)

            def attend(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs = inputs) -> Tensor:
                out = interval_attention(
                    q,
                    k,
                    v,
                    inputs.mask,
                    backend=variant.implementation,
                    deterministic=variant.deterministic,
                )
                assert isinstance(out, Tensor)
                return out

            verdict = verify(attend, inputs, exact_results(inputs), dtype, poison=True)
            found: dict[str, Any] = {"family": family, "length": length, "right": verdict.right}
            found["errors"] = dict(verdict.errors)
            if verdict.right:
                found |= _times(attend, inputs, timer)
            yield found


def _times(attend: Attend, inputs: Inputs, timer: Timer) -> dict[str, Any]:
    q, k, v = inputs.q, inputs.k, inputs.v
    heads, width = q.shape[1], q.shape[3]
    out = attend(q, k, v)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: attend(q, k, v),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), inputs.grad_out, retain_graph=True),
    }
    found = {}
    for name, call in calls.items():
        milliseconds = timer.median_ms(call, CALL_SECONDS)
        speed = tflops(inputs.mask.flops(heads, width, backward=name == "backward"), milliseconds)
        found[name] = {"ms": milliseconds, "tflops": speed}
    return found


def run_one(name: str, device: torch.device, lock: Path, out: Path) -> int:
    """What a process of its own does: measure one variant, once it has the lock."""
    variant = next(each for each in (*VARIANTS, *REHEARSED) if each.name == name)
    found: dict[str, Any] = {"variant": name, "status": "waiting", "cases": []}
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found["status"] = "measuring"
        write_json(found, out)
        for case in measure(variant, device):
            found["cases"].append(case)
            write_json(found, out)
    found["status"] = "ok" if all(case["right"] for case in found["cases"]) else "wrong"
    write_json(found, out)
    return 0


def run_all(device: torch.device, without: Sequence[str], seconds: float, out: Path) -> list[dict[str, Any]]:
    """Measure all variants, some at a time, until the time is over. Keeps `out` up to date."""
    deadline = time.monotonic() + seconds
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    waiting = []
    for number, variant in enumerate(variants_for(device)):
        left_out = f"{variant.implementation}-{variant.head_dim}" in without
        results[variant.name] = {"variant": variant.name, "status": "left out" if left_out else "out of time"}
        if not left_out:
            waiting.append((variant, folder / f"{number}.json"))
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    with contextlib.ExitStack() as stack:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < JOBS:
                variant, path = waiting.pop(0)
                path.unlink(missing_ok=True)
                command = [
                    sys.executable,
                    "-m",
                    "gpu_check.sweep",
                    "--variant",
                    variant.name,
                    "--device",
                    str(device),
                ]
                process = subprocess.Popen([*command, "--lock", str(folder / "lock"), "--out", str(path)])
                stack.callback(_end, process)
                running[variant.name] = process, path
            time.sleep(POLL_SECONDS)
            for name, (process, path) in list(running.items()):
                hangs = _is_silent(path)
                if process.poll() is None and not hangs:
                    continue
                _end(process)
                found = read_json(path) or {"variant": name, "status": "starting"}
                if found["status"] not in ("ok", "wrong"):
                    found["status"] = "hung" if hangs else f"failed, exit code {process.returncode}"
                results[name] = found
                del running[name]
                print(line_of(found), flush=True)
                write_json({"results": list(results.values())}, out)
    for name, (_, path) in running.items():
        results[name] = {"variant": name, **(read_json(path) or {}), "status": "out of time"}
    write_json({"results": list(results.values())}, out)
    return list(results.values())


def _is_silent(path: Path) -> bool:
    """Whether a process that measures has written nothing for too long. One that waits has written nothing at all."""
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > SILENT_SECONDS
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3.0)


def line_of(found: dict[str, Any]) -> str:
    """A variant as a line."""
    speeds = "  ".join(
        f"{case['family']} {case['forward']['tflops']:.3g} + {case['backward']['tflops']:.3g} TFLOP/s"
        for case in found.get("cases", [])
        if "backward" in case
    )
    return f"{found['variant']:<36}{found['status']:<10}{speeds}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="after this nothing goes on")
    parser.add_argument("--without", nargs="*", default=[], help="such as hopper-128, which are left out")
    parser.add_argument("--variant", help="measure this one here")
    parser.add_argument("--lock", type=Path, help="the file of whose lock this one waits")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = find_device(given.device)
    torch.set_num_threads(1)
    if given.variant:
        return run_one(given.variant, device, given.lock, given.out)
    results = run_all(device, given.without, given.seconds, given.out)
    return 0 if any(found["status"] == "ok" for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
