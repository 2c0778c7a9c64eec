"""The commands that serve. Everything heavy is imported inside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from transfusion.cli.options import Device, Dtype, Model, Weights
from transfusion.errors import UserError

# By the names that are imported.
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def _need_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'serving needs {", ".join(missing)}; install them with `pip install "transfusion-mm[serve]"`'
        )


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="address to listen on. Beyond this machine it needs --token-file")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="port to listen on. 0: any that is free")
    ] = 8000,
    name: Annotated[
        str, typer.Option(help="what clients call the model. Empty: the name of its folder")
    ] = "",
    token_file: Annotated[
        Path | None, typer.Option(help="a file with the token that clients must send")
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="seconds that answers have to end when the server is stopped")
    ] = 30.0,
    cache_gb: Annotated[
        float | None, typer.Option(min=0, help="memory for keys and values. None: what fits")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="answers under way at a time")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="answers that may wait. One more is refused with 429")
    ] = 64,
    max_body_mb: Annotated[int, typer.Option(min=1, help="of a request")] = 32,
    max_steps: Annotated[int, typer.Option(min=1, help="sampler steps of an image")] = 250,
    max_images: Annotated[int, typer.Option(min=1, help="new images of a request")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="new text tokens of an answer")] = 4096,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="write prompts to the log")] = False,
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model: OpenAI's endpoints, the events of the engine, and a page. Ctrl-C lets answers end first."""
    _need_packages()
    from transfusion.serve.limits import Limits
    from transfusion.serve.server import ServeSettings
    from transfusion.serve.server import serve as run

    limits = Limits(
        body_bytes=max_body_mb << 20,
        images=max_images,
        tokens=max_tokens,
        steps=max_steps,
        running=max_running,
        waiting=max_waiting,
    )
    settings = ServeSettings(
        host=host,
        port=port,
        name=name,
        token_file=token_file,
        grace=grace,
        cache_gb=cache_gb,
        logs_prompts=log_prompts,
        limits=limits,
    )
    run(model, settings, weights=weights, device=device, dtype=dtype)


def board(
    runs: Annotated[Path, typer.Argument(help="a run folder, or one that holds several")],
    host: Annotated[
        str, typer.Option(help="address to listen on. Beyond this machine it needs --token-file")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="port to listen on. 0: any that is free")
    ] = 8001,
    token_file: Annotated[
        Path | None, typer.Option(help="a file with the token that the page asks for")
    ] = None,
) -> None:
    """Show runs on a local page: curves, sample grids over time, and the log of those under way. Nothing is written."""
    _need_packages()
    from transfusion.serve.board.app import board as run

    run(runs, host=host, port=port, token_file=token_file)


def add_to(app: typer.Typer) -> None:
    """Add the commands to a program."""
    app.command()(serve)
    app.command()(board)
