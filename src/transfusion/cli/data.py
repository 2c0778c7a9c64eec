"""`transfusion data ...`: what shards hold, what is wrong with them, and what a run would make of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

Spec = Annotated[Path, typer.Argument(help="a configuration, for its data.sources")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as needed")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")]

data_app = typer.Typer(no_args_is_help=True, help="Index shards, and see what a run makes of them.")


@data_app.command()
def show(
    spec: Spec,
    out: Annotated[Path, typer.Option(help="FILE.html with every token, or FILE.png as an overview")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="sequences to draw")] = 4,
    step: Annotated[int, typer.Option(min=0, help="number of the global batch")] = 0,
) -> None:
    """Draw sequences of a batch. Shows tokens, images, sounds and other arrays, borders of documents and the mask."""
    from transfusion.codec import open_media_codecs
    from transfusion.config import load_config
    from transfusion.data.viewing.commands import show_rows

    config = load_config(spec, overrides or [])
    pictures = {name: codec.picture for name, codec in open_media_codecs(config.modalities).items()}
    show_rows(config, out, rows=rows, step=step, pictures=pictures)
    print(f"{out}: the first rows of global batch {step}, as training gets them")


@data_app.command()
def stats(
    spec: Spec,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="global batches to plan")] = 64,
    as_json: AsJson = False,
) -> None:
    """Show shares, lengths, padding and bad samples of the sources."""
    from transfusion.config import load_config
    from transfusion.data.viewing.commands import describe_stats, stats_config

    found = stats_config(load_config(spec, overrides or []), steps=steps)
    print(json.dumps(found) if as_json else describe_stats(found))


@data_app.command()
def plan(
    spec: Annotated[
        Path | None,
        typer.Argument(help="a configuration. None, with --simulate: pairs and texts of lognormal lengths"),
    ] = None,
    overrides: Overrides = None,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="simulate lengths only: sources of any size, like those of SPEC"),
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, help="number of ranks to plan for")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="global batches")] = 64,
    samples: Annotated[
        int,
        typer.Option(
            min=0, help="samples of each simulated source. 0: as many as SPEC has, else 700 million"
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Plan batches without reading images. Shows time, memory, shares, padding and balance."""
    from transfusion.config import load_config
    from transfusion.data.viewing.plan_stats import describe, measure_config

    words = overrides or []
    if spec is not None and "=" in spec.name and not spec.exists():
        spec, words = None, [str(spec), *words]
    config = load_config(spec, words)
    found = measure_config(config, simulate=simulate, ranks=ranks, steps=steps, samples=samples)
    print(json.dumps(asdict(found)) if as_json else describe(found))


@data_app.command("index")
def index_shards(
    spec: Annotated[
        list[str],
        typer.Argument(help="globs, brace ranges or files of shards, or one configuration with overrides"),
    ],
    out: Annotated[Path, typer.Option(help="folder for the index files, counters.json and quarantine.jsonl")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="for token lengths, which training needs. A configuration names its own"),
    ] = None,
    verify: Annotated[
        Literal["none", "sha256"],
        typer.Option(help="see data.sources.0.verify. A configuration names its own"),
    ] = "none",
    max_bad_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="share of bad samples above which the exit code is 3")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="processes. 0: one per core, or none for little data")
    ] = 0,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="read all shards again, and renew the index of one whose bytes have changed"
        ),
    ] = False,
) -> None:
    """Index shards. Finds each good sample and its length, and what is left out and why.

    Run it again to continue after an interruption. On a finished folder, it renews what is stale.
    """
    from transfusion.config import DataConfig, load_config
    from transfusion.data.index.build import QUARANTINE, IndexJob, write_index

    if spec[0].endswith((".yaml", ".yml")):
        config = load_config(spec[0], spec[1:])
        jobs = IndexJob.of(config)
        max_bad_fraction = config.data.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
    else:
        jobs = [IndexJob(spec, tokenizer, verify=verify)]
    with _byte_bar("index") as progress:
        limit = DataConfig().max_bad_fraction if max_bad_fraction is None else max_bad_fraction
        report = write_index(jobs, out, max_share=limit, processes=workers, read=check, progress=progress)
    for line in report.describe():
        typer.echo(line)
    for shard in report.bad_shards:
        typer.echo(f"too many bad samples: {shard}; {out / QUARANTINE} lists them", err=True)
    if report.past_limit:
        raise typer.Exit(3)


@contextlib.contextmanager
def _byte_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of (bytes done, bytes in all) on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn(name), BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn())
    shown = console.is_terminal and not console.is_dumb_terminal
    with Progress(*columns, console=console, expand=True, disable=not shown) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
