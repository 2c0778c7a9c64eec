"""The command line: parse, call, exit code. Everything heavy is imported inside the commands."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from transfusion import __version__
from transfusion.cli import generation, serving
from transfusion.cli.codec import codec_app
from transfusion.cli.data import data_app
from transfusion.cli.options import Device, Download, Dtype, Model, Overrides, Weights
from transfusion.cli.scaling import scaling_app
from transfusion.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError, describe
from transfusion.parallel import environment
from transfusion.tokens import MAX_SEED

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train one transformer on text and images together, and generate both in one answer.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(codec_app, name="codec")
app.add_typer(scaling_app, name="scaling")

# Typer keeps click's classes in private modules. The parent of this one is what is needed.
UsageError: Any = typer.BadParameter.__bases__[0]


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done, 1 a bug, 2 bad input, 3 a check failed, 75 stopped early and saved."""
    environment.leave(_run())


def _run() -> int:
    # What a terminal cannot show is spelt, and ends no command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # No shell puts the home folder in place of a ~ behind `--out=`.
    arguments = [
        re.sub(r"^(--[a-z-]+=)(~.*)$", lambda found: found[1] + os.path.expanduser(found[2]), argument)
        for argument in environment.without_launcher_arguments(sys.argv[1:])
    ]
    try:
        code = app(arguments, prog_name="transfusion", standalone_mode=False)
    except UserError as error:
        return _refuse(str(error))
    except UsageError as error:
        text = error.format_message()
        if "\n" in text:
            # Nothing was asked for: the text is the help.
            print(text, file=sys.stderr)
            return EXIT_BAD_INPUT
        command = error.ctx.command_path if error.ctx else "transfusion"
        return _refuse(f"{text} See `{command} --help`.")
    except OSError as error:
        return _refuse(describe(error))
    except (RuntimeError, MemoryError) as error:
        from transfusion.training.out_of_memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _refuse(
            "out of memory; ask for fewer or smaller images or shorter texts at once, or use another --device"
        )
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    return code or 0


def _refuse(message: str) -> int:
    environment.say_once(message)
    return EXIT_BAD_INPUT


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"transfusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="digits, spoken-digits, python-docs, emoji, a folder of images or sounds with captions, or a .jsonl"
            " file"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    validation: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="share kept for validation. Default 0.02, for python-docs 0.1"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="seed of captions and of the split")] = 0,
    one_caption_a_line: Annotated[
        bool,
        typer.Option("--one-caption-a-line", help="each line of an image's .txt is a caption of its own"),
    ] = False,
    font: Annotated[
        Path | None, typer.Option(help="for emoji: a font file with colour glyphs. Default: the system's")
    ] = None,
) -> None:
    """Write webdataset shards for training and validation."""
    from transfusion.data.prepare.prepare import prepare as run

    result = run(
        source, out, seed=seed, validation=validation, one_caption_a_line=one_caption_a_line, font=font
    )
    state = "already there" if result.reused else "written"
    print(f"{result.out}: {result.train} training and {result.validation} validation samples, {state}")
    for note in result.notes:
        print(note, file=sys.stderr)
    for reason, count in result.skipped.items():
        print(f"left out: {count} x {reason}; {result.out}/prepared.json names them", file=sys.stderr)
    if not result.validation:
        print("nothing is kept for validation: train with data.validation=[]", file=sys.stderr)


