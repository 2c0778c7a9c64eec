"""Small configurations and batches written by hand, for tests of engines and checkpoints."""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transfusion_kernels
from transfusion.codec import pixels
from transfusion.config import Config
from transfusion.data.loading.collate import collate
from transfusion.data.loading.rows import RowImage, RowSettings, joined, placed
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.engine import Engine
from transfusion.schema import (
    Batch,
    BatchCounts,
    ImageSegment,
    LossTerms,
    MediaGroup,
    Modality,
    SpecialToken,
    StepResult,
    TextSegment,
)
from transfusion.sequence.layout import image_segment, tokenize_document, with_twins
from transfusion.sequence.sizes import IMAGE
from transfusion_kernels import IntervalMask

VOCABULARY = 64
LENGTH = 32
PATCHES = 4
SIDE = 4

Content = Literal[
    "mixed",
    "text",
    "image",
    "little text",
    "two kinds",
    "packed",
    "wide",
    "two sizes",
    "clean",
    "heard",
    "seen",
    "seen and heard",
    "read",
]
# A third modality, of two lengths: one patch is two values of each of three channels.
SOUNDS: list[dict[str, Any]] = [
    {
        "name": "sound", "channels": 3, "shapes": ["1x8", "1x4"], "patch": "1x2", "scale": 0.5,
        "diffusion": {"prediction": "flow"},
    }
]  # fmt: skip
_SOUNDS_OF: dict[Content, tuple[int, ...]] = {"heard": (0, 1), "seen and heard": (1,)}
# Words of a document and the images that follow them: how many times as wide as high each is, and so how many times
# PATCHES it has.
Document = tuple[int, tuple[int, ...]]
# The second image of an even row stands on both sides of the row's middle.
PACKED: list[list[Document]] = [[(3, (1,)), (2, (1,)), (4, ())], [(5, ()), (6, (1,)), (3, (1,))]]


def small_config(**changes: Any) -> Config:
    """Two blocks of width 32 on 4x4 images of four patches. `changes`: dotted names with `__` for the dot."""
    values: dict[str, Any] = {
        "run": {"seed": 7},
        "model": {"vocabulary": VOCABULARY, "layers": 2, "hidden_size": 32, "heads": 2, "ffn_size": 64},
        "codec": {"channels": 1, "image_size": SIDE},
        "data": {"sequence_length": LENGTH, "global_batch_size": 4},
        "train": {"precision": "fp32", "attention": "auto", "zero": {}},
        "optimizer": {},
    }
    for name, value in changes.items():
        *sections, key = name.split("__")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return Config.model_validate(values)


