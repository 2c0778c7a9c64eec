"""Floating-point operations of training, by three conventions.

exact: what must be computed. Each matrix multiplies the real positions that pass through it (the text head: those
with a target, of text or of image tokens; with `model.modality_weights` patches have their own), attention is counted
by the visible pairs of the mask, 4 * width forward and 8 * width backward a pair and layer; the first matrices have no
gradient of their input. Frozen weights (`train.freeze`) have none of their own: 4 operations an element, not 6. Padding
and recomputation do not count.
hardware: what is computed. Padding and images of weight 0 count, the attention's backward pass makes its scores
again (10 * width a pair), and what activation checkpointing recomputes counts once more.
palm: (6 * N + 12 * width * layers * row length) * positions, as PaLM counts (Chowdhery et al., 2022, appendix B); N:
parameters without the weights of blocks that only patches have, and without the embedding table unless it is the text
head too. Hidden pairs and padding are included: only to compare like with like.

B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from transfusion.codec.interface import latent_shape
from transfusion.config import Config
from transfusion.families.build import build_model, family_of
from transfusion.model.backbone import Backbone
from transfusion.schema import Batch
from transfusion.sequence.sizes import IMAGE


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations outside of attention, and of it."""

    products: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.attention + other.attention)

    def scaled(self, factor: float) -> Operations:
        return Operations(factor * self.products, factor * self.attention)


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of some training, forward and backward, under each convention."""

    exact: Operations = Operations()
    hardware: Operations = Operations()
    palm: Operations = Operations()

    def __add__(self, other: Work) -> Work:
        return Work(self.exact + other.exact, self.hardware + other.hardware, self.palm + other.palm)

    def scaled(self, factor: float) -> Work:
        return Work(self.exact.scaled(factor), self.hardware.scaled(factor), self.palm.scaled(factor))


class ImageLoad(NamedTuple):
    """Images of one shape, latents [C, H, W]. carried: with those of weight 0, which only keep ranks alike.

    A latent of another modality is a patch.
    """

    shape: tuple[int, int, int]
    real: int
    carried: int
    modality: str = IMAGE

    def patches(self, patch_size: int) -> int:
        """Of one image. patch_size: `model.patch_size`."""
        _, height, width = self.shape
        return height * width // (patch_size**2 if self.modality == IMAGE else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a micro-batch holds, as far as operations depend on it.

    positions: rows times row length. tokens: those that are no padding. pairs: visible (query, key) pairs.
    """

    positions: int
    tokens: int
    text_targets: int
    pairs: int
    images: tuple[ImageLoad, ...]

    @classmethod
    def of(cls, batch: Batch, config: Config) -> Workload:
        """Of a batch that is still on the host: on a GPU its mask would have to be waited for."""
        return cls(
            positions=batch.token_ids_BS.numel(),
            tokens=batch.counts.tokens,
            text_targets=batch.counts.text_targets,
            pairs=batch.mask.visible_pairs() + (batch.second[1].visible_pairs() if batch.second else 0),
            images=tuple(
                ImageLoad(
                    latent_shape(group, config.codec, config.modalities),
                    int(group.image_weight_I.sum()),
                    len(group.image_weight_I),
                    group.modality,
                )
                for group in batch.media
            ),
        )


class FlopModel:
    """Operations of a configuration's network for any workload. `config.model.vocabulary` must be set."""

    def __init__(self, config: Config) -> None:
        self._family = family_of(config)
        with torch.device("meta"):
            self._model = build_model(config)
        model = config.model
        self.pair = model.heads * model.head_width * model.layers
        self.patch_size = model.patch_size
        # Operations of what a position of text passes through, of a patch, and of a target of the text head.
        self.blocks, self.image_blocks = (
            sum(map(_operations, _parts(self._model, of_images))) for of_images in (False, True)
        )
        self.lm_head = _operations(self._model.lm_head)
        self.recomputes = config.train.activation_checkpointing
        self.recomputed, self.image_recomputed = (
            _recomputed(self._model, self.recomputes, of_images) for of_images in (False, True)
        )
        self.counted = sum(
            parameter.numel()
            for name, parameter in self._model.named_parameters()
            if (model.tie_embeddings or not name.startswith("embedding.")) and ".image_" not in name
        )
        self.sequence_length = config.data.sequence_length
        self.config = config
        self._images: dict[tuple[tuple[int, ...], bool, str], int] = {}

    def work(self, load: Workload) -> Work:
        """Of one forward and backward pass over a micro-batch."""
        real = sum(
            self.image_operations(each.shape, modality=each.modality) * each.real for each in load.images
        )
        again = self.recomputes == "block"
        carried = sum(
            self.image_operations(each.shape, again, each.modality) * each.carried for each in load.images
        )
        of_images = sum(each.real * self._family.head_targets(each.shape) for each in load.images)
        head = self.lm_head * (load.text_targets + of_images)
        patches = sum(each.real * each.patches(self.patch_size) for each in load.images)
        texts, others = load.tokens - patches, load.positions - patches
        scores = 14 if self.recomputes == "none" else 18
        return Work(
            exact=Operations(
                self.blocks * texts + self.image_blocks * patches + head + real,
                12 * self.pair * load.pairs,
            ),
            hardware=Operations(
                (self.blocks + 2 * self.recomputed) * others
                + (self.image_blocks + 2 * self.image_recomputed) * patches
                + head
                + carried,
                scores * self.pair * load.pairs,
            ),
            palm=Operations(
                6 * self.counted * load.positions, 12 * self.pair * self.sequence_length * load.positions
            ),
        )

    def of(self, batches: Sequence[Batch]) -> Work:
        """Of some micro-batches that are still on the host."""
        return sum((self.work(Workload.of(batch, self.config)) for batch in batches), Work())

    def image_operations(
        self, shape: tuple[int, int, int], recomputes: bool = False, modality: str = IMAGE
    ) -> int:
        """Forward and backward through what encodes and decodes one image of latents [C, H, W]."""
        key = (shape, recomputes, modality)
        if key not in self._images:
            self._images[key] = self._family.image_operations(self._model, *key)
        return self._images[key]


def _parts(model: Backbone, of_images: bool) -> list[nn.Module]:
    """Attention and feed-forward of each block in turn: those of text, or those of patches, which may be the same."""
    parts = []
    for block in model.blocks:
        for name in ("attention", "feed_forward"):
            own = getattr(block, f"image_{name}")
            parts.append(own if of_images and own is not None else block.get_submodule(name))
    return parts


def _recomputed(model: Backbone, what: str, of_images: bool) -> int:
    """Elements of the blocks' matrices that multiply once more in the backward pass.

    Recomputation ends once all saved tensors are there again: the last product of what is recomputed is not made.
    """
    if what == "none":
        return 0
    parts = _parts(model, of_images)
    attentions, feed_forwards = parts[::2], parts[1::2]
    again, last = (attentions, "out") if what == "attention" else (parts, "down")
    ends = attentions if what == "attention" else feed_forwards
    # The last product is of patches, where they have weights of their own there.
    others = _parts(model, not of_images)
    is_last = of_images or ends[0] in others
    return sum(map(_matrices, again)) - is_last * sum(_matrices(part.get_submodule(last)) for part in ends)


def _operations(module: nn.Module) -> int:
    """Of a position, forward and backward: a product, that of its gradient, and of a weight that is trained its own."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    return sum(parameter.numel() * (6 if parameter.requires_grad else 4) for parameter in matrices)


def _matrices(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
