"""What tells a patch where in its image it stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.config import CodecConfig, Config, ModelConfig
from transfusion.model import Transfusion
from transfusion.model.patch_position import PatchPosition, image_grids
from transfusion.model.patches import Grid
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import Batch, ImageSegment

GRIDS = [Grid(2, 3, 5), Grid(0, 4, 4), Grid(1, 4, 1)]
PATCHES = sum(grid.images * grid.patches for grid in GRIDS)
ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)


def built(kind: str, width: int = 12) -> PatchPosition:
    """Of images of up to 4 rows and 5 columns of patches."""
    config = ModelConfig(hidden_size=width, heads=1, patch_size=2, patch_position=kind)  # type: ignore[arg-type]
    module = PatchPosition(config, image_grids(config, CodecConfig(image_sizes=("6x10", "8x2"))))
    with torch.no_grad():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    return module


def sines(number: int, of: int, values: int) -> list[float]:
    """Of one row of several, or a column, a number at a time."""
    place = number - (of - 1) / 2
    frequencies = math.ceil(values / 2)
    angles = [place / 10_000 ** (power / frequencies) for power in range(frequencies)]
    return [*map(math.sin, angles), *map(math.cos, angles)][:values]


@pytest.mark.parametrize("width", [12, 6, 14])
def test_sincos_tells_row_and_column(width: int) -> None:
    module, half = built("sincos", width), width // 2
    wanted = [
        sines(row, rows, half) + sines(column, columns, half)
        for images, rows, columns in GRIDS
        for _ in range(images)
        for row in range(rows)
        for column in range(columns)
    ]
    patch_ND = torch.randn(PATCHES, width)
    torch.testing.assert_close(module(patch_ND, GRIDS), patch_ND + module.gain * torch.tensor(wanted))


def test_learned_adds_a_vector_of_the_row_and_one_of_the_column() -> None:
    module, patch_ND = built("learned"), torch.randn(PATCHES, 12)
    assert module.row.shape == (4, 12) and module.column.shape == (5, 12)
    # Of four rows and five columns those in the middle.
    wanted = torch.stack(
        [
            module.row[row + (4 - rows) // 2] + module.column[column + (5 - columns) // 2]
            for images, rows, columns in GRIDS
            for _ in range(images)
            for row in range(rows)
            for column in range(columns)
        ]
    )
    torch.testing.assert_close(module(patch_ND, GRIDS), patch_ND + module.gain * wanted)


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_one_patch_of_each_image_is_told_what_it_is_told_among_all(kind: str) -> None:
    module, patch_ND = built(kind), torch.randn(2 * 15, 12)
    together = module(patch_ND, [GRIDS[0]]).unflatten(0, (2, 15))
    for number in (0, 7, 14):
        alone = module(patch_ND.unflatten(0, (2, 15))[:, number], [GRIDS[0]], number)
        torch.testing.assert_close(alone, together[:, number])


def test_patches_stay_in_their_type() -> None:
    module = built("sincos").to(torch.bfloat16)
    assert module(torch.zeros(PATCHES, 12, dtype=torch.bfloat16), GRIDS).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_without_images_its_gradients_are_zero_and_there(kind: str) -> None:
    """As every rank's must be under ZeRO."""
    module = built(kind)
    nothing = torch.zeros(0, 12, requires_grad=True)
    module(nothing, [Grid(0, 3, 5)]).sum().backward()
    for parameter in (nothing, *module.parameters()):
        assert parameter.grad is not None and not parameter.grad.any()


def test_without_it_a_model_has_no_such_part() -> None:
    with torch.device("meta"):
        model = Transfusion(ModelConfig(vocabulary=16, patch_position="none"), CodecConfig())
    assert not [name for name, _ in model.named_parameters() if name.startswith("patch_position")]


UNET: dict[str, Any] = {"patch_embed": "unet", "unet": {"widths": [8, 16], "layers": 1, "head_dim": 8}}


@pytest.mark.parametrize("kind", ["sincos", "learned"])
@pytest.mark.parametrize("patch_embed", [{}, UNET], ids=["linear", "unet"])
@torch.no_grad()
def test_it_is_added_behind_either_encoder(
    build_model: Callable[..., tuple[Config, Transfusion]], kind: str, patch_embed: dict[str, Any]
) -> None:
    _, model = build_model(image_sizes=("8x8", "4x12"), patch_position=kind, **patch_embed)
    latents, timestep_I = [torch.randn(2, 1, 8, 8), torch.randn(1, 1, 4, 12)], torch.tensor([3, 700, 40])
    encoding, position = model.encode_patches(latents, timestep_I), model.patch_position
    assert position is not None
    model.patch_position = None
    bare = model.encode_patches(latents, timestep_I)
    torch.testing.assert_close(encoding.patch_ND, position(bare.patch_ND, bare.grids))
    assert not torch.allclose(encoding.patch_ND, bare.patch_ND)


# Later the order of patches alone has told where they are, too.
STEPS = 60


def image_of_places() -> Tensor:
    """uint8 [1, 16, 16], each of its 64 patches light or dark by where it stands and by nothing else."""
    is_light = torch.randint(0, 2, (8, 8), generator=torch.Generator().manual_seed(0))
    return (is_light.repeat_interleave(2, 0).repeat_interleave(2, 1) * 255).to(torch.uint8)[None]


def loss_after_learning(pack: Callable[..., Batch], kind: str) -> float:
    """Image loss of a model that saw this one image only, so that it can know every patch by its place."""
    config = Config.model_validate(
        {
            "model": {"vocabulary": 320, "layers": 2, "hidden_size": 32, "heads": 2, "patch_position": kind},
            "codec": {"channels": 1, "image_size": 16},
            "data": {"sequence_length": 160},
            "train": {"precision": "fp32"},
            "diffusion": {"prediction": "v"},
        }
    )
    engine, total = LocalEngine(config, ALONE), 0.0
    image = image_of_places().numpy()
    for step in range(STEPS):
        # Much noise: what a patch shows itself tells little of it.
        timesteps = [900 + (37 * step + 11 * number) % 100 for number in range(8)]
        keys = [8 * step + number for number in range(8)]
        rows = [[[ImageSegment(image, 64)], [ImageSegment(image, 64)]] for _ in range(4)]
        batch = pack(config, rows, timesteps=timesteps, keys=keys)
        terms = engine.forward_backward(batch, global_counts([batch], engine.loss))
        assert not engine.step(5e-3).read().skipped
        if step >= STEPS - 10:
            total += float(terms.sums["image"] / terms.counts["image"]) / 10
    return total


@pytest.mark.slow
def test_an_image_whose_patches_only_their_place_tells_is_learned(pack: Callable[..., Batch]) -> None:
    known = {kind: loss_after_learning(pack, kind) for kind in ("none", "sincos", "learned")}
    # An image of -1 and 1 of which nothing is known has a loss of about 1.
    assert max(known["sincos"], known["learned"]) < 0.1 and known["none"] > 0.3, known
