"""Rows to a `Batch`, as `schema` describes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from transfusion.data.loading.rows import Row, RowImage, RowSettings, Values
from transfusion.schema import Batch, BatchCounts, Kind, MediaGroup, Modality
from transfusion.sequence.sizes import IMAGE
from transfusion_kernels import IntervalMask

# What the values of an image are, by the type that each reader of them gives.
KINDS: dict[type[np.generic], Kind] = {np.uint8: "pixels", np.float32: "latents", np.int32: "tokens"}


def collate(rows: Sequence[Row], settings: RowSettings) -> Batch:
    """The rows as one batch, on the host."""
    mask = IntervalMask(
        _stacked([row.first_key_S for row in rows]), _stacked([row.end_key_S for row in rows])
    )
    return Batch(
        token_ids_BS=_stacked([row.token_ids_S for row in rows]),
        modality_BS=_stacked([row.modality_S for row in rows]),
        position_BSA=_stacked([row.position_SA for row in rows]),
        target_ids_BS=_stacked([row.target_ids_S for row in rows]),
        text_weight_BS=_stacked([row.text_weight_S for row in rows]),
        mask=mask,
        media=_groups(rows, settings),
        counts=_counts(rows),
        second=_second(rows),
    )


def _second(rows: Sequence[Row]) -> tuple[Tensor, IntervalMask] | None:
    """What the patches of noised copies see beside themselves, in every row for as many positions. None without any."""
    length = len(rows[0].token_ids_S)
    bounds = [np.array(row.twins, np.int64).reshape(-1, 4) for row in rows]
    most = max(int(each[:, 1].sum()) for each in bounds)
    if not most:
        return None
    place_BM = np.empty((len(rows), most), np.int64)
    # Other positions, which see nothing more, fill up a row, behind those that do.
    first_BM, end_BM = (np.full((len(rows), most), length, np.int32) for _ in range(2))
    for row, twins in enumerate(bounds):
        nothing = np.arange(0)
        mine = np.concatenate(
            [nothing, *(np.arange(first, first + patches) for first, patches, _, _ in twins)]
        )
        count = len(mine)
        place_BM[row, :count] = mine
        place_BM[row, count:] = np.setdiff1d(np.arange(length), mine)[: most - count]
        first_BM[row, :count] = np.repeat(twins[:, 2], twins[:, 1])
        end_BM[row, :count] = np.repeat(twins[:, 3], twins[:, 1])
    mask = IntervalMask(torch.from_numpy(first_BM), torch.from_numpy(end_BM), num_keys=length)
    return torch.from_numpy(place_BM), mask


def _groups(rows: Sequence[Row], settings: RowSettings) -> tuple[MediaGroup, ...]:
    """Images by modality, type and shape, in row order. Of a modality without any there is one of weight 0, so that
    ranks do the same work."""
    by_shape: dict[tuple[int, str, tuple[int, ...]], list[tuple[int, RowImage]]] = {}
    modalities = settings.sizes.modalities
    for number, row in enumerate(rows):
        for image in row.images:
            first_slot = number * settings.sequence_length + image.first_patch
            kind = modalities.index(image.modality), image.values_CHW.dtype.str, image.values_CHW.shape
            by_shape.setdefault(kind, []).append((first_slot, image))
    groups = []
    for number, modality in enumerate(modalities):
        mine = [_group(images) for kind, images in sorted(by_shape.items()) if kind[0] == number]
        groups += mine or [_group([(0, _nothing(modality, settings))], is_empty=True)]
    return tuple(groups)


def _nothing(modality: str, settings: RowSettings) -> RowImage:
    """Zeros of the first size of a modality."""
    size = settings.sizes.first_of(modality)
    values: Values = np.zeros((settings.channels, *size.sides), np.uint8)
    if modality != IMAGE:
        values = np.zeros((settings.array_channels[modality], *size.sides), np.float32)
    return RowImage(values, 0, settings.sizes.patches(size), 0, 0, modality=modality)


def _group(images: Sequence[tuple[int, RowImage]], *, is_empty: bool = False) -> MediaGroup:
    first_slot_I = torch.tensor([slot for slot, _ in images], dtype=torch.int64)
    context = [image.is_context for _, image in images]
    # A noised copy stands right behind its clean image, whose values are encoded once for both.
    is_new = [True, *(not clean for clean in context[:-1])]
    return MediaGroup(
        modality=images[0][1].modality,
        kind=KINDS[images[0][1].values_CHW.dtype.type],
        values=_stacked([image.values_CHW for (_, image), new in zip(images, is_new, strict=True) if new]),
        image_weight_I=torch.full((len(images),), float(not is_empty)),
        patch_slot_IP=first_slot_I[:, None] + torch.arange(images[0][1].patches),
        timestep_I=torch.tensor([image.timestep for _, image in images], dtype=torch.int64),
        noise_key_I=torch.tensor([image.noise_key for _, image in images], dtype=torch.int64),
        is_context_I=torch.tensor(context) if any(context) else None,
        value_I=torch.tensor(is_new).cumsum(0) - 1 if any(context) else None,
        is_empty=is_empty,
    )


def _counts(rows: Sequence[Row]) -> BatchCounts:
    padding = sum(int((row.modality_S == Modality.PADDING).sum()) for row in rows)
    learned = [image for row in rows for image in row.images if not image.is_context]
    return BatchCounts(
        tokens=sum(len(row.token_ids_S) for row in rows) - padding,
        text_targets=sum(int(np.count_nonzero(row.text_weight_S)) for row in rows),
        images=len(learned),
        image_elements=sum(image.values_CHW.size for image in learned),
        padding=padding,
        faults=sum(len(row.faults) for row in rows),
    )


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
