"""What training and sampling see of an autoencoder: images to latents, or to tokens, and back.

I images, C channels of the latents, H/W height and width of images, h/w of latents.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from transfusion.schema import MediaGroup


class Codec(Protocol):
    """Images to what the network reads, and back. Frozen: it has no gradient and is no part of what is trained.

    What the network reads are latents, fp32 [I, C, h, w] of about unit variance, or tokens, int64 [I, h, w] in
    [0, codebook_size).
    """

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook; 0 for latents."""

    @property
    def bound(self) -> float | None:
        """Latents lie in [-bound, bound]; None: anywhere."""

    def encode(self, values_ICHW: Tensor) -> Tensor:
        """uint8 images [I, C, H, W] to latents or tokens."""

    def decode(self, encoded: Tensor) -> Tensor:
        """Latents or tokens to uint8 images [I, C, H, W]."""

    def as_context(self, drawn: Tensor) -> Tensor:
        """Drawn latents or tokens as the network reads them again: those of the image that was made of them."""


def encoded(group: MediaGroup, codec: Codec | None) -> Tensor:
    """The latents or tokens of a group of images, which were stored or are made now.

    Raises ValueError for pixels without a codec.
    """
    if group.kind == "pixels":
        if codec is None:
            raise ValueError("a batch of pixels needs the configuration's codec")
        return codec.encode(group.values)
    return group.values.long() if group.kind == "tokens" else group.values.float()
