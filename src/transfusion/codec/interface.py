"""What training and sampling see of an autoencoder: images to latents, or to tokens, and back.

I images, C channels of the latents, H/W height and width of images, h/w of latents.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """Images to latents and back. Frozen: it has no gradient and is no part of the network that is trained.

    bound: latents lie in [-bound, bound]; None: anywhere.
    """

    bound: float | None

    def encode(self, values_ICHW: Tensor) -> Tensor:
        """uint8 images to fp32 latents [I, C, h, w] of about unit variance; floats are latents already."""

    def decode(self, latent_IChw: Tensor) -> Tensor:
        """Latents to uint8 images [I, *, H, W]."""

    def as_context(self, latent_IChw: Tensor) -> Tensor:
        """Drawn latents as they are read again: what `encode` takes, uint8 or float."""


@runtime_checkable
class TokenCodec(Protocol):
    """Images to tokens of a codebook with `codebook_size` entries, and back."""

    codebook_size: int

    def tokens(self, values_ICHW: Tensor) -> Tensor:
        """uint8 images to int64 tokens [I, h, w] in [0, codebook_size); integers of three axes are tokens already."""

    def decode(self, token_Ihw: Tensor) -> Tensor:
        """Tokens to uint8 images [I, *, H, W]."""
