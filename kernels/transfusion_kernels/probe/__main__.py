"""`python -m transfusion_kernels.probe`: find out which kernels give right results here, one line each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from transfusion_kernels import dispatch
from transfusion_kernels.probe import LIMIT_SECONDS, Subject, Verdict, verdict_on

NOT_RIGHT, NO_DEVICE = 3, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe and print. Returns 0 if all kernels are right, 3 if not, 2 if there is nothing to probe."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU here, so there is nothing to probe", file=sys.stderr)
        return NO_DEVICE
    if device.type == "cpu" and not dispatch.interprets():
        print("kernels run on a CPU with TRITON_INTERPRET=1 alone", file=sys.stderr)
        return NO_DEVICE
    subjects = [
        Subject.of(implementation, head_dim, dtype, device)
        for implementation, head_dim, dtype in dispatch.shipped(device)
        if implementation in (options.implementation or dispatch.PROBED)
        and head_dim in (options.head_dim or (head_dim,))
        and dtype in ([getattr(torch, name) for name in options.dtype or ()] or (dtype,))
    ]
    if not subjects:
        print("no such kernels are shipped for this device", file=sys.stderr)
        return NO_DEVICE

    def probe(subject: Subject) -> Verdict:
        found = verdict_on(
            subject,
            str(device),
            dispatch.cache_folder(),
            again=options.again,
            seconds=options.seconds,
            variables=dispatch.child_variables(),
        )
        assert found is not None
        return found

    code = 0
    with ThreadPoolExecutor(options.jobs) as threads:
        for subject, found in zip(subjects, threads.map(probe, subjects), strict=True):
            print(f"{subject.kernels}: {found} ({found.seconds:g} s, {found.date})", flush=True)
            code = code if found.right else NOT_RIGHT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_kernels.probe",
        description="Find out which attention kernels give right results on this GPU, each in a process of its own. "
        "Exit code 0: all do. 3: not all. 2: nothing to probe.",
    )
    parser.add_argument("--implementation", nargs="+", choices=dispatch.PROBED, help="all unless given")
    parser.add_argument("--head-dim", nargs="+", type=int, help="all unless given")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "float16", "bfloat16"), help="all unless given"
    )
    parser.add_argument("--device", default="cuda", help="such as cuda:1")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="the limit of each probe")
    parser.add_argument("--jobs", type=int, default=1, help="how many probes run side by side")
    parser.add_argument("--again", action="store_true", help="probe also what is on record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
