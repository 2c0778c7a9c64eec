"""`transfusion scaling ...`: run the cells of an experiment file, fit scaling laws, draw them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Results = Annotated[Path, typer.Argument(help="folder written by `transfusion scaling run`")]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", help="repeat for several. Default: all that every run has")
]
Axis = Annotated[str, typer.Option("--by", help="axis whose values become the lines")]

scaling_app = typer.Typer(no_args_is_help=True, help="Grids of runs, their scaling laws and their figures.")


@scaling_app.command()
def run(
    grid: Annotated[Path, typer.Argument(help="an experiment file, such as configs/experiments/emoji.yaml")],
    out: Annotated[Path, typer.Option(help="folder for the runs and cells.jsonl")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value for all cells, as many as needed")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="name of a cell, repeated for several. Default: all")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="runs at once")] = 1,
    launcher: Annotated[
        str,
        typer.Option(
            help="command that starts a training, e.g. 'torchrun --nproc-per-node 8 -m transfusion'"
        ),
    ] = "",
    classifier: Annotated[
        str, typer.Option(help="for suites that need a classifier, in place of the grid's")
    ] = "",
    listing: Annotated[
        bool, typer.Option("--list", help="list and check the cells, and run nothing")
    ] = False,
) -> None:
    """Train, export and evaluate every cell with every seed. Prints a table. Run it again to continue."""
    from transfusion.config.experiments import read_grid
    from transfusion.errors import UserError
    from transfusion.scaling.grid import jobs_of, run_grid
    from transfusion.scaling.results import metrics_of, read_records, table

    found = read_grid(grid, classifier=classifier)
    jobs = jobs_of(found, out, overrides=overrides or [], only=only or [])
    if listing:
        wrong = 0
        for job in jobs:
            name = job.cell.name if len(found.seeds) == 1 else f"{job.cell.name} seed {job.seed}"
            try:
                job.config()
                typer.echo(name)
            except UserError as error:
                wrong += 1
                typer.echo(f"cannot run here: {error}", err=True)
        raise typer.Exit(2 if wrong else 0)
    failed = run_grid(
        jobs, out, processes=processes, launcher=launcher, say=lambda line: typer.echo(line, err=True)
    )
    if len(failed) < len(jobs):
        records = read_records(out)
        typer.echo(table(records, metrics_of(records)))
    if failed:
        typer.echo(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


@scaling_app.command()
def fit(
    results: Results,
    by: Axis = "model",
    metric: Metrics = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON list instead of a table")] = False,
) -> None:
    """Fit power laws in FLOPs. Prints exponents, and for each two models their parity and crossing."""
    from transfusion.scaling import results as found

    records = found.read_records(results)
    comparisons = found.compare(records, by, found.metrics_of(records, metric or []))
    if as_json:
        typer.echo(json.dumps(found.as_dict(comparisons)))
    else:
        typer.echo(found.laws(comparisons, records, by))


@scaling_app.command()
def table(results: Results, metric: Metrics = None) -> None:
    """Print the metrics of each cell, mean and standard deviation over seeds."""
    from transfusion.scaling import results as found

    records = found.read_records(results)
    typer.echo(found.table(records, found.metrics_of(records, metric or [])))


@scaling_app.command()
def plot(
    results: Results,
    out: Annotated[Path, typer.Option(help="a .png, .svg or .pdf")],
    by: Axis = "model",
    metric: Metrics = None,
    title: Annotated[str, typer.Option(help="title above the figure")] = "",
) -> None:
    """Draw points, laws and bands of each metric over training FLOPs."""
    from transfusion.scaling import results as found
    from transfusion.scaling.plot import draw

    records = found.read_records(results)
    draw(found.compare(records, by, found.metrics_of(records, metric or [])), out, title=title)
    typer.echo(f"{out}: points, laws and bands of each metric over training FLOPs")
