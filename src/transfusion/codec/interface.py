"""What training and sampling see of an autoencoder: images to latents, or to tokens, and back.

I images, C channels of the latents, H/W height and width of images, h/w of latents.
"""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from transfusion.config import CodecConfig
from transfusion.schema import MediaGroup


class Codec(Protocol):
    """Turns images into what the network reads, and back. It has no gradient, and is not trained.

    The network reads latents, fp32 [I, C, h, w] of about unit variance, or tokens, int64 [I, h, w] in
    [0, codebook_size).
    """

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook. 0 for latents."""

    @property
    def bound(self) -> float | None:
        """Latents lie in [-bound, bound]. None sets no bound."""

    def encode(self, values_ICHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            values_ICHW: uint8 pixels.

        Returns:
            Latents or tokens.
        """

    def decode(self, encoded: Tensor) -> Tensor:
        """Decode images.

        Args:
            encoded: Latents or tokens.

        Returns:
            uint8 pixels [I, C, H, W].
        """

    def preview(self, encoded: Tensor) -> Tensor:
        """Roughly what `decode` would give, at almost no cost.

        Args:
            encoded: Latents or tokens.

        Returns:
            uint8 pixels [I, C, H, W].

        Raises:
            UserError: The codec has none, since no map was fitted for it.
        """

    def as_context(self, drawn: Tensor) -> Tensor:
        """What the network reads of an image that it has drawn.

        Args:
            drawn: Latents or tokens, as they were drawn.

        Returns:
            Latents or tokens of the image that was made of them.
        """


def encoded(group: MediaGroup, codec: Codec | None) -> Tensor:
    """The latents or tokens of a group of images, stored ones as they are.

    Args:
        group: Images of one kind and shape.
        codec: Encodes pixels. None where there are none.

    Returns:
        Latents fp32 [I, C, h, w], or tokens int64 [I, h, w].

    Raises:
        ValueError: For pixels without a codec.
    """
    if group.kind == "pixels":
        if codec is None:
            raise ValueError("a batch of pixels needs the configuration's codec")
        values = codec.encode(group.values)
    else:
        values = group.values.long() if group.kind == "tokens" else group.values.float()
    return values if group.value_I is None else values[group.value_I]


def latent_shape(group: MediaGroup, codec: CodecConfig | None) -> tuple[int, int, int]:
    """[C, H, W] of the latents of each image of the group, known before it is encoded; codec None: pixels."""
    if group.kind == "tokens":
        # Their codec knows how deep its codes are; nothing here asks.
        return 1, *group.values.shape[1:]
    _, channels, height, width = group.values.shape
    if codec is not None and group.kind == "pixels":
        return codec.latent_shape(height, width)
    return channels, height, width


def image_elements(group: MediaGroup, codec: CodecConfig | None) -> int:
    """What each image of the group has of the image loss: numbers of its latents, or tokens."""
    shape = latent_shape(group, codec)
    return math.prod(shape[1:]) if codec is not None and codec.makes == "tokens" else math.prod(shape)
