"""Losses and gradients of the whole network."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transfusion.codec.pixels import PixelCodec
from transfusion.config import Config
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.schedule import CosineSchedule
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import ModelOutput, Transfusion
from transfusion.model.initialise import initialise
from transfusion.model.patches import patchify
from transfusion.schema import TIMESTEP_BUCKETS, Batch, ImageSegment, LossTerms, TextSegment

Build = Callable[..., tuple[Config, Transfusion]]


@pytest.fixture
def mixed(pack: Callable[..., Batch], make_image: Any) -> Callable[[Config], Batch]:
    """Text, caption first, image first and two images in one document, in two rows."""

    def make(config: Config) -> Batch:
        image = [ImageSegment(make_image(seed), 16) for seed in range(4)]
        text = [TextSegment(tuple(range(10 * n, 10 * n + 6))) for n in range(1, 6)]
        rows = [
            [[text[0]], [text[1], image[0]]],
            [[image[1], text[2]], [text[3], image[2], text[4], image[3]]],
        ]
        return pack(config, rows, timesteps=[3, 300, 700, 999])

    return make


def losses(model: nn.Module, batch: Batch, config: Config) -> tuple[LossTerms, Tensor]:
    objective = TransfusionLoss(config.diffusion)
    terms = objective.terms(model, batch)
    return terms, objective.combine(terms, terms.counts)


class Perfect(nn.Module):
    """Answers with the noise itself, or what the prediction asks for in its place."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, batch: Batch, noisy: Sequence[Tensor]) -> ModelOutput:
        (group,) = batch.media
        noise = counter_normal(group.noise_key_I, group.values.shape[1:])
        signal, sigma = CosineSchedule(1000).factors(group.timestep_I)
        clean = PixelCodec().encode(group.values)
        answers = {"epsilon": noise, "v": signal * noise - sigma * clean, "flow": noise - clean, "x": clean}
        return ModelOutput(torch.zeros(()), patchify(answers[self.prediction], 2).flatten(0, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x"])
def test_a_perfect_prediction_has_no_image_loss(
    build_model: Build, mixed: Callable[[Config], Batch], prediction: str
) -> None:
    """N1: a model that answers with the noise itself has a diffusion loss of exactly 0."""
    config, _ = build_model()
    config = Config.model_validate(config.as_dict() | {"diffusion": {"prediction": prediction}})
    terms, loss = losses(Perfect(prediction), mixed(config), config)
    assert terms.sums["image"] == 0 and terms.counts["image"] == 4 * 64 and loss == 0
    assert (
        terms.sums["image_by_timestep"].abs().max() == 0 and terms.counts["image_by_timestep"].sum() == 4 * 64
    )
    assert (
        terms.counts["image_by_timestep"].nonzero().flatten().tolist() == [0, 3, 7, 9]
        and TIMESTEP_BUCKETS == 10
    )


def test_an_untrained_decoder_predicts_nothing(build_model: Build, mixed: Callable[[Config], Batch]) -> None:
    config, model = build_model()
    initialise(model, seed=0, layers=config.model.layers)
    terms, _ = losses(model, mixed(config), config)
    assert 0.7 < terms.sums["image"] / terms.counts["image"] < 1.3
    entropy = torch.tensor(float(config.model.vocabulary)).log()
    assert abs(terms.sums["text"] / terms.counts["text"] - entropy) < 0.1


# The parameters that each loss cannot reach.
BLIND = {"text": ("patch_decoder.",), "image": ("lm_head.",)}


@pytest.mark.parametrize("loss", ["text", "image"])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "timestep_embedding": "patch", "position": "2d"}])
def test_each_loss_has_a_gradient_on_every_parameter_it_should(
    build_model: Build, mixed: Callable[[Config], Batch], loss: str, fields: dict[str, Any]
) -> None:
    """N3: every weighted loss term has a gradient, down to each output row of each matrix."""
    config, model = build_model(**fields)
    terms, _ = losses(model, mixed(config), config)
    (terms.sums["text"] if loss == "text" else terms.sums["image"]).backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name.startswith(BLIND[loss]):
            assert gradient is None or gradient.abs().max() == 0, name
        else:
            assert gradient is not None and gradient.isfinite().all(), name
            assert gradient.abs().max() > 0, name
            if gradient.dim() == 2 and "embedding" not in name and "lm_head" not in name:
                assert (gradient.abs().amax(1) > 0).all(), f"{name}: a row has no gradient"


