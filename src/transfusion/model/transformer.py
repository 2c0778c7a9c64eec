"""The whole network: one row of text tokens and image patches in, text loss and predicted noise out.

B rows, S positions, A position axes, D width, I images, P patches an image, E values a patch,
N text targets, C channels, H/W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transfusion.config import CodecConfig, ModalityConfig, ModelConfig
from transfusion.model.attention import WHOLE_ROWS, Attend, Sharing, visibility
from transfusion.model.backbone import Backbone
from transfusion.model.block import TransformerBlock
from transfusion.model.heads import TextHead
from transfusion.model.media import MediaPatches
from transfusion.model.patch_position import PatchPosition, image_grids
from transfusion.model.patches import Encoding, Grid, PatchDecoder, PatchEncoder, patchify
from transfusion.model.unet import UNetDecoder, UNetEncoder
from transfusion.schema import Batch, Modality
from transfusion.sequence.sizes import IMAGE
from transfusion.sequence.timesteps import CLEAN_TIMESTEP

PATCHERS: dict[str, tuple[type[PatchEncoder | UNetEncoder], type[PatchDecoder | UNetDecoder]]] = {
    "linear": (PatchEncoder, PatchDecoder),
    "unet": (UNetEncoder, UNetDecoder),
}


class ModelOutput(NamedTuple):
    """text_sum: fp32 nats summed over the text targets. prediction_NE: of all patches of images, group after group.

    others: the same of each further modality. `patches.unpatchify_groups` makes images of it. As many tensors, whatever
    the batch holds: see `patches`.
    """

    text_sum: Tensor
    prediction_NE: Tensor
    others: tuple[Tensor, ...] = ()


class Transfusion(Backbone):
    """Embeds text and patches into one row, runs the blocks, and reads both kinds of output off it."""

    def __init__(
        self,
        config: ModelConfig,
        codec: CodecConfig,
        *,
        modalities: Sequence[ModalityConfig] = (),
        attend: Attend = WHOLE_ROWS,
        loss_chunk_size: int = 4096,
        activation_checkpointing: str = "none",
        z_loss: float = 0.0,
        sharing: Sharing | None = None,
    ) -> None:
        """`config.vocabulary` must be set. Weights are left uninitialised: see `initialise`.

        activation_checkpointing: what the backward pass computes again, "none", each "block", or its "attention".
        sharing: the ranks that batches with `routes` are shared with.
        """
        super().__init__()
        self.config, self.attend, self.sharing = config, attend, sharing
        self.recomputes_blocks = activation_checkpointing == "block"
        patch_values = codec.depth * config.patch_size**2
        encoder, decoder = PATCHERS[config.patch_embed]
        self.embedding = nn.Embedding(config.vocabulary, config.hidden_size)
        self.patch_encoder = encoder(config, patch_values)
        recomputes_attention = activation_checkpointing == "attention"
        self.blocks = nn.ModuleList(
            TransformerBlock(config, attend, recomputes_attention=recomputes_attention)
            for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        tied = self.embedding if config.tie_embeddings else None
        self.lm_head = TextHead(config.hidden_size, config.vocabulary, loss_chunk_size, z_loss, tied=tied)
        self.patch_decoder = decoder(config, patch_values)
        self.media = (
            nn.ModuleDict({each.name: MediaPatches(config, each) for each in modalities})
            if modalities
            else None
        )
        self.patch_position = (
            None if config.patch_position == "none" else PatchPosition(config, image_grids(config, codec))
        )

    def forward(self, batch: Batch, noisy: Sequence[Tensor]) -> ModelOutput:
        """Text loss and predicted noise of a batch.

        noisy: for each group of media its noised latents [I, C, H, W]. Every branch runs on every rank, with
        weight 0 where a rank has nothing for it, so that all ranks gather the same parameters. Clean images of the
        context are decoded with the others, and nothing is asked of what comes out.
        """
        encodings = self._encodings(batch, noisy)
        hidden_BSD = self.embed(batch, torch.cat([encoding.patch_ND for encoding in encodings]))
        grouping = self.grouping_of(batch)
        hidden_BSD = self.run_blocks(hidden_BSD, batch.position_BSA, visibility(batch), grouping=grouping)
        flat = self.norm(hidden_BSD).flatten(0, 1)
        # The count is known on the host, so nothing waits for the device to tell it.
        weight = batch.text_weight_BS.flatten()
        learned_N = torch.nonzero_static(weight, size=batch.counts.text_targets).squeeze(1)
        text_sum = self.lm_head(flat[learned_N], batch.target_ids_BS.flatten()[learned_N])
        states = self._states_of_patches(flat, batch).split([len(each.patch_ND) for each in encodings])
        image_NE, *others = map(self.decode_patches, states, encodings)
        return ModelOutput(text_sum, image_NE, tuple(others))

    def embed(self, batch: Batch, patch_ND: Tensor) -> Tensor:
        """Token embeddings [B, S, D] with the encoded patches of all groups in the slots of the images."""
        is_text_BS1 = (batch.modality_BS != Modality.IMAGE).unsqueeze(-1)
        tokens_BSD = self.embedding(batch.token_ids_BS)
        hidden_BSD = tokens_BSD * is_text_BS1.to(tokens_BSD.dtype)
        flat = hidden_BSD.flatten(0, 1)
        weight_N1 = torch.cat(
            [
                group.image_weight_I[:, None].expand_as(group.patch_slot_IP).reshape(-1, 1)
                for group in batch.media
            ]
        )
        # Adding, where slots hold zero, leaves the slots of an image of weight 0 as they are.
        patch_ND = patch_ND * weight_N1.to(patch_ND.dtype)
        if batch.routes is not None and self.sharing is not None:
            routes = batch.routes
            patch_MD = self.sharing.exchange(patch_ND[routes.order_N], routes.sent, routes.received)
            return flat.index_add(0, routes.slot_M, patch_MD).view_as(hidden_BSD)
        return flat.index_add(0, _slots(batch), patch_ND).view_as(hidden_BSD)

    def _states_of_patches(self, flat: Tensor, batch: Batch) -> Tensor:
        """States [N, D] of the patches of the batch's images, from those of all positions [B * S, D]."""
        if batch.routes is None or self.sharing is None:
            return flat[_slots(batch)]
        routes = batch.routes
        back_ND = self.sharing.exchange(flat[routes.slot_M], routes.received, routes.sent)
        return back_ND[routes.order_N.argsort()]

    def _encodings(self, batch: Batch, noisy: Sequence[Tensor]) -> list[Encoding]:
        """Of images, and of each further modality."""
        encodings = []
        for modality in (IMAGE, *(self.media or ())):
            mine = [number for number, group in enumerate(batch.media) if group.modality == modality]
            timestep_I = torch.cat([batch.media[number].timestep_I for number in mine])
            encodings.append(self.encode_patches([noisy[number] for number in mine], timestep_I, modality))
        return encodings

    def encode_patches(self, noisy: Sequence[Tensor], timestep_I: Tensor, modality: str = IMAGE) -> Encoding:
        """Noised latents of one modality, a tensor [I, C, H, W] for each group, to encoded patches at their places.

        timestep_I: of all images.
        """
        if modality != IMAGE:
            assert self.media is not None
            encoding: Encoding = self.media[modality](noisy, timestep_I)
            return encoding
        size = self.config.patch_size
        grids = tuple(Grid.of(latent_ICHW, size) for latent_ICHW in noisy)
        patch_NE = torch.cat([patchify(latent_ICHW, size).flatten(0, 1) for latent_ICHW in noisy])
        patch_ND, *skips = self._recomputed(self.patch_encoder, patch_NE, timestep_I, grids)
        return Encoding(self.at_their_places(patch_ND, grids), timestep_I, grids, tuple(skips))

    def read_images(self, latents: Sequence[Tensor], modality: str = IMAGE) -> Tensor:
        """Clean latents, a tensor [I, C, H, W] for each shape, as context to read: patches [N, D], in order."""
        images = sum(map(len, latents))
        clean_I = torch.full((images,), CLEAN_TIMESTEP, device=latents[0].device)
        return self.encode_patches(latents, clean_I, modality).patch_ND

    def decode_patches(self, state_ND: Tensor, encoding: Encoding) -> Tensor:
        """Final states of the patches to their predicted values [N, E]. See `patches.unpatchify_groups`."""
        if encoding.modality != IMAGE:
            assert self.media is not None
            decoder = self.media[encoding.modality].get_submodule("decoder")
            answer_NE: Tensor = decoder(state_ND, encoding.timestep_I, encoding.grids, ())
            return answer_NE
        predicted_NE: Tensor = self._recomputed(
            self.patch_decoder, state_ND, encoding.timestep_I, encoding.grids, encoding.skips
        )
        return predicted_NE

    def _recomputed(self, module: nn.Module, values: Tensor, *others: Any) -> Any:
        """Call the encoder or decoder; a U-Net is recomputed in the backward pass where the blocks are."""
        if self.config.patch_embed == "linear" or not torch.is_grad_enabled():
            return module(values, *others)
        # A module whose inputs have no gradient ends its backward pass, for ZeRO, before it has begun.
        values = values if values.requires_grad else values.requires_grad_()
        if self.recomputes_blocks:
            return checkpoint(module, values, *others, use_reentrant=False)
        return module(values, *others)


def _slots(batch: Batch) -> Tensor:
    """Where the patches of all images stand: flat positions [N], group after group."""
    return torch.cat([group.patch_slot_IP.flatten() for group in batch.media])