@tokenizer_app.command("train")
def train_tokenizer(
    shards: Annotated[list[str], typer.Argument(help="globs or brace ranges of shards, or .jsonl files")],
    out: Annotated[Path, typer.Option(help="the model file to write")],
    vocabulary: Annotated[int, typer.Option(min=1, help="pieces, control tokens included")] = 32_000,
) -> None:
    """Train a sentencepiece tokenizer on the texts and captions of shards."""
    from transfusion.data.shards.scan import Texts
    from transfusion.data.shards.webdataset import expand
    from transfusion.sequence.tokenizer import train_tokenizer as run

    tokenizer = run(Texts(expand(shards)), out, vocabulary=vocabulary)
    if tokenizer.vocabulary < vocabulary:
        print(
            f"the texts are too few for {vocabulary} pieces: these are all that they allow", file=sys.stderr
        )
    print(f"{out}: {tokenizer.vocabulary} pieces; train with data.tokenizer={out}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a file of configs/train")],
    overrides: Overrides = None,
) -> None:
    """Train, or continue the run in `run.dir`. Runs under torchrun and deepspeed too."""
    from transfusion.config import load_config

    resolved = load_config(config, overrides or [])
    from transfusion.training.trainer import train as run

    raise typer.Exit(run(resolved))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a file of configs/train")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, in machines of eight")] = 1,
    gpu: Annotated[Literal["h200", "h100", "a100"], typer.Option(help="which GPU")] = "h200",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    pair_share: Annotated[
        float, typer.Option(min=0, max=1, help="share of the tokens that is in pairs with an image")
    ] = 0.5,
    text_tokens: Annotated[int, typer.Option(min=3, help="tokens per text")] = 1024,
    caption_tokens: Annotated[int, typer.Option(min=1, help="tokens per caption")] = 32,
) -> None:
    """Predict memory, speed and cost of a run. Names the settings that make it fit."""
    from transfusion.config import load_config

    # The autoencoder need not be there yet.
    resolved = load_config(config, overrides or [], reads_codec=False)
    from transfusion.plan import DocumentMix, make_plan, report, warnings

    document_mix = DocumentMix(pair_share=pair_share, text_tokens=text_tokens, caption_tokens=caption_tokens)
    made = make_plan(resolved, gpus, gpu, document_mix)
    print(json.dumps({**made.as_dict(), "warnings": warnings(made)}, indent=2) if as_json else report(made))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder, or one of its checkpoints")],
    out: Annotated[Path, typer.Option(help="folder for config.json, weights, tokenizer and model card")],
    text_model: Annotated[
        Path | None,
        typer.Option(
            help="also write the text tower here, as a causal language model that transformers opens"
        ),
    ] = None,
) -> None:
    """Export a run's newest checkpoint as a folder of safetensors."""
    from transfusion.checkpoint.export import export as write
    from transfusion.checkpoint.text_model import export_text_model

    if text_model and text_model.resolve() == out.resolve():
        raise UserError(f"--out and --text-model both name {out}; give each a folder of its own")
    # First, so that a network that is no Llama is refused before anything is written.
    if text_model:
        print(
            f"{export_text_model(run, text_model)}: the text tower, a causal language model of transformers"
        )
    folder = write(run, out)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"{folder}: a model of {size / 1e6:.1f} MB; draw with `transfusion sample {folder} --prompt TEXT --out DIR`"
    )


generation.add_to(app)
serving.add_to(app)


@app.command("eval")
def evaluate(
    model: Model,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="validation, samples, denoise, digits, spoken_digits, images, guidance, captions, nearest, edit,"
            " steps, text_to_image, geneval, geneval2, perplexity, language or lmms, or a .yaml file of suites; several"
            " if repeated. None means validation, and samples where the data have captioned images"
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="suite.key=value, as many as needed")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for metrics.json and evaluation/, for a report that of the run. Default: MODEL"
        ),
    ] = None,
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    classifier: Annotated[
        Path | None,
        typer.Option(help="for the suites images and guidance: a file of `transfusion classifier`"),
    ] = None,
    download: Download = False,
    check: Annotated[
        bool, typer.Option("--check", help="exit with code 3 when a metric misses its threshold")
    ] = False,
) -> None:
    """Evaluate a model on its validation data. Writes metrics.json, and images and captions to look at.

    Under torchrun the processes share the suites text_to_image, geneval and geneval2.
    """
    from transfusion.checkpoint.export import read_export
    from transfusion.evaluate.report.page import is_run
    from transfusion.evaluate.suites.run import run_suites

    folder = out or model
    metrics = run_suites(
        model,
        suite or [],
        folder,
        overrides=overrides or [],
        weights=weights,
        device=device,
        dtype=dtype,
        classifier=classifier,
        download=download,
    )
    if not environment.is_first_process():
        return
    for name, metric in metrics.items():
        print(f"{name:32} {metric.describe()}")
    run = folder if is_run(folder) else Path(read_export(model).config.run.folder)
    before = "" if run == folder else f"`transfusion eval {model} --out {run}`, then "
    left = "metrics.json and evaluation/" if (folder / "evaluation").is_dir() else "metrics.json"
    print(f"{folder}: {left}; for the report: {before}`transfusion report {run}`")
    if check and any(metric.passed is False for metric in metrics.values()):
        raise typer.Exit(3)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    suite: Annotated[list[str] | None, typer.Option(help="as of `transfusion eval`")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="suite.key=value, as many as needed")] = None,
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    classifier: Annotated[Path | None, typer.Option(help="as of `transfusion eval`")] = None,
    download: Download = False,
    once: Annotated[bool, typer.Option("--once", help="end once every checkpoint is measured")] = False,
) -> None:
    """Evaluate the checkpoints of a run as they appear, until the last one. Writes evaluations.jsonl."""
    from transfusion.evaluate.suites.run import choose, run_suites
    from transfusion.evaluate.watch import watch as watch_run

    asked, told = suite or [], overrides or []
    # Mistakes are told now and not at the first checkpoint.
    choose(asked, told, classifier=classifier, download=download)

    def measure(model: Path, out: Path) -> dict[str, Any]:
        return run_suites(
            model,
            asked,
            out,
            overrides=told,
            weights=weights,
            device=device,
            dtype=dtype,
            classifier=classifier,
            download=download,
        )

    watch_run(run, measure, once=once)