@pytest.mark.parametrize("kind", ["text", "images"])
def test_batches_of_one_modality_train(
    build_model: Build, pack: Callable[..., Batch], make_image: Any, kind: str
) -> None:
    """N8: batches of text alone and of images alone train, with a gradient on every parameter."""
    config, model = build_model()
    text, image = [TextSegment((9, 10, 11, 12))], [ImageSegment(make_image(0), 16)]
    batch = pack(config, [[text, text]] if kind == "text" else [[image, image], [image]])
    terms, loss = losses(model, batch, config)
    assert (terms.counts["image"] == 0) == (kind == "text") and (terms.counts["text"] == 0) == (
        kind == "images"
    )
    loss.backward()
    assert loss.isfinite()
    unused = ("patch_encoder.", "patch_position.", "patch_decoder.") if kind == "text" else ("lm_head.",)
    for name, parameter in model.named_parameters():
        # Zero, not None: every rank reduces the gradients of every parameter.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad.abs().max() == 0) == name.startswith(unused), name


def test_a_weightless_image_changes_nothing(
    build_model: Build, pack: Callable[..., Batch], make_image: Any
) -> None:
    """What a rank without images carries must not be seen by its text."""
    config, model = build_model()
    batch = pack(config, [[[TextSegment(tuple(range(20, 60)))]]])
    assert batch.media[0].image_weight_I.tolist() == [0.0]
    before = model(batch, [torch.zeros(1, 1, 8, 8)]).text_sum
    assert torch.equal(before, model(batch, [torch.randn(1, 1, 8, 8)]).text_sum)


def test_what_is_recomputed_and_that_gradients_stay_the_same(
    build_model: Build, mixed: Callable[[Config], Batch]
) -> None:
    """The attention runs twice where it is recomputed, the feed-forward only where whole blocks are."""
    config, built = build_model()
    found = {}
    for choice in ("none", "block", "attention"):
        model = Transfusion(config.model, config.codec, activation_checkpointing=choice)
        model.load_state_dict(built.state_dict())
        runs: Counter[str] = Counter()
        for block in model.blocks:
            for name in ("attention", "feed_forward"):
                block.get_submodule(name).register_forward_pre_hook(
                    lambda *_, name=name, runs=runs: runs.update([name])
                )
        losses(model, mixed(config), config)[1].backward()
        found[choice] = (runs, [p.grad for p in model.parameters() if p.grad is not None])
    layers = config.model.layers
    assert found["none"][0] == {"attention": layers, "feed_forward": layers}
    assert found["block"][0] == {"attention": 2 * layers, "feed_forward": 2 * layers}
    assert found["attention"][0] == {"attention": 2 * layers, "feed_forward": layers}
    for choice in ("block", "attention"):
        for plain, recomputed in zip(found["none"][1], found[choice][1], strict=True):
            torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


def test_bf16_loses_as_much_as_fp32(build_model: Build, mixed: Callable[[Config], Batch]) -> None:
    config, model = build_model()
    batch = mixed(config)
    plain, plain_loss = losses(model, batch, config)
    plain_loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    rounded = copy.deepcopy(model).bfloat16()
    rounded.zero_grad()
    terms, loss = losses(rounded, batch, config)
    loss.backward()
    # Sums and the loss stay fp32, whatever the network computes in.
    assert {term.dtype for term in (*terms.sums.values(), *terms.counts.values(), loss)} == {torch.float32}
    for name in ("text", "image"):
        torch.testing.assert_close(terms.sums[name], plain.sums[name], rtol=2e-2, atol=0)
    torch.testing.assert_close(loss, plain_loss, rtol=2e-2, atol=0)
    assert terms.counts["text"] == plain.counts["text"] and terms.counts["image"] == plain.counts["image"]
    for name, parameter in rounded.named_parameters():
        exact = gradients[name]
        assert parameter.grad is not None and exact is not None and parameter.grad.dtype == torch.bfloat16
        assert (parameter.grad.float() - exact).norm() < 0.1 * exact.norm(), name


def test_the_loss_is_learned(build_model: Build, mixed: Callable[[Config], Batch]) -> None:
    config, model = build_model()
    initialise(model, seed=0, layers=config.model.layers)
    batch = mixed(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        optimiser.zero_grad()
        terms, loss = losses(model, batch, config)
        loss.backward()
        optimiser.step()
        history.append(
            (terms.sums["text"] / terms.counts["text"], terms.sums["image"] / terms.counts["image"])
        )
    assert history[-1][0] < 0.3 * history[0][0] and history[-1][1] < 0.5 * history[0][1]
