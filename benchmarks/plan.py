"""The plan against measurement: operations, peak bytes of tensors, and time, for a few models on this machine's CPU.

    .venv/bin/python benchmarks/plan.py [CASE ...] [--out FILE]

Each case runs real training steps of one engine in a process of its own, on made-up documents as in benchmarks/step.py:

operations  torch's FlopCounterMode, which sees all but attention (it is told of `addmm_`, which it does not know),
            and the pairs that the dense mask shows, against `observe.flops`.
memory      peak bytes of tensors as torch's MemTracker counts them, against `plan.memory`; resident memory beside.
time        processor time of a step against the plan's sum of products, attention and traffic, each at the rate that
            it was measured to have here. The GPU's figures are computed in the same way, from rates of GPUs.

Writes JSON, by default benchmarks/results/plan.json. Exits with 3 when operations differ or memory is off by over 5 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from limits import find_device, measure_limits, record_head, write_json
from step import config_of, synthetic_steps, train_step
from transfusion.config import Config
from transfusion.families.build import compute_dtype
from transfusion.observe.flops import FlopModel, Work, Workload
from transfusion.observe.memory import process_tree_peak_bytes
from transfusion.parallel import environment
from transfusion.parallel.build import build_engine
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.engine import Engine
from transfusion.plan.memory import Memory, local_memory, zero_memory
from transfusion.plan.network import Network
from transfusion.plan.tracing import Trace, trace_step
from transfusion.schema import Batch
from transfusion_kernels import interval_attention

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "plan.json"
MISSED = 3
MEMORY_BAR = 0.05
ONE_THREAD = ("train.threads=1", "train.engine=local", "train.precision=fp32")
PAPER_SMALLEST = (
    str(ROOT / "configs/train/0.16b.yaml"),
    "codec={kind: pixels, channels: 3, image_size: 32}",
    "data.global_batch_size=1",
    "data.micro_batch_size=0",
    "train.compile=false",
    *ONE_THREAD,
)
QUICKSTART = (str(ROOT / "configs/train/quickstart.yaml"), "model.vocabulary=2048", *ONE_THREAD)
CASES: dict[str, tuple[str, ...]] = {
    "quickstart": QUICKSTART,
    "quickstart, accumulating": (*QUICKSTART, "data.micro_batch_size=2"),
    "quickstart, recomputing": (*QUICKSTART, "train.activation_checkpointing=block"),
    "quickstart, attention recomputed": (*QUICKSTART, "train.activation_checkpointing=attention"),
    "quickstart, bf16": (*QUICKSTART, "train.precision=bf16"),
    "quickstart, ZeRO-3": (*QUICKSTART, "train.engine=zero"),
    "quickstart, ZeRO-2": (*QUICKSTART, "train.engine=zero", "train.zero.stage=2"),
    "0.16b": PAPER_SMALLEST,
    "0.16b, recomputing": (*PAPER_SMALLEST, "train.activation_checkpointing=block"),
}


def measure(config: Config) -> dict[str, Any]:
    """One case, in this process."""
    here = environment.start(config.train.threads)
    try:
        return _measure(config, here)
    finally:
        environment.stop()


def _measure(config: Config, here: environment.Environment) -> dict[str, Any]:
    (batches,) = synthetic_steps(config, 1)
    flops, load = FlopModel(config), Workload.of(batches[-1], config)
    work = flops.of(batches)
    rates = measure_rates(config, batches[0])
    engine = build_engine(config, here)
    counted = count_products(engine, batches)
    seconds = [_timed(engine, batches, config) for _ in range(3)]
    resident = process_tree_peak_bytes()
    tracked = tracked_peak(engine, batches, config)
    network = Network.of(config)
    local = config.train.engine == "local"
    trace = trace_step(
        config,
        load,
        dtype=compute_dtype(config),
        accumulates=len(batches) > 1,
        whole=local,
        on_gpu=False,
    )
    predicted = local_memory(config, network, trace) if local else zero_memory(config, network, trace, 1)
    pairs = sum(int(batch.mask.dense().sum()) for batch in batches)
    return {
        "parameters": network.elements,
        "products": {"predicted": work.hardware.products, "counted": counted},
        "pairs": {
            "predicted": sum(Workload.of(batch, config).pairs for batch in batches),
            "counted": pairs,
        },
        "memory": _memory(predicted, tracked, resident),
        "time": _time(work, trace, len(batches), rates, statistics.median(seconds)),
    }


def count_products(engine: Engine, batches: Sequence[Batch]) -> int:
    """Operations of the products of a forward and backward pass, as torch counts them."""
    counts = global_counts(batches, engine.loss)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        for batch in batches:
            engine.forward_backward(batch, counts)
    engine.step(0.0)
    return int(counter.get_total_flops())


def _addmm(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def tracked_peak(engine: Engine, batches: Sequence[Batch], config: Config) -> int:
    """Peak bytes of tensors over one step, those that were there before among them."""
    tracker = MemTracker()
    tracker.track_external(*_state(engine))
    with tracker:
        counts = global_counts(batches, engine.loss)
        for batch in batches:
            tracker.reset_mod_stats()
            engine.forward_backward(batch, counts)
        engine.step(config.optimizer.learning_rate)
    peak = tracker.get_tracker_snapshot("peak")
    return int(sum(kinds["Total"] for kinds in peak.values()))


def _state(engine: Any) -> list[Any]:
    """The tensors of an engine: its network, its optimiser, and what ZeRO keeps beside."""
    if hasattr(engine, "masters"):
        return [engine.model, engine.optimizer, *engine.masters.values(), *engine.average.averages]
    return [engine.engine.module, engine.optimizer, *_tensors(engine.zero), *engine.average.averages]


def _tensors(zero: Any) -> list[Tensor]:
    """Every tensor among the attributes of DeepSpeed's optimiser, in lists and buckets too."""
    found: dict[int, Tensor] = {}
    waiting, seen = [*vars(zero).values()], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[id(value)] = value
            waiting += [
                inner for name in ("ds_tensor", "grad") if (inner := getattr(value, name, None)) is not None
            ]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif type(value).__module__.startswith("deepspeed") and hasattr(value, "buffer"):
            waiting += vars(value).values()
    return list(found.values())


