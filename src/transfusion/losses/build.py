"""Which loss a configuration learns by, and how a loss that overflowed is told to all ranks."""

from __future__ import annotations

from torch import Tensor

from transfusion.codec import Codec, TokenCodec
from transfusion.config import Config
from transfusion.losses.chameleon import ChameleonLoss
from transfusion.losses.transfusion import TransfusionLoss


def build_loss(config: Config, codec: Codec | TokenCodec | None) -> TransfusionLoss | ChameleonLoss:
    """The loss of the configuration's model family. codec: that of the configuration; None: pixels are latents."""
    if config.model.family == "chameleon":
        if codec is None or isinstance(codec, Codec):
            raise ValueError("the token loss needs the configuration's codec of tokens")
        return ChameleonLoss(codec)
    if isinstance(codec, TokenCodec):
        raise ValueError("the diffusion loss needs a codec of latents")
    return TransfusionLoss(config.diffusion, codec)


def training_loss(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is NaN everywhere if the loss itself is not finite.

    A loss can overflow while its gradient stays finite. This way the gradient norm, which all ranks see
    alike, tells of both, and no further collective is needed.
    """
    return loss * (1.0 + 0.0 * loss.detach())