@app.command()
def sweep(
    model: Model,
    over: Annotated[
        list[str] | None, typer.Option(help="suite.key=A,B,C, a setting and its values, repeated for several")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="suite.key=value for every point, as many as needed")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for sweep.json, sweep.png and the points. Default: MODEL/sweep"),
    ] = None,
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    classifier: Annotated[Path | None, typer.Option(help="as of `transfusion eval`")] = None,
    download: Download = False,
) -> None:
    """Evaluate a model at every combination of some settings, such as guidance and steps, and draw the figures."""
    from transfusion.evaluate.sweep import FIGURE, RECORD, table
    from transfusion.evaluate.sweep import sweep as measure

    folder = out or model / "sweep"
    points = measure(
        model,
        over or [],
        folder,
        overrides=overrides or [],
        weights=weights,
        device=device,
        dtype=dtype,
        classifier=classifier,
        download=download,
    )
    if points:
        print(table(points))
        print(f"{folder}: {RECORD}, {FIGURE} and {len(points)} points")


@app.command()
def classifier(
    config: Annotated[Path, typer.Argument(help="a configuration, for its images, captions and their size")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    overrides: Overrides = None,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training images")] = 8,
) -> None:
    """Train the classifier of `eval --suite images` on the training images."""
    from transfusion.config import load_config
    from transfusion.evaluate.metrics.classifier import save_classifier, train_from_config

    made = train_from_config(load_config(config, overrides or []), epochs=epochs)
    save_classifier(made, out)
    print(
        f"{out}: a classifier of {made.images} images and {len(made.words)} words; measure with"
        f" `transfusion eval MODEL --suite images --classifier {out}`"
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="a run folder, or several to be compared")],
    out: Annotated[Path, typer.Option(help="the page of several runs")] = Path("compare.html"),
    md: Annotated[
        bool, typer.Option("--md", help="print tables of metrics and settings as Markdown instead")
    ] = False,
) -> None:
    """Write report.html, the page of a run, or a page of several side by side.

    It has curves, images, metrics and the configuration.
    """
    from transfusion.evaluate.report.compare import compare, markdown
    from transfusion.evaluate.report.page import write_report

    if md:
        print(markdown(runs), end="")
    elif len(runs) > 1:
        print(f"{compare(runs, out)}: {len(runs)} runs side by side; open it in a browser")
    else:
        print(f"{write_report(runs[0])}: the page of the run; open it in a browser")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="a configuration, to look at its data and run folder too")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="compare the processes of torchrun, deepspeed or srun")
    ] = False,
    folder: Annotated[
        Path, typer.Option(help="with --cluster: the folder of runs, which all machines see")
    ] = Path(),
) -> None:
    """Check the installation, and with a configuration all that its run needs. Reads all bytes of its shards."""
    if cluster:
        from transfusion.cli.doctor_cluster import main as compare

        raise typer.Exit(compare(folder))
    from transfusion.cli.doctor import main as run

    if config is None:
        raise typer.Exit(run())
    from transfusion.cli.doctor_run import look_at_run
    from transfusion.config import load_config

    raise typer.Exit(run(look_at_run(load_config(config, overrides or []))))


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="a configuration. None: the defaults")] = None,
    overrides: Overrides = None,
) -> None:
    """Check a configuration and print it, each key with its meaning."""
    from transfusion.config import load_config
    from transfusion.config.yaml_files import explain

    resolved = load_config(config, overrides or [])
    if resolved.train.init_from:
        from transfusion.checkpoint.published_models import refuse_other_network

        refuse_other_network(Path(resolved.train.init_from), resolved)
    print(explain(resolved))
    for warning in resolved.warnings():
        print(f"warning: {warning}", file=sys.stderr)
