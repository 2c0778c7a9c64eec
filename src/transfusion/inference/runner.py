"""The network as generation uses it: blocks of tokens and images behind cached rows.

Every rule of the sequence comes from `sequence.layout`; what is read here is what training laid out.

R rows, S positions of a block, A position axes, P patches an image, D width, V vocabulary, I images,
C channels, H/W image height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from transfusion.codec import Codec, open_media_codecs
from transfusion.config import Config, DiffusionConfig
from transfusion.inference.cache import CacheRows, FixedRows, PagedCache
from transfusion.inference.captured import CapturedCalls, next_power_of_two
from transfusion.model import Transfusion
from transfusion.model.backbone import Backbone
from transfusion.model.grouping import ALL_IMAGES, ALL_TEXT, Grouping
from transfusion.model.patches import Grid
from transfusion.schema import ImageSegment, Segment, SpecialToken
from transfusion.sequence.layout import Layout, image_segment, lay_out, position_axes
from transfusion.sequence.sizes import IMAGE, Size


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """What is neither text nor an image: an array of another modality.

    Attributes:
        modality: Its name in the configuration.
        values: float [C, H, W], as such arrays stand in shards.
    """

    modality: str
    values: Tensor


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What rows read next, padded to the longest.

    token_ids_RS and position_RSA: int64. end_RS: int64, up to where each position sees, counted from the
    row's length before. counts: real positions of each row. images: those in the block, as their codec encodes them, a
    tensor for each shape with its modality. patch_slot_N: int64, flat positions (row * S + position) of their patches,
    in that order; None: the block is of tokens alone, on every rank. place: where each row reads one image token, the
    grid of these images and the number of the token.
    """

    token_ids_RS: Tensor
    position_RSA: Tensor
    end_RS: Tensor
    counts: list[int]
    images: tuple[tuple[str, Tensor], ...] = ()
    patch_slot_N: Tensor | None = None
    place: tuple[Grid, int] | None = None


