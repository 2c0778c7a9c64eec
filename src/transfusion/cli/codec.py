"""`transfusion codec ...`: train an autoencoder, measure it, fetch one, and write its latents into shards."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from transfusion.errors import UserError

if TYPE_CHECKING:
    from transfusion.config import CodecConfig

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as needed")]
Folder = Annotated[str, typer.Argument(help="folder of an autoencoder, such as RUN/codec")]
Shards = Annotated[list[str], typer.Argument(help="globs or brace ranges of .tar shards with images")]
ImageSize = Annotated[
    int, typer.Option(min=0, help="side of the square images. 0: as the folder was trained")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto")]

codec_app = typer.Typer(no_args_is_help=True, help="Image codecs: images to latents or tokens, and back.")


@codec_app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a configuration, such as configs/codec/emoji-kl.yaml")],
    overrides: Overrides = None,
) -> None:
    """Train a KL or VQ autoencoder, or continue its training. Writes RUN/codec in the layout of diffusers."""
    from transfusion.codec_train.settings import CodecTrainConfig
    from transfusion.config.load import load_as

    resolved = load_as(CodecTrainConfig, config, overrides or [])
    from transfusion.codec_train.train import train_codec

    raise typer.Exit(train_codec(resolved))


@codec_app.command()
def encode(
    codec: Folder,
    shards: Shards,
    out: Annotated[Path, typer.Option(help="folder for the shards with latents")],
    image_size: ImageSize = 0,
    size: Annotated[
        list[str] | None, typer.Option(help="in place of --image-size: HEIGHTxWIDTH, repeated for several")
    ] = None,
    resize: Annotated[
        Literal["crop", "pad", "fit"],
        typer.Option(help="codec.resize of the trainings that read the latents"),
    ] = "crop",
    workers: Annotated[int, typer.Option(min=1, help="processes, one shard each")] = 1,
    device: Device = "cpu",
) -> None:
    """Write shards with the latents (kl) or tokens (vq) of their images. Run it again to continue.

    A codec without a preview map gets one, fitted to these images.
    """
    from transfusion.codec_train.encode import add_preview, encode_shards
    from transfusion.data.images.latents import LatentRecord

    def progress(name: str, record: LatentRecord, reused: bool) -> None:
        left_out = "".join(f", left out: {count} x {reason}" for reason, count in record.left_out.items())
        typer.echo(f"{name}: {record.encoded} images{' (already there)' if reused else ''}{left_out}")

    settings = _settings(codec, image_size, size or []).model_copy(update={"resize": resize})
    records = encode_shards(settings, shards, out, workers=workers, device=device, progress=progress)
    total = sum(record.encoded for record in records)
    if not total:
        left_out = collections.Counter[str]()
        for record in records:
            left_out.update(record.left_out)
        if left_out:
            why = ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common())
            raise UserError(f"{out}: no image could be encoded ({why}); mend them, or name other shards")
        raise UserError(
            f"{out}: no image was found to encode; those of interleaved documents are encoded in training, so name"
            " their shards in data.sources"
        )
    typer.echo(
        f"{out}: {total} images in {len(records)} shards, by codec {settings.fingerprint}; train with"
        f" data.sources.0.shards='{out}/*.tar' and codec.folder={codec}"
    )
    if fitted := add_preview(settings, out, records):
        typer.echo(f"{codec}: {fitted.describe()}")


@codec_app.command()
def report(
    codec: Folder,
    shards: Shards,
    out: Annotated[Path, typer.Option(help="NAME, to write NAME.html, NAME.png and NAME.json")],
    image_size: ImageSize = 0,
    limit: Annotated[int, typer.Option(min=0, help="number of images, from the first. 0: all")] = 0,
    rfid_weights: Annotated[
        Path | None, typer.Option(help="TorchScript of FID's Inception network, for rFID")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Measure how well the codec reconstructs images. Reports PSNR, SSIM, rFID and examples."""
    from transfusion.codec_train.report import write_report

    settings = _settings(codec, image_size)
    found = write_report(settings, shards, out, rfid_weights=rfid_weights, limit=limit, device=device)
    for line in found.describe():
        typer.echo(line)
    typer.echo(f"{out.with_suffix('.html')}: the figures and images; open it in a browser")


@codec_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="name on the hub, such as OWNER/MODEL, or a folder")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    subfolder: Annotated[str, typer.Option(help="subfolder that holds the autoencoder, often vae")] = "",
) -> None:
    """Download a published autoencoder. All other commands read one from a folder."""
    from transfusion.codec.networks import fetch_network

    fetch_network(name, out, subfolder=subfolder)
    typer.echo(
        f"{out}: an autoencoder; train with codec.folder={out}, or see `transfusion codec encode --help`"
    )


def _settings(folder: str, image_size: int, sizes: Sequence[str] = ()) -> CodecConfig:
    """The section `codec` of a configuration that names the folder. Raises UserError."""
    from transfusion.config import CodecConfig
    from transfusion.config.checking import check_as
    from transfusion.config.codec_folder import completed, read_facts, trained_size

    kind, problems = read_facts(folder).kind, list[str]()
    values: dict[str, Any] = {"kind": kind, "folder": folder, "image_sizes": sizes}
    if not sizes:
        values["image_size"] = image_size or trained_size(folder)
    return check_as(CodecConfig, completed(values, problems), problems=problems, where=folder)
