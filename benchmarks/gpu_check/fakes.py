"""Stands in for a part of a rehearsal: a kernel that hangs, and an illegal access that ends its process.

    python -m gpu_check.fakes hang|abort|grow RESULT     in place of a command
    python -m gpu_check.fakes probe-hang|probe-abort -   a real probe of a kernel that does so

Each tells something before, as a real part would. The one that hangs does not heed SIGTERM, and has a child in a
session of its own that holds its output open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_check.record import write_json

ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"
LIMIT_SECONDS = 3.0
KINDS = ("hang", "abort", "grow")
_GROWS, _GROWING_SECONDS = 4, 0.25
# What the process of a probe tells before it launches.
_STAGE = (
    'print("\\ntransfusion-probe " + \'{"stage": "waiting for forward at 300 positions"}\', flush=True); '
)
_PROBES = {
    "probe-hang": _STAGE + "import time; time.sleep(1e6)",
    "probe-abort": _STAGE
    + f"import os, sys; print({ILLEGAL_ACCESS!r}, file=sys.stderr, flush=True); os.abort()",
}


def main(kind: str, result: str) -> int:
    """Do what `kind` says."""
    if kind in _PROBES:
        return probe(_PROBES[kind])
    out = Path(result)
    for number in range(_GROWS):
        write_json({"figures": list(range(number + 1))}, out)
        print(f"figure {number}", flush=True)
        if kind == "grow":
            time.sleep(_GROWING_SECONDS)
    if kind == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1e6)"], start_new_session=True)
        time.sleep(1e6)
    if kind == "abort":
        print(ILLEGAL_ACCESS, file=sys.stderr, flush=True)
        os.abort()
    return 0


def probe(program: str) -> int:
    """Put on record what a probe finds whose process runs `program` in place of the kernels."""
    import torch

    from transfusion_kernels import dispatch
    from transfusion_kernels.probe import Subject, verdict_on

    def command(subject: Subject, device: str, seconds: float) -> Sequence[str]:
        return [sys.executable, "-S", "-c", program]

    device = torch.device("cpu")
    subject = Subject.of("triton", 32, torch.float32, device)
    print(verdict_on(subject, "cpu", dispatch.cache_folder(), seconds=1.0, again=True, command=command))
    return 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
