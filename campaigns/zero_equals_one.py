"""Holds ZeRO on two and on four processes (gloo, CPU, fp32) against one process: losses of 20 steps.

    .venv/bin/python campaigns/zero_equals_one.py [--ranks 2 4] [--cases 'compiled*' ...]

Batches of text and images, the same for all processes together as for the one: mixed, unequal across ranks (text
alone beside images alone, and so on), packed, with images of several sizes that are not the same on all ranks, in
four micro-batches. Rows shared by two ranks, blocks compiled and recomputed, and all of that at once. Learned places
and none, the U-Net, stages 1 and 2, second copies (hpZ), offload. The other cases run in stage 3 with nothing kept
gathered.
Compared are text loss, image loss and the whole loss of each step, gradient norms, and the weights at the end. What
was run replaces its part of the record. Exits with 3 where a loss or a norm differs by 1e-6 or more, relative, or
compiled blocks are more graphs than they need: one, or where batches differ in their numbers of patches one for each
way that these come in. `tests/dist` holds a sample.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "dist"))
from handmade import small_config
from scenarios.common import CLEAN_STREAM, LEARNED_PLACES, NOTHING_KEPT, STREAM, UNET, Stream
from scenarios.equality import equals_local

from limits import record_head, write_json
from transfusion.parallel import environment

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "zero-equals-one.json"
STEPS = 20
BAR = 1e-6
WRONG = 3


@dataclass(frozen=True, slots=True)
class Case:
    """changes: of the configuration, with `__` for the dot. stream: contents of the ranks, step by step.

    graphs: at most so many of compiled blocks.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    stream: Stream = tuple(STREAM)
    accumulation: int = 1
    graphs: int = 1


# Of the first numbers of patches, of all others, and without any.
VARYING = 3
SHARED = {"train__sequence_parallel": 2}
COMPILED = {"train__compile": True}
OWN = {"model__modality_weights": "all"}
FROZEN = {"train__freeze": ["text"]}
CLEAN = {"diffusion__context": "clean"}
MUON = {"optimizer__name": "muon"}
RECOMPUTED = {"train__activation_checkpointing": "block"}
# Ranks with other images, and so with more or fewer groups of them, and of other numbers of patches.
SEVERAL: Stream = [("two sizes", "mixed"), ("wide", "text"), ("two sizes", "wide"), ("text", "two sizes")]
CASES = {
    "mixed": Case(stream=[("mixed", "mixed"), ("two kinds", "mixed")]),
    "unequal across ranks": Case(),
    "packed": Case(stream=[("packed", "packed")]),
    "several sizes": Case(stream=SEVERAL),
    "several sizes, unet": Case(UNET, SEVERAL),
    "several sizes, unet, recomputed, shared rows": Case(UNET | RECOMPUTED | SHARED, SEVERAL),
    "several sizes, compiled": Case(COMPILED, SEVERAL),
    "accumulation 4": Case(accumulation=4),
    "shared rows": Case(SHARED),
    "shared rows, packed": Case(SHARED, [("packed", "packed")]),
    "shared rows, accumulation 4": Case(SHARED, accumulation=4),
    "recomputed": Case(RECOMPUTED),
    "attention recomputed": Case({"train__activation_checkpointing": "attention"}),
    "compiled": Case(COMPILED),
    "compiled, recomputed": Case(COMPILED | RECOMPUTED),
    "compiled, recomputed, shared rows, accumulation 4": Case(COMPILED | RECOMPUTED | SHARED, accumulation=4),
    "no places": Case({"model__patch_position": "none"}),
    "learned places": Case(LEARNED_PLACES),
    "learned places, several sizes, shared rows": Case(LEARNED_PLACES | SHARED, SEVERAL),
    "own feed-forward": Case({"model__modality_weights": "ffn"}),
    "own weights": Case(OWN),
    "own weights, several sizes, recomputed, shared rows": Case(OWN | RECOMPUTED | SHARED, SEVERAL),
    "own weights, compiled, accumulation 4": Case(OWN | COMPILED, accumulation=4, graphs=VARYING),
    "clean context": Case(CLEAN, CLEAN_STREAM),
    "clean context, own weights, recomputed, shared rows, accumulation 4": Case(
        CLEAN | OWN | RECOMPUTED | SHARED, CLEAN_STREAM, accumulation=4
    ),
    "clean context, compiled": Case(CLEAN | COMPILED, CLEAN_STREAM, graphs=VARYING),
    "frozen text": Case(OWN | FROZEN),
    "frozen text, recomputed, shared rows, accumulation 4": Case(
        OWN | FROZEN | RECOMPUTED | SHARED, accumulation=4
    ),
    "frozen text, kept gathered": Case(OWN | FROZEN | {"train__zero": {}}),
    "clean image": Case({"diffusion__prediction": "x"}),
    "muon": Case(MUON),
    "muon, own weights, recomputed, shared rows, accumulation 4": Case(
        MUON | OWN | RECOMPUTED | SHARED, accumulation=4
    ),
    "muon, frozen text": Case(MUON | OWN | FROZEN),
    "muon, all kept gathered": Case(MUON | {"train__zero": {}}),
    "muon, stage 1": Case(MUON | {"train__zero": {"stage": 1}}),
    "muon, stage 2": Case(MUON | {"train__zero": {"stage": 2}}),
    "muon, optimiser offloaded": Case(MUON | {"train__zero": NOTHING_KEPT | {"offload_optimizer": "cpu"}}),
    "unet": Case(UNET),
    "unet, recomputed, shared rows": Case(UNET | RECOMPUTED | SHARED),
    "all kept gathered": Case({"train__zero": {}}),
    "stage 1": Case({"train__zero": {"stage": 1}}),
    "stage 1, shared rows": Case(SHARED | {"train__zero": {"stage": 1}}),
    "stage 2": Case({"train__zero": {"stage": 2}}),
    "stage 2, accumulation 4": Case({"train__zero": {"stage": 2}}, accumulation=4),
    "optimiser offloaded": Case({"train__zero": NOTHING_KEPT | {"offload_optimizer": "cpu"}}),
    "all offloaded": Case(
        {"train__zero": NOTHING_KEPT | {"offload_optimizer": "cpu", "offload_parameters": "cpu"}}
    ),
    # DeepSpeed makes its groups once a process, so one case, the last.
    "second copies": Case({"train__zero": NOTHING_KEPT | {"hpz_partition_size": 2}}),
}


