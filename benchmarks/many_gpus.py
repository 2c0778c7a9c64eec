"""What 8 to 1,024 GPUs would do, predicted: the tables of docs/reference/planning.md.

    .venv/bin/python benchmarks/many_gpus.py [--gpu h100] [--write docs/reference/planning.md]

Each of the paper's runs is planned at each number of GPUs as its config has it and with each of a few other settings;
the fastest that fits is told beside it. Published runs are planned too, as far as their settings are known, and
compared. Prints markdown, or writes it between the marks of a file. Nothing here is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from transfusion.config import Config, load_config
from transfusion.plan import DocumentMix, Plan, make_plan
from transfusion.plan.advice import applied

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "train"
BEGIN, END = "<!-- predicted: benchmarks/many_gpus.py -->", "<!-- end of predicted -->"
GPUS = (8, 64, 256, 1024)
RUNS = ("0.16b", "0.76b", "1.4b", "7b")
# What may take over from the setting of the config, each for itself.
KEPT = ("train.zero.max_live_parameters=10000000000", "train.zero.max_reuse_distance=10000000000")
OTHERS: tuple[tuple[str, ...], ...] = (
    KEPT,
    ("train.zero.hpz_partition_size=8",),
    ("train.zero.stage=2",),
    ("train.zero.stage=1",),
    ("train.sequence_parallel=2",),
    ("data.micro_batch_size=4",),
)
# Above 512 GPUs a step of 512 rows has no row for each.
MORE_ROWS = ("data.global_batch_size=1024",)


class Published(NamedTuple):
    """A run of others: tokens a second and GPU that they report."""

    who: str
    gpu: str
    gpus: int
    tokens_per_second: float
    settings: tuple[str, ...]


LLAMA_8B = (
    "model.layers=32",
    "model.hidden_size=4096",
    "model.heads=32",
    "model.num_kv_heads=8",
    "model.ffn_size=14336",
    "model.vocabulary=128256",
    "train.compile=true",
)
PUBLISHED = (
    Published(
        "KempnerForge, 8B, rows of 4,096, all recomputed",
        "h200",
        1,
        10_471,
        (
            *LLAMA_8B,
            "train.activation_checkpointing=block",
            "data.global_batch_size=4",
            "data.micro_batch_size=4",
        ),
    ),
    Published(
        "torchtitan, Llama-3.1-8B, rows of 8,192, 8 GPUs",
        "h100",
        8,
        6_667,
        (
            *LLAMA_8B,
            "train.activation_checkpointing=attention",
            "data.sequence_length=8192",
            "data.global_batch_size=8",
        ),
    ),
    Published(
        "torchtitan, the same on 128",
        "h100",
        128,
        6_514,
        (
            *LLAMA_8B,
            "train.activation_checkpointing=attention",
            "data.sequence_length=8192",
            "data.global_batch_size=128",
        ),
    ),
)


def plans(config: Config, gpus: int, gpu: str) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """(settings, plan) of the config as it is and of each other setting that fits."""
    always = MORE_ROWS if gpus > config.data.global_batch_size else ()
    for other in ((), *OTHERS):
        shares_rows = bool(always) and other == ("train.sequence_parallel=2",)
        settings = other if shares_rows else (*always, *other)
        plan = make_plan(applied(config, settings), gpus, gpu)
        if plan.fits:
            yield settings, plan


def table(name: str, gpu: str) -> Iterator[str]:
    """One run at every number of GPUs."""
    config = load_config(CONFIGS / f"{name}.yaml", reads_codec=False)
    yield f"**{name}**, rows of 4,096, {config.data.global_batch_size} a step:"
    yield ""
    yield "| GPUs | setting | tokens a micro-batch | tokens/s a GPU | of 8 GPUs | waits | exact-mask MFU | GiB a GPU |"
    yield "|---|---|---|---|---|---|---|---|"
    first = 0.0
    for gpus in GPUS:
        (plain, as_it_is), *rest = plans(config, gpus, gpu)
        first = first or as_it_is.tokens_per_second / gpus
        best = max(rest, key=lambda found: found[1].tokens_per_second)
        yield _row(plain or ("as it is",), as_it_is, first)
        if best[1].tokens_per_second > 1.01 * as_it_is.tokens_per_second:
            yield _row(best[0], best[1], first)
    yield ""


def _row(settings: Sequence[str], plan: Plan, first: float) -> str:
    each = plan.tokens_per_second / plan.division.gpus
    cells = (
        f"{plan.division.gpus:,}",
        ", ".join(f"`{setting}`" if "=" in setting else setting for setting in settings),
        f"{plan.load.positions:,}",
        f"{each:,.0f}",
        f"{each / first:.0%}",
        f"{plan.seconds.exposed / plan.seconds.total:.0%}",
        f"{plan.share_of_peak('exact'):.1%}",
        f"{plan.memory.total / 2**30:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def published() -> Iterator[str]:
    """Runs of others beside what the plan says of them."""
    text_only = DocumentMix(pair_share=0.0, text_tokens=8192)
    yield "| who | GPUs | tokens/s a GPU, published | planned | published / planned |"
    yield "|---|---|---|---|---|"
    for run in PUBLISHED:
        plan = make_plan(applied(Config(), run.settings), run.gpus, run.gpu, text_only)
        each = plan.tokens_per_second / run.gpus
        yield (
            f"| {run.who} | {run.gpus} {run.gpu.upper()} | {run.tokens_per_second:,.0f} | {each:,.0f} |"
            f" {run.tokens_per_second / each:.2f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h100", help="h200, h100 or a100")
    parser.add_argument("--write", type=Path, help="a file whose part between the marks is replaced")
    given = parser.parse_args()
    lines = [f"On {given.gpu.upper()}s, by the model above. Nothing here is measured.", ""]
    for name in RUNS:
        lines += table(name, given.gpu)
    lines += ["Published runs, planned in the same way:", "", *published()]
    text = "\n".join(lines)
    if given.write:
        before, _, rest = given.write.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        given.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
