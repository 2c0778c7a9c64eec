"""What an autoencoder's folder says of itself, from its config.json and the bytes of its weights: nothing is built.

The layout is diffusers': config.json, and diffusion_pytorch_model.safetensors whole or in parts. Beside them may
stand preview.json, the preview map.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transfusion.config import weights_folder
from transfusion.errors import UserError
from transfusion.files import FINGERPRINT_BYTES, digest, file_state, known_digest

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS, INDEX = f"{STEM}.safetensors", weights_folder.index_name(STEM)
# The preview map. Nothing else depends on it, so it may come later and change no fingerprint.
PREVIEW = "preview.json"
KINDS: dict[str, Literal["kl", "vq"]] = {"AutoencoderKL": "kl", "VQModel": "vq"}

# Of published networks that were never measured.
_DEFAULT_SCALE = 0.18215


class CodecFacts(NamedTuple):
    """A folder's own words, under the names of the section `codec`.

    channels: of images. downscale: pixels a side of one latent. A latent is (encoded - shift) * scale, with one
    number for all channels or one for each. codebook_size: its entries; 0: none. weights: digest of the files.
    """

    kind: Literal["kl", "vq"]
    channels: int
    latent_channels: int
    downscale: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    codebook_size: int
    weights: str


def read_facts(folder: str | Path) -> CodecFacts:
    """Raises UserError for a folder that holds no autoencoder that is known here, or no safe weights."""
    folder = Path(folder)
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = KINDS[values["_class_name"]]
        latent_channels = int(values.get("latent_channels", 4 if kind == "kl" else 3))
        scale, shift = _statistics(values) if kind == "kl" else ((1.0,), (0.0,))
        facts = CodecFacts(
            kind=kind,
            channels=int(values.get("in_channels", 3)),
            latent_channels=latent_channels,
            downscale=2 ** (len(values["block_out_channels"]) - 1),
            scale=scale,
            shift=shift,
            codebook_size=int(values.get("num_vq_embeddings", 256)) if kind == "vq" else 0,
            weights="",
        )
    except OSError as error:
        raise UserError(
            f"codec.folder {folder} is not an autoencoder: {CONFIG}: {error.strerror}; name a folder written by"
            " `transfusion codec train`, `transfusion codec fetch` or diffusers"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"codec.folder {folder}: {CONFIG} is not that of an {' or a '.join(KINDS)} of diffusers"
        ) from None
    return facts._replace(weights=_digest(tuple(weight_files(folder))))


def trained_size(folder: str | Path) -> int:
    """Side of the images that the network was made for, as its folder tells. Raises UserError where it does not."""
    try:
        return int(json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["sample_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"codec.folder {folder} gives no image size; set --image-size") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the network. Raises UserError where one is missing, or two truths stand there."""
    try:
        return weights_folder.weight_files(folder, STEM)
    except (OSError, ValueError) as error:
        raise UserError(
            f"codec.folder {folder}: {error}, or write it with `transfusion codec fetch`"
        ) from None


def folder_files(folder: str | Path) -> list[Path]:
    """What `open_codec` and diffusers read of a folder, to be copied. Raises UserError for weights that are missing."""
    optional = [Path(folder) / name for name in (INDEX, PREVIEW)]
    return [Path(folder) / CONFIG, *filter(Path.is_file, optional), *weight_files(Path(folder))]


def codec_fingerprint(facts: CodecFacts, scale: tuple[float, ...], shift: tuple[float, ...]) -> str:
    """Twelve hex digits that change with whatever makes other latents of the same image."""
    text = json.dumps([facts.kind, facts.weights, scale, shift])
    return digest(text.encode(), FINGERPRINT_BYTES)


def completed(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The section `codec`, plain values, with what its folder tells filled in.

    What contradicts the folder is added to `problems`. scale and shift may be set otherwise than there.
    """
    folder, kind = values.get("folder"), values.get("kind", "pixels")
    if kind not in KINDS.values() or not isinstance(folder, str) or not folder:
        return values
    folder = os.path.expanduser(folder)
    try:
        facts = read_facts(folder)
    except UserError as error:
        problems.append(str(error))
        # As if it fitted: what else is wrong is told in the same breath.
        return {"latent_channels": 1, "downscale": 1, **values}
    found = {name: value for name, value in facts._asdict().items() if name != "weights"}
    for name in ("kind", "channels", "latent_channels", "downscale", "codebook_size"):
        if values.get(name) and values[name] != found[name]:
            problems.append(f"codec.{name} is {values[name]}, but {folder} has {found[name]}")
    merged = {**found, **{name: value for name, value in values.items() if value or name not in found}}
    scale, shift = _numbers(merged["scale"]), _numbers(merged["shift"])
    if scale is None or shift is None:
        return merged
    merged |= {"scale": list(scale), "shift": list(shift)}
    mark = codec_fingerprint(facts, scale, shift)
    if values.get("fingerprint", "") not in ("", mark):
        problems.append(
            f"codec.fingerprint is {values['fingerprint']}, but {folder} with codec.scale and codec.shift is now"
            f" {mark}: the autoencoder was changed; name the one that was used"
        )
    return merged | {"fingerprint": mark}


def _statistics(values: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, shift) as diffusers' pipelines apply them: by channel where means and deviations are given."""
    factor = float(values.get("scaling_factor") or _DEFAULT_SCALE)
    mean, deviation = values.get("latents_mean"), values.get("latents_std")
    if mean and deviation:
        return tuple(factor / float(each) for each in deviation), tuple(float(each) for each in mean)
    return (factor,), (float(values.get("shift_factor") or 0.0),)


def _numbers(value: Any) -> tuple[float, ...] | None:
    """One number, or one for each channel; None for what the validation of the section will refuse."""
    try:
        return tuple(float(each) for each in (value if isinstance(value, list | tuple) else [value]))
    except (TypeError, ValueError):
        return None


def _digest(paths: tuple[Path, ...]) -> str:
    """Of the files' bytes; a file that has not changed is read once a process."""
    return "-".join(known_digest(path, file_state(path)) for path in paths)
