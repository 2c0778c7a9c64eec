"""The whole network: one row of text tokens and image patches in, text loss and predicted noise out.

B rows, S positions, A position axes, D width, I images, P patches an image, E values a patch,
N text targets, C channels, H/W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transfusion_kernels import IntervalMask

from transfusion.config import CodecConfig, ModelConfig
from transfusion.model.attention import LayerCache
from transfusion.model.block import Block
from transfusion.model.embedding import rotary_angles
from transfusion.model.heads import TextHead
from transfusion.model.patches import PatchDecoder, PatchEncoder, patchify, unpatchify
from transfusion.schema import Batch, Modality


class ModelOutput(NamedTuple):
    """text_sum: fp32 nats summed over the text targets. noise_NE: the predicted noise of all patches, group after
    group; `patches.pictures` makes images of it. Two tensors, whatever the batch holds: see `patches`.
    """

    text_sum: Tensor
    noise_NE: Tensor


class Transfusion(nn.Module):
    """Embeds text and patches into one row, runs the blocks, and reads both kinds of output off it."""

    def __init__(
        self,
        config: ModelConfig,
        codec: CodecConfig,
        *,
        attention: str = "auto",
        head_chunk: int = 4096,
        activation_checkpointing: bool = False,
    ) -> None:
        """`config.vocabulary` must be set. Weights are left uninitialised: see `initialise`."""
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        patch_values = codec.depth * config.patch_size**2
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.patch_encoder = PatchEncoder(config, patch_values)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.text_head = TextHead(config.width, config.vocabulary, head_chunk)
        self.patch_decoder = PatchDecoder(config, patch_values)

    def forward(self, batch: Batch, noisy: Sequence[Tensor]) -> ModelOutput:
        """Text loss and predicted noise of a batch.

        noisy: for each image group its noised latents [I, C, H, W]. Every branch runs on every rank, with
        weight 0 where a rank has nothing for it, so that all ranks gather the same parameters.
        """
        hidden_BSD = self.embed(batch, noisy)
        hidden_BSD = self.run_blocks(hidden_BSD, batch.position_BSA, batch.mask)
        flat = self.norm(hidden_BSD).flatten(0, 1)
        # The count is known on the host, so nothing waits for the device to tell it.
        weight = batch.text_weight_BS.flatten()
        learned_N = torch.nonzero_static(weight, size=batch.counts.text_targets).squeeze(1)
        text_sum = self.text_head(flat[learned_N], batch.target_ids_BS.flatten()[learned_N])
        slot_N = torch.cat([group.patch_slot_IP.flatten() for group in batch.images])
        return ModelOutput(text_sum, self.patch_decoder(flat[slot_N]))

    def embed(self, batch: Batch, noisy: Sequence[Tensor]) -> Tensor:
        """Token embeddings [B, S, D] with encoded patches in the slots of the images."""
        is_text_BS1 = (batch.modality_BS != Modality.IMAGE).unsqueeze(-1)
        tokens_BSD = self.embedding(batch.token_ids_BS)
        hidden_BSD = tokens_BSD * is_text_BS1.to(tokens_BSD.dtype)
        flat = hidden_BSD.flatten(0, 1)
        shapes = [tuple(group.patch_slot_IP.shape) for group in batch.images]
        patch_ND = self.patch_encoder(
            torch.cat([patchify(latents, self.config.patch_size).flatten(0, 1) for latents in noisy]),
            torch.cat([group.timestep_I for group in batch.images]),
            shapes,
        )
        slot_N = torch.cat([group.patch_slot_IP.flatten() for group in batch.images])
        weight_N1 = torch.cat(
            [
                group.image_weight_I[:, None].expand_as(group.patch_slot_IP).reshape(-1, 1)
                for group in batch.images
            ]
        )
        # Adding, where slots hold zero, leaves the slots of an image of weight 0 as they are.
        return flat.index_add(0, slot_N, patch_ND * weight_N1.to(patch_ND.dtype)).view_as(hidden_BSD)

    def encode_patches(self, noisy_ICHW: Tensor, timestep_I: Tensor) -> Tensor:
        """Noised latents to encoded patches [I, P, D]."""
        patch_IPE = patchify(noisy_ICHW, self.config.patch_size)
        images, patches, _ = patch_IPE.shape
        encoded_ND = self.patch_encoder(patch_IPE.flatten(0, 1), timestep_I, [(images, patches)])
        return encoded_ND.unflatten(0, (images, patches))

    def decode_patches(self, normed_IPD: Tensor, shape: Sequence[int]) -> Tensor:
        """Final states of the patches to predicted noise of `shape` [I, C, H, W]."""
        _, channels, height, width = shape
        patch_NE = self.patch_decoder(normed_IPD.flatten(0, 1))
        return unpatchify(patch_NE, channels, height, width, self.config.patch_size)

    def run_blocks(
        self,
        hidden_BSD: Tensor,
        position_BSA: Tensor,
        mask: IntervalMask,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """All blocks, from `caches` (one a layer) on if given; the final norm is the caller's."""
        angle_BSF = rotary_angles(position_BSA, self.config.head_dim, self.config.rope_theta)
        cosine_BSF, sine_BSF = angle_BSF.cos(), angle_BSF.sin()
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BSD = checkpoint(block, hidden_BSD, cosine_BSF, sine_BSF, mask, use_reentrant=False)
            else:
                cache = None if caches is None else caches[layer]
                hidden_BSD = block(hidden_BSD, cosine_BSF, sine_BSF, mask, cache)
        return hidden_BSD