def _memory(predicted: Memory, tracked: int, resident: int) -> dict[str, Any]:
    return {
        "predicted": {**asdict(predicted), "total": predicted.total},
        "tracked": tracked,
        "error": predicted.total / tracked - 1,
        "resident": resident,
    }


def measure_rates(config: Config, batch: Batch) -> dict[str, float]:
    """FLOP/s of products and of attention on a batch's own mask, and bytes/s of copies, in this process."""
    device = batch.token_ids_BS.device
    limits = measure_limits(device, seconds=3.0, dtypes=(config.train.precision,))
    rows, positions = batch.token_ids_BS.shape
    model = config.model
    shape = (rows, model.heads, positions, model.head_width)
    inputs = [torch.randn(shape, dtype=compute_dtype(config), requires_grad=True) for _ in range(3)]
    times = []
    for _ in range(3):
        begin = time.process_time()
        attended = interval_attention(*inputs, batch.mask)
        assert isinstance(attended, Tensor)
        attended.sum().backward()
        times.append(time.process_time() - begin)
    operations = 14 * model.heads * model.head_width * batch.mask.visible_pairs()
    return {
        "products": limits.gemm_tflops[config.train.precision] * 1e12,
        "attention": operations / min(times),
        "copy": limits.copy_gb_per_s * 1e9,
    }


def _time(work: Work, trace: Trace, batches: int, rates: dict[str, float], measured: float) -> dict[str, Any]:
    parts = {
        "products": work.hardware.products / rates["products"],
        "attention": work.hardware.attention / rates["attention"],
        "traffic": batches * trace.traffic / rates["copy"],
    }
    predicted = sum(parts.values())
    return {
        "rates": rates,
        "predicted": {**parts, "total": predicted},
        "measured": measured,
        "error": predicted / measured - 1,
    }


def _timed(engine: Engine, batches: Sequence[Batch], config: Config) -> float:
    begin = time.process_time()
    train_step(engine, batches, config)
    return time.process_time() - begin


def missed(record: dict[str, Any]) -> list[str]:
    """The bars that a record misses."""
    found = []
    for name, case in record["cases"].items():
        for what in ("products", "pairs"):
            if case[what]["predicted"] != case[what]["counted"]:
                found.append(f"{name}: {what} {case[what]['predicted']:,} and not {case[what]['counted']:,}")
        if abs(case["memory"]["error"]) > MEMORY_BAR:
            found.append(f"{name}: memory is off by {case['memory']['error']:+.1%}")
    return found


def table(record: dict[str, Any]) -> str:
    """The record as docs/reference/planning.md shows it."""
    lines = [
        "| | products, 10^9 | | visible pairs | | peak tensors, MiB | | | resident, MiB | step, s | | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| case | plan | counted | plan | counted | plan | tracked | error | | plan | measured | error |",
    ]
    for name, case in record["cases"].items():
        memory, seconds = case["memory"], case["time"]
        figures = (
            f"{case['products']['predicted'] / 1e9:,.3f}",
            f"{case['products']['counted'] / 1e9:,.3f}",
            f"{case['pairs']['predicted']:,}",
            f"{case['pairs']['counted']:,}",
            f"{memory['predicted']['total'] / 2**20:,.1f}",
            f"{memory['tracked'] / 2**20:,.1f}",
            f"{memory['error']:+.1%}",
            f"{memory['resident'] / 2**20:,.0f}",
            f"{seconds['predicted']['total']:.3f}",
            f"{seconds['measured']:.3f}",
            f"{seconds['error']:+.0%}",
        )
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {list(CASES)}; default: all")
    parser.add_argument(
        "--out", type=Path, default=RESULT, help="where the JSON goes; other cases in it are kept"
    )
    parser.add_argument("--here", metavar="CASE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(config_of(CASES[given.here], find_device("cpu")))))
        return 0
    cases = json.loads(given.out.read_text())["cases"] if given.out.exists() else {}
    for name in given.cases or CASES:
        done = subprocess.run(
            [sys.executable, __file__, "--here", name], stdout=subprocess.PIPE, text=True, check=True
        )
        cases[name] = json.loads(done.stdout.splitlines()[-1])
        record = {
            "environment": record_head(find_device("cpu")),
            "bar": MEMORY_BAR,
            "cases": {name: cases[name] for name in CASES if name in cases},
        }
        # At once: the large cases take long.
        write_json(record, given.out)
    print(table(record))
    for text in missed(record):
        print(f"missed: {text}", file=sys.stderr)
    return MISSED if missed(record) else 0


if __name__ == "__main__":
    environment.leave(main())
