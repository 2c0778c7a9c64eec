"""Attention under this project's mask: ours against what else can compute it, each checked before it is timed.

    .venv/bin/python benchmarks/attention.py [--seconds 300] [--isolate] [--lengths 8192 4096 ...] [--out FILE]

Prints a table, writes JSON, by default benchmarks/results/attention.json, and draws it beside that. Every provider gets
the same random inputs, laid out as the model lays them out. Its output and gradients are first held against float64
(verify.py). One that is wrong is reported as wrong and not timed, and one that cannot run leaves its reason. Speeds
count visible pairs only: 4 * D * H * pairs forward, 10 * D * H * pairs backward (the scores are computed again). The
share is of the matrix products that limits.py measured in the same run. Exits with 3 when one of ours is wrong, fails
or hangs.

Cases come most telling first, and providers that compile for long come last, so that a short budget cuts off the least.
The JSON is written anew after each timing, so that a run that is killed keeps all it had. With --isolate each provider
runs in a process of its own. One that is silent for too long is ended, and loses its own lines only. A first run on a
GPU wants that.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attention_table.apart import measure_apart, run_job
from attention_table.cases import FAMILIES
from attention_table.measure import HEADER, Options, Table, exit_code
from attention_table.providers import PROVIDERS, Provider
from limits import DTYPES, Limits, find_device, measure_limits, record_head, write_json
from verify import MAX_ERROR

RESULT = Path(__file__).resolve().parent / "results" / "attention.json"
FORMULAS = {
    "forward": "4 * D * H * visible pairs",
    "backward": "10 * D * H * visible pairs",
    "share": "of the measured matrix products of the same dtype",
}


def run(
    options: Options,
    providers: Sequence[Provider] = PROVIDERS,
    out: Path | None = None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Measure the table, print it line by line, and keep `out` up to date. Returns what is written.

    limits: the peaks that speeds are shares of, measured if None.
    """
    deadline = time.monotonic() + options.seconds
    if limits is None:
        seconds = min(10.0, options.seconds / 10)
        limits = measure_limits(options.device, seconds=seconds, dtypes=(options.dtype,))
    record: dict[str, Any] = {
        "environment": record_head(options.device),
        "formulas": FORMULAS,
        "limits": limits.as_dict(),
        "max_error": dict(zip(("tensor", "row"), MAX_ERROR[options.dtype], strict=True)),
        "isolate": options.isolate,
        "results": [],
    }

    def keep() -> None:
        if out:
            write_json(record, out)

    peak = limits.gemm_tflops[options.dtype]
    print(f"{limits.device}: {options.dtype} matrix products {peak:.3g} TFLOP/s\n{HEADER}", flush=True)
    keep()
    if options.isolate is None:
        table = Table(options, limits, deadline)
        for cases, some in options.stages(providers):
            table.fill(cases, some, record["results"], keep)
    else:
        if options.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory is for the others
        measure_apart(options, providers, limits, deadline, record["results"], keep)
    keep()
    return record


def draw(record: dict[str, Any], out: Path) -> None:
    """Speed over row length, a panel for each mask, head width and direction. Says so where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no image: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    timed = [result for result in record["results"] if result["status"] == "ok"]
    widths = sorted({result["head_dim"] for result in timed})
    columns = [(head_dim, way) for head_dim in widths for way in ("forward", "backward")]
    lengths = sorted({result["length"] for result in timed})
    families = [family for family in FAMILIES if any(result["family"] == family for result in timed)]
    if not timed:
        return
    figure = Figure(figsize=(3.4 * len(columns), 2.6 * len(families) + 0.8), layout="constrained")
    panels = figure.subplots(len(families), len(columns), squeeze=False, sharex=True)
    fastest = max(result["forward"]["tflops"] for result in timed)
    unit, per_tflops = ("TFLOP/s", 1) if fastest >= 1 else ("GFLOP/s", 1000)
    # Matplotlib has ten colours, so the second ten are dashed.
    looks = {each.name: (f"C{n % 10}", "o-" if n < 10 else "s--") for n, each in enumerate(PROVIDERS)}
    for row, family in enumerate(families):
        for column, (head_dim, way) in enumerate(columns):
            panel = panels[row, column]
            for name, (colour, style) in looks.items():
                points = sorted(
                    (result["length"], result[way]["tflops"] * per_tflops)
                    for result in timed
                    if (result["family"], result["head_dim"], result["provider"]) == (family, head_dim, name)
                )
                if points:
                    width = 2.2 if name.startswith("ours") else 1.2
                    panel.plot(*zip(*points, strict=True), style, color=colour, lw=width, ms=4, label=name)
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.set_title(f"{family}, D {head_dim}, {way}", fontsize=9)
        panels[row, 0].set_ylabel(f"{unit}, visible pairs")
    for panel in panels[-1]:
        panel.set_xlabel("tokens of a row")
    seen = {
        label: line
        for panel in panels.flat
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=4, frameon=False)
    limits = record["limits"]
    figure.suptitle(f"{limits['device']}: attention under each mask", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _former_limits(former: Path | None, dtype: str) -> Limits | None:
    """The peaks of a former run. None where it left none of this dtype."""
    if former is None or not former.exists():
        return None
    limits = Limits(**json.loads(former.read_text(encoding="utf-8"))["limits"])
    return limits if dtype in limits.gemm_tflops else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1k to 32k on a GPU, 256 on the CPU")
    parser.add_argument("--head-dims", type=int, nargs="+", help="default: 128 64 on a GPU, 32 on the CPU")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--providers", nargs="+", choices=[provider.name for provider in PROVIDERS])
    parser.add_argument("--tokens", type=int, help="of a batch; default: 16384 on a GPU, 512 on the CPU")
    parser.add_argument("--width", type=int, help="heads x head width; default: 2048 on a GPU, 64 on the CPU")
    parser.add_argument("--seconds", type=float, default=300.0, help="after this no timing is begun")
    parser.add_argument(
        "--isolate", type=float, nargs="?", const=90.0, metavar="SECONDS",
        help="a process for each provider, ended after so long without a new figure (default: 90)",
    )  # fmt: skip
    parser.add_argument(
        "--limits", type=Path, help="a former result, whose peaks are taken in place of measured ones"
    )
    parser.add_argument("--no-image", action="store_true", help="write the JSON alone")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # what such a process is to do
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU; waiting ones would count as working"
    )
    given = parser.parse_args()
    if given.job:
        return run_job(given.job)
    # One that is told to end also ends the process that it waits for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(given.threads)
    device = find_device(given.device)
    on_gpu = device.type == "cuda"
    options = Options(
        device=device,
        dtype=given.dtype or ("bf16" if on_gpu else "fp32"),
        lengths=given.lengths or ([8192, 4096, 2048, 16384, 1024, 32768] if on_gpu else [256]),
        head_dims=given.head_dims or ([128, 64] if on_gpu else [32]),
        families=given.families,
        tokens=given.tokens or (16384 if on_gpu else 512),
        width=given.width or (2048 if on_gpu else 64),
        seconds=given.seconds,
        call_seconds=0.1 if on_gpu else 0.05,
        isolate=given.isolate,
    )
    chosen = [p for p in PROVIDERS if not given.providers or p.name in given.providers]
    record = run(options, chosen, given.out, _former_limits(given.limits, options.dtype))
    if not given.no_image:
        draw(record, given.out.with_suffix(".png"))
    return exit_code(record)


if __name__ == "__main__":
    sys.exit(main())