def compare(case: Case, here: environment.Environment) -> dict[str, Any]:
    """Greatest relative differences between ZeRO on all ranks and the plain engine, which knows no ranks."""
    changes = {"train__zero": NOTHING_KEPT} | dict(case.changes)
    alone = {name: value for name, value in changes.items() if name not in (*COMPILED, *SHARED)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    begin = time.monotonic()
    found = equals_local(
        small_config(**changes), here, small_config(**alone), STEPS, None, case.stream, case.accumulation
    )
    counters = torch._dynamo.utils.counters
    return {
        "loss": found["loss"],
        "gradient_norm": found["norm"],
        "weights": found["weight"],
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "seconds": round(time.monotonic() - begin, 1),
    }


def be_a_rank(names: Sequence[str], folder: Path) -> None:
    """What torchrun starts: run the cases and leave what was found."""
    here = environment.start(1, timeout=timedelta(minutes=5))
    found = {name: compare(CASES[name], here) for name in names}
    (folder / f"{here.rank}.json").write_text(json.dumps(found))
    environment.stop()
    environment.leave(0)


def run(ranks: int, names: Sequence[str]) -> dict[str, Any]:
    """The cases on so many processes; of each case the worst rank."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, __file__, "--folder", folder, "--cases", *names]
        settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=os.environ | settings, check=True)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: {key: max(each[name][key] for each in found) for key in found[0][name]} for name in names}


def is_wrong(name: str, found: Mapping[str, Any]) -> bool:
    graphs = CASES[name].graphs if "compiled" in name else 0
    return (
        found["loss"] >= BAR
        or found["gradient_norm"] >= BAR
        or found["graphs"] > graphs
        or (found["graphs"] == 0) != (graphs == 0)
        or found["graph_breaks"] > 0
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cases", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [name for name in CASES if any(fnmatch.fnmatch(name, asked) for asked in options.cases)]
    if options.folder is not None:
        be_a_rank(names, options.folder)
        return 0
    made = {str(ranks): run(ranks, names) for ranks in options.ranks}
    former = json.loads(options.out.read_text()) if options.out.exists() else {}
    cases: dict[str, dict[str, Any]] = former.get("cases", {})
    for ranks, of_ranks in made.items():
        cases.setdefault(ranks, {}).update(of_ranks)
    wrong = [
        f"{name} on {ranks} processes: {found}"
        for ranks, of_ranks in cases.items()
        for name, found in of_ranks.items()
        if is_wrong(name, found)
    ]
    record = record_head(torch.device("cpu")) | {"steps": STEPS, "bar": BAR, "cases": cases, "wrong": wrong}
    write_json(record, options.out)
    worst = max(found["loss"] for of_ranks in cases.values() for found in of_ranks.values())
    print(f"{sum(map(len, cases.values()))} cases, greatest difference of a loss {worst:.1e}, relative")
    print("\n".join(wrong) or "all within the bar")
    return WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
