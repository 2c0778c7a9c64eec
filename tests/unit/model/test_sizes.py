"""A row with images of several sizes: each is learned from as if it stood alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import Transfusion
from transfusion.parallel.collectives import global_counts
from transfusion.schema import Batch, Segment, TextSegment
from transfusion.sequence.layout import image_segment
from transfusion.sequence.sizes import Size

Build = Callable[..., tuple[Config, Transfusion]]
SIZES = ("8x8", "4x12", "12x4", "8x16")
UNET: dict[str, Any] = {"patch_embed": "unet", "unet": {"widths": [8, 16], "layers": 1, "head_dim": 8}}


def documents(config: Config) -> list[list[Segment]]:
    """One image of each size, 4x12 and 12x4 of as many patches, between texts and alone."""
    text, random = TextSegment((9, 10, 11)), np.random.default_rng(0)
    images = [
        image_segment(config.media_sizes, size, random.integers(0, 256, (1, *size.sides), dtype=np.uint8))
        for size in map(Size.parse, SIZES)
    ]
    return [[text, images[0]], [images[1], text], [text, images[2]], [images[3], text]]


def judged(config: Config, model: Transfusion, batch: Batch, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Text loss, image loss of the images of weight 1, and the gradient of both."""
    model.zero_grad()
    groups = zip(batch.media, weights, strict=True)
    batch = replace(batch, media=tuple(replace(group, image_weight_I=weight) for group, weight in groups))
    terms = TransfusionLoss(config.diffusion).terms(model, batch)
    (terms.sums["text"] + terms.sums["image"]).backward()
    gradient = torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )
    return terms.sums["text"].detach(), terms.sums["image"].detach(), terms.counts["image"], gradient


@pytest.mark.parametrize("position", ["1d", "2d"])
@pytest.mark.parametrize("patch_embed", [{}, UNET])
def test_each_image_of_a_row_learns_as_alone(
    build_model: Build, pack: Callable[..., Batch], patch_embed: dict[str, Any], position: str
) -> None:
    config, model = build_model(image_sizes=SIZES, position=position, **patch_embed)
    parts, timesteps = documents(config), [3, 700, 40, 500]
    together = pack(config, [parts], timesteps=timesteps)
    assert [tuple(group.values.shape[2:]) for group in together.media] == [(4, 12), (8, 8), (8, 16), (12, 4)]
    assert [group.patch_slot_IP.shape[1] for group in together.media] == [12, 16, 32, 12]
    every = [torch.ones(1) for _ in together.media]
    alone = []
    for number, (part, timestep) in enumerate(zip(parts, timesteps, strict=True)):
        single = pack(config, [[part]], timesteps=[timestep], keys=[number])
        alone.append(judged(config, model, single, [torch.ones(1)]))
        # This image alone of the row; the texts count there too.
        place = [tuple(group.values.shape[2:]) for group in together.media].index(
            tuple(single.media[0].values.shape[2:])
        )
        chosen = [torch.tensor([float(turn == place)]) for turn in range(4)]
        _, loss, count, _ = judged(config, model, together, chosen)
        torch.testing.assert_close(loss, alone[-1][1], rtol=1e-4, atol=1e-4)
        assert count == alone[-1][2] == single.media[0].values.numel()
    whole = judged(config, model, together, every)
    for found, parts_of_it in zip(whole, zip(*alone, strict=True), strict=True):
        wanted = torch.stack(parts_of_it).sum(0)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    # The mean is over elements, as among images of one size.
    counts = global_counts([together], TransfusionLoss(config.diffusion))
    assert counts["image"] == whole[2] == 8 * 8 + 2 * 4 * 12 + 8 * 16


def test_the_token_before_an_image_tells_its_size(build_model: Build, pack: Callable[..., Batch]) -> None:
    """And is learned: where a text goes on with an image, which one is a target."""
    config, _ = build_model(image_sizes=SIZES)
    batch = pack(config, [documents(config)])
    begins = {size: config.media_sizes.begin_token(Size.parse(size)) for size in SIZES}
    assert len(set(begins.values())) == 4 and max(begins.values()) == config.model.vocabulary - 1
    for group in batch.media:
        height, width = group.values.shape[2:]
        before = batch.token_ids_BS[0, group.patch_slot_IP[0, 0] - 1]
        assert before == begins[f"{height}x{width}"]
    learned = batch.target_ids_BS[batch.text_weight_BS > 0].tolist()
    assert all(learned.count(token) == 1 for token in begins.values())


def test_rows_and_columns_of_patches_are_those_of_the_shape(
    build_model: Build, pack: Callable[..., Batch]
) -> None:
    """4x12 and 12x4 differ in their positions alone."""
    config, _ = build_model(image_sizes=SIZES, position="2d")
    batch = pack(config, [documents(config)])
    for group in batch.media:
        rows, columns = (side // 2 for side in group.values.shape[2:])
        position_PA = batch.position_BSA[0, group.patch_slot_IP[0]]
        offset_PA = position_PA - position_PA[0]
        assert offset_PA.tolist() == [[0, row, column] for row in range(rows) for column in range(columns)]
