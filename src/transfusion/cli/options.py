"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[Path, typer.Argument(help="folder written by `transfusion export`")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as needed")]
Weights = Annotated[
    Literal["auto", "raw", "ema"], typer.Option(help="auto: the moving average where there is one")
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", help="let suites fetch published weights and data that are not on this machine"
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "int8"],
    typer.Option(help="of the weights. int8 takes a quarter of the memory of float32"),
]