def make_batch(content: Content, seed: int, rows: int = 2, side: int = SIDE) -> Batch:
    """Rows of one document each (packed: of three) and some padding; without images there is one of weight 0.

    side: height of the images, which have four patches, twice as wide ones eight. two kinds: as mixed, the first
    image as latents. wide: one of eight patches in each row. two sizes: one of each, in turn first. clean: see
    `_clean_batch`. heard, seen, seen and heard, read: see `_media_batch`.
    """
    if content in ("heard", "seen", "seen and heard", "read"):
        return _media_batch(content, seed, rows, side)
    if content == "clean":
        return _clean_batch(seed, rows, side)
    random = torch.Generator().manual_seed(seed)
    token = torch.zeros(rows, LENGTH, dtype=torch.int64)
    modality = torch.full((rows, LENGTH), Modality.PADDING, dtype=torch.uint8)
    weight = torch.zeros(rows, LENGTH)
    image_end = torch.zeros(rows, LENGTH, dtype=torch.int64)
    length = torch.empty(rows, dtype=torch.int64)
    slots: dict[int, list[torch.Tensor]] = {}
    start_of = torch.zeros(rows, LENGTH, dtype=torch.int64)
    for row in range(rows):
        end = 0
        for words, aspects in PACKED[row % 2] if content == "packed" else [_document(content, row)]:
            text = torch.randint(8, VOCABULARY, (words,), generator=random)
            document = [int(SpecialToken.BEGIN_DOCUMENT), *text.tolist()]
            start = end
            weight[row, start : start + len(document) - 1] = 1.0
            for times in aspects:
                first, patches = start + len(document) + 1, times * PATCHES
                slots.setdefault(times, []).append(row * LENGTH + torch.arange(first, first + patches))
                image_end[row, first : first + patches] = first + patches
                document += [
                    SpecialToken.BEGIN_IMAGE,
                    *[SpecialToken.PATCH] * patches,
                    SpecialToken.END_IMAGE,
                ]
            document.append(SpecialToken.END_DOCUMENT)
            end = start + len(document)
            if content != "image":
                weight[row, end - 2] = 1.0
            start_of[row, start:end] = start
            token[row, start:end] = torch.tensor([int(item) for item in document])
        length[row] = end
        modality[row, :end] = Modality.TEXT
    for slot in (slot for same in slots.values() for slot in same):
        modality.view(-1)[slot] = Modality.IMAGE
    images = sum(map(len, slots.values()))
    nothing = {1: [torch.arange(PATCHES)]}
    groups = tuple(
        MediaGroup(
            modality=IMAGE,
            kind="pixels",
            values=torch.randint(
                0, 256, (len(same), 1, side, times * side), generator=random, dtype=torch.uint8
            ),
            image_weight_I=torch.full((len(same),), float(images > 0)),
            is_empty=not images,
            patch_slot_IP=torch.stack(same),
            timestep_I=torch.randint(0, 1000, (len(same),), generator=random),
            noise_key_I=torch.arange(len(same)) + 1000 * seed + 100 * (times - 1),
        )
        for times, same in sorted((slots or nothing).items())
    )
    return Batch(
        token_ids_BS=token,
        modality_BS=modality,
        position_BSA=torch.arange(LENGTH).repeat(rows, 1)[..., None],
        target_ids_BS=token.roll(-1, dims=1),
        text_weight_BS=weight,
        mask=IntervalMask.from_spans(start_of, image_end, length=length),
        media=_two_kinds(*groups) if content == "two kinds" else groups,
        counts=BatchCounts(
            tokens=int(length.sum()),
            text_targets=int(weight.sum()),
            images=images,
            image_elements=sum(times * len(same) for times, same in slots.items()) * side**2,
            padding=int(rows * LENGTH - length.sum()),
        ),
    )


def _clean_batch(seed: int, rows: int, side: int) -> Batch:
    """Rows of one document with clean images, their noised copies behind it, and more images in odd rows."""
    random = np.random.default_rng(seed)
    settings = RowSettings.of(small_config(diffusion__context="clean", codec__image_size=side))
    built = []
    for row in range(rows):
        images = [
            ImageSegment(random.integers(0, 256, (1, side, side), dtype=np.uint8), PATCHES)
            for _ in range(1 + row % 2)
        ]
        text = TextSegment(tuple(random.integers(8, VOCABULARY, 3 + row % 2).tolist()))
        document = with_twins(tokenize_document([*images, text]))
        shown: list[RowImage] = []
        for number, image in enumerate(images):
            key, timestep = 1000 * seed + 10 * row + number, int(random.integers(1000))
            shown += placed(document, 0, number, image.values_CHW, timestep, key)
        built.append(joined([document], settings, tuple(shown), ()))
    return collate(built, settings)


def _media_batch(content: Content, seed: int, rows: int, side: int) -> Batch:
    """Rows of a text and behind it sounds of both lengths, an image, an image and a sound, or nothing."""
    random = np.random.default_rng(seed)
    config = small_config(modalities=SOUNDS, codec__image_size=side)
    settings, sizes, built = RowSettings.of(config), config.media_sizes, []
    for row in range(rows):
        shown: list[tuple[str, ImageSegment]] = []
        if content.startswith("seen"):
            pixels_CHW = random.integers(0, 256, (1, side, side), dtype=np.uint8)
            shown.append((IMAGE, ImageSegment(pixels_CHW, PATCHES)))
        for number in _SOUNDS_OF.get(content, ()):
            size = config.modalities[0].sizes.sizes[number]
            values_CHW = random.normal(size=(3, *size.sides)).astype(np.float32)
            shown.append(("sound", image_segment(sizes, size, values_CHW)))
        text = TextSegment(tuple(random.integers(8, VOCABULARY - 2, 3 + row % 2).tolist()))
        media = [segment for _, segment in shown]
        document = tokenize_document([*media[: row % 2], text, *media[row % 2 :]])
        placed_ones: list[RowImage] = []
        for number, (modality, segment) in enumerate(shown):
            key, timestep = 1000 * seed + 10 * row + number, int(random.integers(1000))
            placed_ones += placed(document, 0, number, segment.values_CHW, timestep, key, modality)
        built.append(joined([document], settings, tuple(placed_ones), ()))
    return collate(built, settings)


