"""What training and sampling see of an autoencoder: images to latents, or to tokens, and back.

I images, C channels of the latents, H/W height and width of images, h/w of latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from transfusion.config import CodecConfig, ModalityConfig
from transfusion.schema import MediaGroup
from transfusion.sequence.sizes import IMAGE, Size


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


class MediaCodec(Protocol):
    """The same of a further modality: its arrays to latents of which each is one patch, and back."""

    def encode(self, values_ICHW: Tensor) -> Tensor:
        """Encode arrays, as they are read from shards.

        Args:
            values_ICHW: As many channels, height and width as the modality declares.

        Returns:
            Latents, fp32 [I, E, h, w] of about unit variance.
        """

    def decode(self, latent_IEhw: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latent_IEhw: As `encode` makes them.

        Returns:
            Arrays [I, C, H, W].
        """

    def picture(self, values_CHW: Tensor) -> Tensor:
        """Draw one array for people to look at.

        Args:
            values_CHW: As it is read from a shard, or as `decode` makes it.

        Returns:
            A grey image, uint8 [1, rows, columns].
        """


def grey(values_HW: Tensor) -> Tensor:
    """Values as uint8 [1, H, W], the least black and the greatest white."""
    shown = values_HW.float()
    least, most = shown.min(), shown.max()
    return ((shown - least) / (most - least).clamp(min=1e-6) * 255).to(torch.uint8)[None]


def encoded(group: MediaGroup, codec: Codec | MediaCodec | None) -> Tensor:
    """The latents or tokens of a group of images, stored ones as they are, or the latents of other media.

    Args:
        group: Images of one kind and shape, or arrays of another modality.
        codec: That of the modality. Encodes pixels, and arrays. None where there are none.

    Returns:
        Latents fp32 [I, C, h, w], or tokens int64 [I, h, w].

    Raises:
        ValueError: For pixels without a codec.
    """
    if group.kind == "pixels" or group.modality != IMAGE:
        if codec is None:
            raise ValueError("a batch of pixels or arrays needs the configuration's codec")
        values = codec.encode(group.values)
    else:
        values = group.values.long() if group.kind == "tokens" else group.values.float()
    return values if group.value_I is None else values[group.value_I]


def latent_shape(
    group: MediaGroup, codec: CodecConfig | None, modalities: Sequence[ModalityConfig] = ()
) -> tuple[int, int, int]:
    """[C, H, W] of the latents of each image of the group, known before it is encoded; codec None: pixels."""
    for modality in modalities:
        if modality.name == group.modality:
            height, width = group.values.shape[2:]
            return modality.latent_shape(Size(height, width, modality.name))
    if group.kind == "tokens":
        # Their codec knows how deep its codes are; nothing here asks.
        return 1, *group.values.shape[1:]
    _, channels, height, width = group.values.shape
    if codec is not None and group.kind == "pixels":
        return codec.latent_shape(height, width)
    return channels, height, width


def media_elements(
    group: MediaGroup, codec: CodecConfig | None, modalities: Sequence[ModalityConfig] = ()
) -> int:
    """What each image of the group has of its modality's loss: numbers of its latents, or tokens."""
    shape = latent_shape(group, codec, modalities)
    return math.prod(shape[1:]) if codec is not None and codec.makes == "tokens" else math.prod(shape)