class ModelRunner:
    """Reads blocks into caches and answers with states and logits; holds no state of its own.

    captures: CUDA graphs serve the steps that come again. The weights then stay where they are, as under no ZeRO.
    """

    def __init__(
        self, model: Backbone, config: Config, device: torch.device, codec: Codec, *, captures: bool = False
    ) -> None:
        self.model, self.device, self.codec, self.captures = model, device, codec, captures
        self.sizes = config.media_sizes
        self._media_codecs = open_media_codecs(config.modalities)
        self._modalities = {modality.name: modality for modality in config.modalities}
        self._diffusion = config.diffusion
        # What takes no cache, or is of another device than this, leaves it to what the cache chooses.
        fits = config.train.attention in ("triton" if device.type == "cuda" else "cpu", "reference")
        self._backend = config.train.attention if fits else "auto"
        self.axes = position_axes(config.model.position)
        self.image_shapes = [(config.codec.channels, *size.sides) for size in self.sizes.sizes]
        self._latent_channels = config.codec.depth
        # An image at the earliest place it can stand, after <BOS> <BOI>, and the <EOI> behind it.
        self.causal_images = config.model.image_attention == "causal"
        self._image_layouts = {
            size: self.lay_out([self.image(size)], finished=False) for size in self.sizes.all
        }

    def lay_out(self, segments: Sequence[Segment], *, finished: bool = True) -> Layout:
        """A document as this model was trained on it; see `sequence.layout.lay_out`."""
        return lay_out(segments, axes=self.axes, finished=finished, causal_images=self.causal_images)

    def image_ends(self, images: int, patches: int) -> Tensor:
        """int64 [I, P]: how many patches of its own image each patch sees."""
        if self.causal_images:
            return torch.arange(1, patches + 1, device=self.device).expand(images, -1)
        return torch.full((images, patches), patches, device=self.device)

    def cache(self, pages: int) -> PagedCache:
        """A cache of so many pages for this model."""
        captured = CapturedCalls() if self.captures else None
        return PagedCache(self.model.config.layers, pages, self.device, self._backend, captured)

    def image(self, size: Size, values: Tensor | None = None) -> ImageSegment:
        """An image of this size, as a part of a document."""
        return image_segment(self.sizes, size, values)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, H, W] of the latents of an image of this size."""
        if size.modality != IMAGE:
            return self._modalities[size.modality].latent_shape(size)
        return self._latent_channels, *self.sizes.latents(size)

    def array_shapes(self, modality: str) -> list[tuple[int, int, int]]:
        """[C, H, W] that an array of a further modality may have. None for a modality that is not declared."""
        declared = self._modalities.get(modality)
        return [(declared.channels, *size.sides) for size in declared.sizes.sizes] if declared else []

    def diffusion(self, size: Size) -> DiffusionConfig:
        """How images or arrays of this size are diffused."""
        return self._diffusion if size.modality == IMAGE else self._modalities[size.modality].diffusion

    def patch_size(self, size: Size) -> int:
        """Latents a side of a patch."""
        return self.model.config.patch_size if size.modality == IMAGE else 1

    def bound(self, size: Size) -> float | None:
        """See `Codec.bound`."""
        return self.codec.bound if size.modality == IMAGE else None

    def decode(self, encoded: Tensor, size: Size) -> Tensor:
        """Images, uint8 [I, C, H, W], or arrays of another modality, fp32, of what the network has drawn."""
        codec = self.codec if size.modality == IMAGE else self._media_codecs[size.modality]
        return codec.decode(encoded)

    def as_context(self, drawn: Tensor, size: Size) -> Tensor:
        """See `Codec.as_context`. Arrays of another modality are read as they were drawn."""
        return self.codec.as_context(drawn) if size.modality == IMAGE else drawn

    def _encode(self, modality: str, values: Tensor) -> Tensor:
        codec = self.codec if modality == IMAGE else self._media_codecs[modality]
        return codec.encode(values.to(self.device))

    def check_previews(self) -> None:
        """Raise UserError where the codec shows no latents before they are decoded."""
        self.codec.preview(torch.zeros(1, *self.latent_shape(self.sizes.first), device=self.device))

    def image_positions(self, starts: Sequence[int], size: Size) -> Tensor:
        """Positions [R, P + 1, A] of images of this size whose first patches stand at `starts`, each with its <EOI>.

        Positions of `lay_out` only ever shift along a document.
        """
        return self.image_shifts(size) + torch.tensor(starts, device=self.device)[:, None, None]

    def image_shifts(self, size: Size) -> Tensor:
        """`image_positions` [P + 1, A] of an image whose first patch stands at 0."""
        layout = self._image_layouts[size]
        first = layout.images[0][0]
        return torch.from_numpy(layout.position_SA[first:] - first).to(self.device)

    def prompt_block(
        self, pieces: Sequence[tuple[Layout, int, int]], images: Sequence[Tensor | Media] = ()
    ) -> ModelInput:
        """Pieces of documents, each from a first position to before another, and all images (uint8 [C, H, W]) in them.

        Arrays of other modalities stand among the images.

        No piece ends inside an image.
        """
        longest = max(end - first for _, first, end in pieces)
        ids_RS = np.full((len(pieces), longest), SpecialToken.PADDING, dtype=np.int64)
        position_RSA = np.zeros((len(pieces), longest, self.axes), dtype=np.int64)
        end_RS = np.zeros((len(pieces), longest), dtype=np.int64)
        slots: list[Tensor] = []
        nothing = torch.zeros(0, dtype=torch.int64)
        for row, (layout, first, end) in enumerate(pieces):
            count = end - first
            ids_RS[row, :count] = layout.token_ids_S[first:end]
            position_RSA[row, :count] = layout.position_SA[first:end]
            end_RS[row, :count], end_RS[row, count:] = layout.end_key_S[first:end] - first, count
            for first_patch, patches in layout.images:
                if first <= first_patch < end:
                    slots.append(row * longest + first_patch - first + torch.arange(patches))
        media = [image if isinstance(image, Media) else Media(IMAGE, image) for image in images]
        by_shape: dict[tuple[str, torch.Size], list[int]] = {}
        for number, each in enumerate(media):
            by_shape.setdefault((each.modality, each.values.shape), []).append(number)
        return ModelInput(
            torch.from_numpy(ids_RS).to(self.device),
            torch.from_numpy(position_RSA).to(self.device),
            torch.from_numpy(end_RS).to(self.device),
            [end - first for _, first, end in pieces],
            tuple(
                (modality, self._encode(modality, torch.stack([media[number].values for number in group])))
                for (modality, _), group in by_shape.items()
            ),
            torch.cat([nothing, *(slots[number] for group in by_shape.values() for number in group)]).to(
                self.device
            ),
        )

    def text_block(self, rows: Sequence[Sequence[int]]) -> ModelInput:
        """Rows of tokens alone, as they are, each from its first position on."""
        counts = [len(row) for row in rows]
        ids_RS = np.full((len(rows), max(counts)), SpecialToken.PADDING, dtype=np.int64)
        for ids_S, row in zip(ids_RS, rows, strict=True):
            ids_S[: len(row)] = row
        position_S = torch.arange(max(counts), device=self.device)
        end_RS = torch.minimum(position_S + 1, torch.tensor(counts, device=self.device)[:, None])
        position_RSA = position_S[:, None].expand(len(rows), -1, self.axes)
        return ModelInput(torch.from_numpy(ids_RS).to(self.device), position_RSA, end_RS, counts)

    def token_block(self, ids: Sequence[int], starts: Sequence[int]) -> ModelInput:
        """One token a row, at running positions `starts`."""
        ids_R1, start_R1 = torch.tensor([ids, starts], device=self.device)[..., None].unbind()
        position_R1A = start_R1[..., None].expand(-1, -1, self.axes)
        return ModelInput(ids_R1, position_R1A, torch.ones_like(ids_R1), [1] * len(ids))

    def image_block(self, encoded: Tensor, starts: Sequence[int], size: Size) -> ModelInput:
        """One finished image of this size a row, its first patch at running position `starts`, and its <EOI>.

        encoded: the images as the codec encodes them.
        """
        layout = self._image_layouts[size]
        rows, (first, patches) = len(starts), layout.images[0]
        count = patches + 1
        ids_S = torch.from_numpy(layout.token_ids_S[first:]).to(self.device)
        end_S = torch.from_numpy(layout.end_key_S[first:]).to(self.device) - first
        row_start_R1 = torch.arange(rows, device=self.device)[:, None] * count
        slot_RP = row_start_R1 + torch.arange(patches, device=self.device)
        return ModelInput(
            ids_S.expand(rows, -1),
            self.image_positions(starts, size),
            end_S.expand(rows, -1),
            [count] * rows,
            ((size.modality, encoded),),
            slot_RP.flatten(),
        )

    def read(self, rows: CacheRows, block: ModelInput) -> Tensor:
        """Read the block into the cache; returns the final state [R, D] of each row's last real position."""
        hidden_RSD = self._run(rows, block)
        if min(block.counts) == hidden_RSD.shape[1]:
            return self.model.norm(hidden_RSD[:, -1])
        last_R = torch.tensor(block.counts, device=self.device) - 1
        return self.model.norm(hidden_RSD[torch.arange(len(last_R), device=self.device), last_R])

    def read_tokens(self, rows: CacheRows, ids: list[int]) -> Tensor:
        """Read one token a row into the cache; returns the final states [R, D]."""
        captured = rows.cache.captured
        if captured is None:
            return self.read(rows, self.token_block(ids, rows.lengths))
        # Padded to few shapes.
        count = next_power_of_two(len(ids))
        padded = ids + ids[-1:] * (count - len(ids))
        id_R1 = torch.tensor(padded)[:, None].to(self.device, non_blocking=True)
        read = partial(self._read_packed_tokens, rows.cache)
        state_RD = captured("tokens", read, id_R1, rows.packed(1, count))
        rows.advance([1] * len(ids))
        return state_RD[: len(ids)]

    def _read_packed_tokens(self, cache: PagedCache, id_R1: Tensor, rows_RQ: Tensor) -> Tensor:
        rows = FixedRows(cache, rows_RQ, torch.ones_like(id_R1))
        position_R1A = rows.length_R1[..., None].expand(-1, -1, self.axes)
        hidden_R1D = self.model.embedding(id_R1)
        return self.model.norm(self.model.run_blocks(hidden_R1D, position_R1A, rows.mask, rows.layers)[:, -1])

    def states(self, rows: CacheRows, block: ModelInput) -> Tensor:
        """Read the block into the cache; returns the final states [R, S, D] of all positions."""
        return self.model.norm(self._run(rows, block))

    def _run(self, rows: CacheRows, block: ModelInput) -> Tensor:
        hidden_RSD = self.model.embedding(block.token_ids_RS)
        if block.place is not None:
            grid, number = block.place
            hidden_RSD = self.model.at_their_places(hidden_RSD.flatten(0, 1), [grid], number)[:, None]
        if block.images:
            assert block.patch_slot_N is not None
            image_ND = self._read_media(block.images).to(hidden_RSD.dtype)
            flat = hidden_RSD.flatten(0, 1).index_copy(0, block.patch_slot_N, image_ND)
            hidden_RSD = flat.view_as(hidden_RSD)
        mask = rows.mask(block.end_RS, block.counts)
        grouping = self._grouping(block)
        hidden_RSD = self.model.run_blocks(hidden_RSD, block.position_RSA, mask, rows.layers, grouping)
        rows.advance(block.counts)
        return hidden_RSD

    def _read_media(self, images: Sequence[tuple[str, Tensor]]) -> Tensor:
        """Encoded patches [N, D] in their order. Those of one modality that stand together are read in one call."""
        parts = []
        for modality, group in itertools.groupby(images, key=lambda each: each[0]):
            encoded = [each for _, each in group]
            if modality == IMAGE:
                parts.append(self.model.read_images(encoded))
            else:
                assert isinstance(self.model, Transfusion)
                parts.append(self.model.read_images(encoded, modality))
        return torch.cat(parts)

    def _grouping(self, block: ModelInput) -> Grouping:
        """Which positions are of images, where those have weights of their own."""
        if block.place is not None:
            return ALL_IMAGES
        if block.patch_slot_N is None or self.model.config.modality_weights == "shared":
            return ALL_TEXT
        is_image_RS = torch.zeros_like(block.token_ids_RS, dtype=torch.bool)
        is_image_RS.view(-1)[block.patch_slot_N] = True
        return Grouping.of(is_image_RS, len(block.patch_slot_N))

    def logits(self, state_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of the token after each state."""
        return self.model.lm_head(state_RD).float()
