"""Whether NCCL can be started here, and gloo beside it, by a process group of one process over the loopback device."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from gpu_check.record import write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    begin = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        device_id=device if on_gpu else None,
    )
    values = torch.arange(1024.0, device=device)
    dist.all_reduce(values)
    gathered = torch.empty_like(values)
    dist.all_gather_into_tensor(gathered, values)
    right = bool(torch.equal(gathered.cpu(), torch.arange(1024.0)))
    found = {
        "backend": "nccl" if on_gpu else "gloo",
        "version": list(torch.cuda.nccl.version()) if on_gpu else [],
        "right": right,
        "seconds": time.perf_counter() - begin,
    }
    write_json(found, out)
    print(found)
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
