"""The types that cross module borders.

Shape suffixes: B rows, S positions in a row, A position axes, I images in a group, P patches an image,
C channels, H/W image height and width, K timestep buckets.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from transfusion.tokens import SpecialToken as SpecialToken
from transfusion_kernels import IntervalMask

# Image losses are also reported by timestep: this many equal buckets over [0, diffusion.steps).
TIMESTEP_BUCKETS = 10


# What the values of an image are.
Kind = Literal["pixels", "latents", "tokens"]


class Modality(enum.IntEnum):
    """What stands at a position of a row. IMAGE: a patch, of an image or of other media."""

    TEXT = 0
    IMAGE = 1
    PADDING = 2


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A run of text tokens (ids as the tokenizer gives them, without control tokens)."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageSegment:
    """One image or array of another modality: values [C, H, W] as decoded, its patches, how many stand in a row (0: it
    is square), and the token before them, which tells modality and size."""

    values_CHW: Any
    patches: int
    columns: int = 0
    begin: int = int(SpecialToken.BEGIN_IMAGE)


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, slots=True)
class Document:
    """What a model reads between <BOS> and <EOS>: segments in reading order, and where they came from."""

    segments: tuple[Segment, ...]
    source: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaGroup:
    """All images of a batch, or all arrays of another modality, that share one kind and one shape.

    modality: "image", or the name of another.
    kind, values: "pixels" uint8 [I, C, H, W], which the codec turns into what the network reads; or that already,
        "latents" fp32 [I, C, H, W] or "tokens" int32 [I, H, W].
    image_weight_I: float32, 1 for a real image, 0 for one that only keeps every rank's work alike.
    patch_slot_IP: int64, flat positions (row * S + position) of its patches, row-major over the image.
    timestep_I: int64 in [0, diffusion.steps); one noise level an image.
    noise_key_I: int64, key of the counter-based noise (`diffusion.noise`).
    is_context_I: bool, True for a clean image that is only read (`diffusion.context`). None: there is none.
    value_I: int64, which of the values each image shows, where some show the same. None: each its own.
    is_empty: its image has weight 0, and no position.
    """

    modality: str
    kind: Kind
    values: Tensor
    image_weight_I: Tensor
    patch_slot_IP: Tensor
    timestep_I: Tensor
    noise_key_I: Tensor
    is_context_I: Tensor | None = None
    value_I: Tensor | None = None
    is_empty: bool = False

    @property
    def learned_I(self) -> Tensor:
        """float32, 1 for an image that is learned, else 0."""
        if self.is_context_I is None:
            return self.image_weight_I
        return self.image_weight_I * ~self.is_context_I


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCounts:
    """Host integers that describe a batch, known without asking the device. Images: those that are learned."""

    tokens: int
    text_targets: int
    images: int
    image_elements: int
    padding: int
    faults: int = 0

    def __add__(self, other: BatchCounts) -> BatchCounts:
        return BatchCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRoutes:
    """Where ranks share rows: from the images that this rank has to the positions that the ranks have, and back.

    order_N: int64, the patches of this rank's images in the order of the ranks that they are sent to; sent: how many
    each gets. slot_M: int64, flat positions (row * slice + position) of the patches that come, rank after rank;
    received: how many from each. held: positions of this rank's slice that hold a patch.
    """

    order_N: Tensor
    sent: tuple[int, ...]
    slot_M: Tensor
    received: tuple[int, ...]
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Packed rows of text and images, on one device.

    token_ids_BS: int64. modality_BS: uint8 (`Modality`). position_BSA: int64, A = 1 (running position in
    its document) or 3 (running position, patch row, patch column). target_ids_BS: int64, the next token.
    text_weight_BS: float32, 1 where the next token is learned, else 0. mask: who sees whom. media: at
    least one group of each modality, in the order of the configuration, so that every rank does the same work. Where
    there is nothing of a modality, an empty one.
    second: positions that see more, int64 [B, M], and what, as `interval_attention` takes it: the noised images beside
    clean ones see what comes before these.
    routes: only where ranks share rows; then S is a slice of the mask's positions (`parallel.ulysses`).
    """

    token_ids_BS: Tensor
    modality_BS: Tensor
    position_BSA: Tensor
    target_ids_BS: Tensor
    text_weight_BS: Tensor
    mask: IntervalMask
    media: tuple[MediaGroup, ...]
    counts: BatchCounts
    routes: PatchRoutes | None = None
    second: tuple[Tensor, IntervalMask] | None = None

    @property
    def patches(self) -> int:
        """Positions that hold a patch, known without asking the device."""
        if self.routes is not None:
            return self.routes.held
        return sum(group.patch_slot_IP.numel() for group in self.media if not group.is_empty)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved: Batch = _move(self, torch.device(device))
        return moved


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return _pinned(value, device).to(device, non_blocking=True)
    if isinstance(value, IntervalMask):
        bounds = (_pinned(bound, device) for bound in (value.first_key, value.end_key))
        pinned = IntervalMask(*bounds, num_keys=value.num_keys, narrow=value.narrow)
        return pinned.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    if isinstance(value, Batch | MediaGroup | PatchRoutes):
        return replace(value, **{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    return value


def _pinned(value: Tensor, device: torch.device) -> Tensor:
    """In memory from where a copy to a GPU does not wait for all that the GPU still has to do."""
    return value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums and counts by name, never means, so that they add up over chunks, micro-batches and ranks.

    "text": nats over text targets. "image": squared error over latent elements, or nats over image tokens.
    "image_by_timestep": that by timestep, in `TIMESTEP_BUCKETS`. Float32 tensors without a dimension, or [K].
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]

    def detached(self) -> LossTerms:
        return self._each(Tensor.detach)

    def double(self) -> LossTerms:
        """In float64: what adds up many of them goes past what float32 counts exactly."""
        return self._each(Tensor.double)

    def plus(self, other: LossTerms) -> LossTerms:
        if self.sums.keys() != other.sums.keys():
            raise ValueError(f"terms of two losses: {list(self.sums)} and {list(other.sums)}")
        return LossTerms(
            {name: total + other.sums[name] for name, total in self.sums.items()},
            {name: count + other.counts[name] for name, count in self.counts.items()},
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> LossTerms:
        return LossTerms(
            {name: change(total) for name, total in self.sums.items()},
            {name: change(count) for name, count in self.counts.items()},
        )


class Decision(enum.IntEnum):
    """What all ranks do after a step; the greatest value of any rank wins."""

    CONTINUE = 0
    SAVE = 1
    SAVE_AND_STOP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outcome of one optimiser step.

    skipped: a loss or gradient of any rank was not finite, or the norm greater than was allowed.
    module_norms: of the gradient before clipping, by the module's name; None where they were not asked for.
    """

    gradient_norm: float
    skipped: bool
    module_norms: dict[str, float] | None = None


@dataclass(slots=True, kw_only=True)
class TrainState:
    """All that a run needs beside weights and optimiser to go on exactly where it stopped. JSON only.

    bad_steps: skipped ones in a row, up to this step. roll_backs: times that a former checkpoint was brought
    back. recent: loss and gradient norm of the newest good steps, where spikes are looked for.
    faults: samples of all ranks that could not be read, of the `samples` that were tried.
    """

    step: int = 0
    skipped_steps: int = 0
    bad_steps: int = 0
    roll_backs: int = 0
    recent: list[list[float]] = field(default_factory=list)
    faults: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    data: dict[str, Any] = field(default_factory=dict)
