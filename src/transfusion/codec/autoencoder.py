"""Autoencoders: KL gives latents, VQ a grid of tokens, the nearest entries of a codebook.

I images, C channels of the latents or dimensions of a code, H/W height and width of images, h/w of latents or tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfusion.codec import pixels
from transfusion.codec.networks import Network


class KLCodec:
    """Latents are the means of the posterior, shifted and scaled to about unit variance. See `interface.Codec`.

    scale, shift: one number, or one a channel. preview: makes an image of what the decoder reads.
    """

    codebook_size, bound = 0, None

    def __init__(
        self,
        network: Network,
        scale: tuple[float, ...],
        shift: tuple[float, ...],
        preview: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self._preview = network.to(device), preview
        self._scale_C11 = torch.tensor(scale, device=device).view(-1, 1, 1)
        self._shift_C11 = torch.tensor(shift, device=device).view(-1, 1, 1)

    @torch.no_grad()
    def encode(self, values_ICHW: Tensor) -> Tensor:
        """See `Codec.encode`. The posterior's mean, so that the same image always has the same latents."""
        mean_IChw: Tensor = self.network.encode(pixels.encode(values_ICHW)).latent_dist.mode()
        return (mean_IChw - self._shift_C11) * self._scale_C11

    @torch.no_grad()
    def decode(self, latent_IChw: Tensor) -> Tensor:
        """See `Codec.decode`."""
        return pixels.decode(self.network.decode(self.decoder_input(latent_IChw)).sample)

    def decoder_input(self, latent_IChw: Tensor) -> Tensor:
        """The posterior's means, fp32 [I, C, h, w]."""
        return latent_IChw.float() / self._scale_C11 + self._shift_C11

    def preview(self, latent_IChw: Tensor) -> Tensor:
        """See `Codec.preview`."""
        return self._preview(self.decoder_input(latent_IChw))

    def as_context(self, latent_IChw: Tensor) -> Tensor:
        """The latents themselves: a detour over the image would only lose some of them."""
        return latent_IChw


class VQCodec:
    """See `interface.Codec`. preview: makes an image of what the decoder reads."""

    bound = None

    def __init__(
        self,
        network: Network,
        preview: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self._preview = network.to(device), preview
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
        code_IChw = self.decoder_input(token_Ihw)
        return pixels.decode(self.network.decode(code_IChw, force_not_quantize=True).sample)

    def decoder_input(self, token_Ihw: Tensor) -> Tensor:
        """The entries of the codebook, fp32 [I, C, h, w]."""
        shape = (*token_Ihw.shape, self.network.quantize.vq_embed_dim)
        code_IChw: Tensor = self.network.quantize.get_codebook_entry(token_Ihw.reshape(-1), shape)
        return code_IChw

    def preview(self, token_Ihw: Tensor) -> Tensor:
        """See `Codec.preview`."""
        return self._preview(self.decoder_input(token_Ihw))

    def as_context(self, token_Ihw: Tensor) -> Tensor:
        """The tokens themselves."""
        return token_Ihw
