"""Arrays of a further modality as they are stored: normed, and each block of values one latent."""

from __future__ import annotations

from torch import Tensor

from transfusion.codec.interface import grey
from transfusion.config import ModalityConfig

# A picture is at most so many times longer than wide: one line of values would be too thin to see.
_MAX_ASPECT = 4


class ArrayCodec:
    """Arrays [I, C, H, W] to latents [I, E, h, w] and back: E values of a block, C channels of height x width."""

    def __init__(self, config: ModalityConfig) -> None:
        self._block, self._scale, self._shift = config.block, config.scale, config.shift

    def encode(self, values_ICHW: Tensor) -> Tensor:
        """fp32 latents of about unit variance."""
        height, width = self._block
        normed = (values_ICHW.float() - self._shift) * self._scale
        blocks = normed.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

    def decode(self, latent_IEhw: Tensor) -> Tensor:
        """The arrays, fp32."""
        height, width = self._block
        blocks = latent_IEhw.unflatten(1, (-1, height, width)).permute(0, 1, 4, 2, 5, 3)
        return blocks.flatten(4, 5).flatten(2, 3) / self._scale + self._shift

    def picture(self, values_CHW: Tensor) -> Tensor:
        """Channels one below another, as grey values."""
        shown = grey(values_CHW.flatten(0, 1))
        _, rows, columns = shown.shape
        taller, wider = -(-columns // (rows * _MAX_ASPECT)), -(-rows // (columns * _MAX_ASPECT))
        return shown.repeat_interleave(taller, 1).repeat_interleave(wider, 2)