def _document(content: Content, row: int) -> Document:
    """The only document of a row that is not packed."""
    words = {"image": 0, "little text": 3, "wide": 9 - row, "two sizes": 6}.get(content, 18 + row)
    if content == "two sizes":
        return words, ((1, 2), (2, 1))[row % 2]
    return words, {"text": (), "little text": (), "wide": (2,)}.get(content, (1,))


def _two_kinds(group: MediaGroup) -> tuple[MediaGroup, MediaGroup]:
    """The first image as float latents, the others as they are."""
    fields = ("values", "image_weight_I", "patch_slot_IP", "timestep_I", "noise_key_I")
    first, others = (
        replace(group, **{name: getattr(group, name)[part] for name in fields})
        for part in (slice(1), slice(1, None))
    )
    return replace(first, kind="latents", values=pixels.encode(first.values)), others


def join_rows(first: Batch, second: Batch) -> Batch:
    """One batch with the rows of both."""
    offset = first.token_ids_BS.numel()
    groups = (first.media[0], second.media[0])
    fields = ("values", "image_weight_I", "timestep_I", "noise_key_I")
    group = replace(
        groups[0],
        patch_slot_IP=torch.cat([groups[0].patch_slot_IP, groups[1].patch_slot_IP + offset]),
        **{name: torch.cat([getattr(group, name) for group in groups]) for name in fields},
    )
    fields = ("token_ids_BS", "modality_BS", "position_BSA", "target_ids_BS", "text_weight_BS")
    masks = (first.mask, second.mask)
    first_key = torch.cat([mask.first_key for mask in masks])
    end_key = torch.cat([mask.end_key for mask in masks])
    return replace(
        first,
        **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in fields},
        mask=IntervalMask(first_key, end_key),
        media=(group,),
        counts=first.counts + second.counts,
    )


def with_broken_image(batch: Batch) -> Batch:
    """The same batch with an image of NaN."""
    group = batch.media[0]
    values = torch.full(group.values.shape, float("nan"))
    return replace(batch, media=(replace(group, kind="latents", values=values),))


def train_step(
    engine: Engine,
    batches: list[Batch],
    learning_rate: float = 1e-3,
    counts: dict[str, torch.Tensor] | None = None,
) -> tuple[LossTerms, StepResult]:
    """One optimiser step on this rank's micro-batches; the sums of all of them.

    counts: those of the step, where the batches at hand are not all of it; else counted over all ranks.
    """
    counts = counts or global_counts(batches, engine.loss)
    total: LossTerms | None = None
    for batch in batches:
        terms = engine.forward_backward(batch, counts)
        total = terms if total is None else total.plus(terms)
    assert total is not None
    return total, engine.step(learning_rate).read()


KERNELS = str(Path(transfusion_kernels.__file__).parent)
aten = torch.ops.aten
# On a GPU the host waits for what these give, or for how much.
READING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values of tensors that Python asks for.

    What the kernels look at is left out: on CPU tensors they check the mask, and plan by it, as they do on no GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = func == aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if chosen or func in READING:
            self._note()
        return func(*args, **kwargs or {})

    def __enter__(self) -> HostReads:
        self._former = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy")}
        for name, method in self._former.items():
            setattr(torch.Tensor, name, self._counted(method))
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._former.items():
            setattr(torch.Tensor, name, method)

    def _note(self) -> None:
        frames = traceback.extract_stack()[:-2]
        if any(frame.filename.startswith(KERNELS) for frame in frames):
            return
        self.places.append(" < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-6:])))

    def _counted(self, method: Any) -> Any:
        def counted(tensor: torch.Tensor, *arguments: Any) -> Any:
            self._note()
            return method(tensor, *arguments)

        return counted


def counts_of(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Counts of the given batches, without asking other ranks."""
    text = sum(batch.counts.text_targets for batch in batches)
    image = sum(batch.counts.image_elements for batch in batches)
    others: dict[str, int] = {}
    for group in (group for batch in batches for group in batch.media):
        if group.modality != IMAGE:
            here = 0 if group.is_empty else group.values.numel()
            others[group.modality] = others.get(group.modality, 0) + here
    counts = {"text": text, "image": image - sum(others.values()), **others}
    return {name: torch.tensor(float(count)) for name, count in counts.items()}


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of all that this rank trains, by kind and parameter."""
    return {
        f"{kind}/{shard.name}": tensor.detach().clone()
        for shard in engine.shards()
        for kind, tensor in shard.values.items()
    }


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two copies are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
