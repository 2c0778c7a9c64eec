"""The VQ autoencoder: an image is a grid of tokens, the nearest entries of a codebook.

I images, H/W height and width of images, h/w of tokens, C dimensions of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfusion.codec import pixels
from transfusion.codec.networks import Network


class VQCodec:
    """See `interface.Codec`."""

    bound = None

    def __init__(self, network: Network, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device)
        self.codebook_size: int = network.config.num_vq_embeddings

    @torch.no_grad()
    def encode(self, values_ICHW: Tensor) -> Tensor:
        """See `Codec.encode`."""
        encoded_IChw = self.network.encode(pixels.encode(values_ICHW)).latents
        images, _, height, width = encoded_IChw.shape
        _, _, (_, _, token_N) = self.network.quantize(encoded_IChw)
        return token_N.view(images, height, width).long()

    @torch.no_grad()
    def decode(self, token_Ihw: Tensor) -> Tensor:
        """See `Codec.decode`."""
        code_width = self.network.quantize.vq_embed_dim
        code_IChw = self.network.quantize.get_codebook_entry(
            token_Ihw.reshape(-1), (*token_Ihw.shape, code_width)
        )
        return pixels.decode(self.network.decode(code_IChw, force_not_quantize=True).sample)

    def as_context(self, token_Ihw: Tensor) -> Tensor:
        """The tokens themselves."""
        return token_Ihw
