"""Images to latents or tokens and back. Reading order: interface, pixels, networks, autoencoder, quantised."""

from __future__ import annotations

from pathlib import Path

import torch

from transfusion.codec.autoencoder import KLCodec
from transfusion.codec.interface import Codec, encoded
from transfusion.codec.networks import Network, load_network
from transfusion.codec.pixels import PixelCodec
from transfusion.codec.quantised import VQCodec
from transfusion.config import CodecConfig
from transfusion.config.codec_folder import codec_fingerprint, read_facts
from transfusion.errors import UserError

__all__ = ["Codec", "encoded", "open_codec"]


def open_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """The codec that the configuration names.

    Raises UserError for a folder that is not as it was when the configuration was made, or that lacks weights.
    """
    if config.kind == "pixels":
        return PixelCodec()
    if config.kind == "vq":
        return VQCodec(_network(config), device)
    return KLCodec(_network(config), config.scale or (1.0,), config.shift or (0.0,), device)


def _network(config: CodecConfig) -> Network:
    facts = read_facts(Path(config.folder))
    if config.fingerprint != codec_fingerprint(facts, config.scale, config.shift):
        raise UserError(
            f"codec.folder {config.folder} is not the autoencoder of codec.fingerprint {config.fingerprint}:"
            " it was changed; name the one that was used"
        )
    return load_network(config.folder)
