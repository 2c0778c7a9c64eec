"""Images to latents or tokens and back, and arrays of other media.

Reading order: interface, pixels, networks, preview, autoencoder, arrays, mel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from transfusion.codec.arrays import ArrayCodec
from transfusion.codec.autoencoder import KLCodec, VQCodec
from transfusion.codec.interface import Codec, MediaCodec, encoded
from transfusion.codec.mel import MelCodec
from transfusion.codec.networks import load_network
from transfusion.codec.pixels import PixelCodec
from transfusion.codec.preview import open_preview
from transfusion.config import CodecConfig, ModalityConfig
from transfusion.config.codec_folder import codec_fingerprint, read_facts
from transfusion.errors import UserError

__all__ = [
    "CODECS",
    "MEDIA_CODECS",
    "Codec",
    "MediaCodec",
    "encoded",
    "open_autoencoder",
    "open_codec",
    "open_media_codecs",
]

CodecOpener = Callable[[CodecConfig, torch.device | str], Codec]


def open_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """The codec that the configuration names.

    Raises UserError for a folder that is not as it was when the configuration was made, or that lacks weights.
    """
    return CODECS[config.kind](config, device)


def open_autoencoder(config: CodecConfig, device: torch.device | str = "cpu") -> KLCodec | VQCodec:
    """The codec of a folder. Raises UserError as `open_codec`."""
    folder = Path(config.folder)
    if config.fingerprint != codec_fingerprint(read_facts(folder), config.scale, config.shift):
        raise UserError(
            f"codec.folder {config.folder} does not match codec.fingerprint {config.fingerprint}:"
            " the autoencoder was changed; name the one that was used"
        )
    network, preview = load_network(folder), open_preview(folder)
    if config.kind == "vq":
        return VQCodec(network, preview, device)
    return KLCodec(network, config.scale or (1.0,), config.shift or (0.0,), preview, device)


# By `codec.kind`. What each makes of images is in `config.sections.CODEC_KINDS`.
CODECS: dict[str, CodecOpener] = {
    "pixels": lambda config, device: PixelCodec(),
    "kl": open_autoencoder,
    "vq": open_autoencoder,
}
# By `modalities.kind`, see `config.sections.MEDIA_KINDS`.
MEDIA_CODECS: dict[str, Callable[[ModalityConfig], MediaCodec]] = {"latents": ArrayCodec, "mel": MelCodec}


def open_media_codecs(modalities: Sequence[ModalityConfig]) -> dict[str, MediaCodec]:
    """The codec of each further modality, by its name."""
    return {modality.name: MEDIA_CODECS[modality.kind](modality) for modality in modalities}
