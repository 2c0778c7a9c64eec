"""Weights of their own for patches: where they are equal, the network of shared weights, else apart from text's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import Transfusion
from transfusion.model.grouping import ALL_IMAGES, ALL_TEXT, Grouping
from transfusion.model.initialise import initialise
from transfusion.schema import Batch, ImageSegment, TextSegment

Build = Callable[..., tuple[Config, Transfusion]]
OWN = ["ffn", "all"]
FIELDS: list[dict[str, Any]] = [{}, {"qk_norm": True, "num_kv_heads": 1, "norm_placement": "post"}]


@pytest.fixture
def batch(pack: Callable[..., Batch], make_image: Any) -> Callable[[Config], Batch]:
    """Rows of text, images and padding, in which no two images stand at the same places."""

    def make(config: Config) -> Batch:
        image = [ImageSegment(make_image(seed), 16) for seed in range(3)]
        text = TextSegment(tuple(range(10, 16)))
        rows = [[[text], [text, image[0]]], [[image[1], text], [text, image[2], text]]]
        return pack(config, rows, timesteps=[3, 300, 700])

    return make


def learned(model: Transfusion, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every gradient."""
    loss = TransfusionLoss(config.diffusion)
    terms = loss.terms(model, batch)
    total = loss.combine(terms, terms.counts)
    model.zero_grad()
    total.backward()
    return total.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("weights", OWN)
@pytest.mark.parametrize("fields", FIELDS, ids=["plain", "norms"])
def test_equal_weights_are_the_shared_network(
    build_model: Build, batch: Callable[[Config], Batch], weights: str, fields: dict[str, Any]
) -> None:
    """The same loss, and gradients that add up to those of the weights that all positions share."""
    config, shared = build_model(**fields)
    own_config, own = build_model(modality_weights=weights, **fields)
    values = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(values[name.replace("image_", "")])
    of_images = {name for name, _ in own.named_parameters() if "image_" in name}
    assert bool(of_images) and all("feed_forward" in name or weights == "all" for name in of_images)
    made = batch(config)
    wanted, gradients = learned(shared, made, config)
    got, parts = learned(own, made, own_config)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        image_name = name.replace(".attention", ".image_attention").replace(
            ".feed_forward", ".image_feed_forward"
        )
        total = parts[name] + parts[image_name] if image_name in of_images else parts[name]
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", OWN)
def test_each_modality_passes_through_its_own(
    build_model: Build, batch: Callable[[Config], Batch], weights: str
) -> None:
    """A row of text alone knows nothing of the weights of images, and leaves no gradient in them."""
    config, model = build_model(modality_weights=weights)
    made = batch(config)
    own = {name: p for name, p in model.named_parameters() if ".image_" in name}

    def states() -> Tensor:
        hidden_BSD = torch.randn(*made.token_ids_BS.shape, 32, generator=torch.Generator().manual_seed(1))
        return model.run_blocks(hidden_BSD, made.position_BSA, made.mask, grouping=model.grouping_of(made))

    before = states().detach()
    # The first document is text alone, and no position of it sees another.
    states()[0, :7].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in own.values())
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.1)
    changed = (states() - before).abs().amax(-1)
    assert not changed[0, :7].any()
    assert (changed[made.modality_BS == 1] > 1e-3).all()


def test_positions_come_back_to_their_places() -> None:
    is_image = torch.tensor([[False, True, True, False], [True, False, False, False]])
    grouping = Grouping.of(is_image, 3)
    x_BSD = torch.arange(8.0).view(2, 4, 1)
    ordered = grouping.ordered(x_BSD)
    assert ordered.flatten().tolist() == [0, 3, 5, 6, 7, 1, 2, 4]
    assert torch.equal(grouping.in_rows(ordered, 2), x_BSD)
    marked = grouping.apply(ordered, lambda x: x, lambda x: -x)
    assert grouping.in_rows(marked, 2).flatten().tolist() == [0, -1, -2, 3, -4, 5, 6, 7]
    for alone, sign in ((ALL_TEXT, 1), (ALL_IMAGES, -1)):
        assert torch.equal(alone.apply(x_BSD, lambda x: x, lambda x: -x), sign * x_BSD)
        assert alone.ordered(x_BSD) is x_BSD and alone.in_rows(x_BSD, 2) is x_BSD


@pytest.mark.parametrize("weights", OWN)
@pytest.mark.parametrize("recomputes", ["block", "attention"])
def test_recomputation_changes_nothing(
    build_model: Build, batch: Callable[[Config], Batch], weights: str, recomputes: str
) -> None:
    config, model = build_model(modality_weights=weights)
    made = batch(config)
    again = Transfusion(config.model, config.codec, activation_checkpointing=recomputes)
    initialise(model, seed=0, layers=config.model.layers)
    again.load_state_dict(model.state_dict())
    wanted, gradients = learned(model, made, config)
    got, others = learned(again, made, config)
    assert torch.equal(wanted, got)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7)
