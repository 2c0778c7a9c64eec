"""The U-Net patch embedder: its size, what each image sees, and what each of its settings does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from transfusion.config import CodecConfig, Config, ModelConfig, UNetConfig
from transfusion.families.build import count_parameters
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import Transfusion
from transfusion.model.initialise import initialise
from transfusion.model.patches import Grid, patchify
from transfusion.model.unet import UNetDecoder, UNetEncoder
from transfusion.schema import Batch, ImageSegment, TextSegment

Build = Callable[..., tuple[Config, Transfusion]]
SMALL: dict[str, Any] = {"patch_embed": "unet", "unet": {"widths": [8, 16], "layers": 1, "head_dim": 8}}


@pytest.mark.parametrize("patch_size", [1, 2, 8])
@pytest.mark.parametrize(("width", "layers", "heads"), [(768, 16, 12), (4096, 32, 32)])
def test_it_has_as_many_parameters_as_the_paper_says(
    width: int, layers: int, heads: int, patch_size: int
) -> None:
    """0.27 B within 5 %, the same for the smallest and the largest transformer (table 7)."""
    config = ModelConfig(
        vocabulary=32_000,
        layers=layers,
        hidden_size=width,
        heads=heads,
        patch_embed="unet",
        patch_size=patch_size,
    )
    parts = count_parameters(config, CodecConfig(channels=3, image_size=256))
    assert abs((parts["patch_encoder"] + parts["patch_decoder"]) / 0.27e9 - 1) < 0.05


def whole(patch_size: int, **changes: Any) -> tuple[UNetEncoder, UNetDecoder]:
    """Both ways on 2 channels, every weight at work."""
    fields = {"widths": (8, 16), "layers": 1, "head_dim": 8, **changes}
    config = ModelConfig(
        hidden_size=32,
        heads=4,
        patch_embed="unet",
        patch_size=patch_size,
        unet=UNetConfig.model_validate(fields),
    )
    encoder, decoder = UNetEncoder(config, 2 * patch_size**2), UNetDecoder(config, 2 * patch_size**2)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder, decoder


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@torch.no_grad()
def test_images_of_several_shapes_go_through_together_as_alone(patch_size: int) -> None:
    """And each has as many patches as the linear encoder would give it, in reading order."""
    encoder, decoder = whole(patch_size)
    latents = [torch.randn(2, 2, 16, 8), torch.randn(1, 2, 8, 24)]
    timestep = torch.tensor([3, 500, 900])
    cut = [patchify(latent, patch_size).flatten(0, 1) for latent in latents]
    grids = [Grid.of(latent, patch_size) for latent in latents]
    patch_ND, *skips = encoder(torch.cat(cut), timestep, grids)
    assert len(patch_ND) == sum(grid.images * grid.patches for grid in grids) == len(torch.cat(cut))
    together = decoder(patch_ND, timestep, grids, skips)
    assert together.shape == torch.cat(cut).shape
    first = 0
    for values, grid, times in zip(cut, grids, timestep.split([2, 1]), strict=True):
        alone_ND, *alone_skips = encoder(values, times, [grid])
        alone = decoder(alone_ND, times, [grid], alone_skips)
        torch.testing.assert_close(together[first : first + len(values)], alone, rtol=1e-4, atol=1e-4)
        first += len(values)


@pytest.mark.parametrize("patch_size", [1, 2, 8])
def test_a_prediction_sees_its_own_image_alone_and_all_of_it(patch_size: int) -> None:
    """Through the skips as through the states; self-attention reaches every pixel."""
    encoder, decoder = whole(patch_size)
    patch_NE = torch.randn(2 * 4, 2 * patch_size**2, requires_grad=True)
    grids, timestep = [Grid(2, 2, 2)], torch.tensor([3, 500])
    patch_ND, *skips = encoder(patch_NE, timestep, grids)
    for state in (patch_ND, torch.zeros_like(patch_ND)):
        predicted = decoder(state, timestep, grids, skips)
        (gradient,) = torch.autograd.grad(predicted[0, 0], patch_NE, retain_graph=True)
        assert (gradient[:4] != 0).all() and (gradient[4:] == 0).all()


@torch.no_grad()
def test_every_setting_and_both_timesteps_matter() -> None:
    encoder, decoder = whole(2)
    patch_NE, grids = torch.randn(4, 8), [Grid(1, 2, 2)]
    here, there = torch.tensor([3]), torch.tensor([700])
    patch_ND, *skips = encoder(patch_NE, here, grids)
    assert not torch.allclose(patch_ND, encoder(patch_NE, there, grids)[0], atol=1e-3)
    predicted = decoder(patch_ND, here, grids, skips)
    assert not torch.allclose(predicted, decoder(patch_ND, there, grids, skips), atol=1e-3)
    counts = {
        sum(parameter.numel() for parameter in whole(2, **changes)[0].parameters())
        for changes in ({}, {"layers": 2}, {"widths": (16, 16)}, {"widths": (8, 24)})
    }
    assert len(counts) == 4
    torch.manual_seed(0)
    one = whole(2)[0](patch_NE, here, grids)[0]
    torch.manual_seed(0)
    assert not torch.allclose(one, whole(2, head_dim=4)[0](patch_NE, here, grids)[0], atol=1e-4)


@pytest.fixture
def mixed(pack: Callable[..., Batch], make_image: Any) -> Callable[[Config], Batch]:
    def make(config: Config) -> Batch:
        patches = config.patches_per_image
        image, text = [ImageSegment(make_image(n), patches) for n in range(2)], TextSegment((9, 10, 11))
        return pack(config, [[[text, image[0]]], [[image[1], text]]], timesteps=[3, 700])

    return make


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_has_a_gradient(
    build_model: Build, mixed: Callable[[Config], Batch], checkpointing: bool
) -> None:
    config, model = build_model(**SMALL)
    model.recomputes_blocks = checkpointing
    objective = TransfusionLoss(config.diffusion)
    terms = objective.terms(model, mixed(config))
    terms.sums["image"].backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("lm_head."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("patch_size", [1, 8])
def test_it_learns_from_its_initial_weights(
    build_model: Build, mixed: Callable[[Config], Batch], patch_size: int
) -> None:
    """One patch of the whole image too: what the transformer cannot know comes by the skips."""
    config, model = build_model(patch_size=patch_size, **SMALL)
    initialise(model, seed=0, layers=config.model.layers)
    objective, batch, history = TransfusionLoss(config.diffusion), mixed(config), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        terms = objective.terms(model, batch)
        (terms.sums["image"] / terms.counts["image"]).backward()
        optimiser.step()
        history.append((terms.sums["image"] / terms.counts["image"]).item())
    assert 0.7 < history[0] < 1.3 and history[-1] < 0.6 * history[0]
