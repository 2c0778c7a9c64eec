"""The network and its loss: what is predicted from what, its parts, and that it can learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transfusion.config import CodecConfig, Config
from transfusion.config.checking import check_as
from transfusion.errors import UserError
from transfusion.families.build import build_model, family_of
from transfusion.generate import Pipeline
from transfusion.losses.chameleon import ChameleonLoss
from transfusion.model import Chameleon, Transfusion
from transfusion.model.embedding import rotation
from transfusion.model.patches import Grid
from transfusion.observe.flops import FlopModel
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import Batch, ImageSegment, TextSegment

from .conftest import TOKENS, Squares, flat_image, values_of

Build = Callable[..., tuple[Config, Chameleon]]
ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)


def pairs(pack: Any, config: Config) -> Batch:
    """Two rows: caption and image and text; image and caption, and an image alone."""
    first, second, third = (ImageSegment(flat_image(seed).numpy(), TOKENS) for seed in (1, 2, 3))
    return pack(
        config,
        [
            [[TextSegment((9, 10, 11)), first, TextSegment((12,))]],
            [[second, TextSegment((20, 21))], [third]],
        ],
    )


def ids_of(batch: Batch, config: Config) -> Tensor:
    """Token ids of the rows with the images' own in their places, made one by one."""
    ids = batch.token_ids_BS.clone()
    for group in batch.media:
        for image, slots in zip(Squares().encode(group.values), group.patch_slot_IP, strict=True):
            for token, slot in zip(image.flatten().tolist(), slots.tolist(), strict=True):
                ids.view(-1)[slot] = config.model.vocabulary + token
    return ids


def embedded(model: Chameleon, ids: Tensor, batch: Batch) -> Tensor:
    """Embeddings of the rows, with the tokens of images at their places."""
    hidden_BSD = model.embedding(ids)
    slots = batch.media[0].patch_slot_IP
    flat = hidden_BSD.flatten(0, 1)
    image_ND = model.at_their_places(flat[slots.flatten()], [Grid(len(slots), 4, 4)])
    return flat.index_copy(0, slots.flatten(), image_ND).view_as(hidden_BSD)


def test_the_loss_is_that_of_every_token_from_those_before(build: Build, pack: Any) -> None:
    """By all logits at once, and autograd through the plain formula, z-loss included."""
    config, model = build(train={"z_loss": 0.01})
    batch = pairs(pack, config)
    ids = ids_of(batch, config)
    hidden = model.run_blocks(embedded(model, ids, batch), batch.position_BSA, batch.mask)
    logit_BSV = model.lm_head(model.norm(hidden))
    log_normaliser = logit_BSV.logsumexp(-1)
    following = torch.cat((ids[:, 1:], ids[:, :1]), 1)
    nats = log_normaliser - logit_BSV.gather(-1, following[..., None]).squeeze(-1)
    is_text = batch.text_weight_BS.bool()
    is_image = following >= config.model.vocabulary
    assert int(is_image.sum()) == 3 * TOKENS and not (is_text & is_image).any()
    plain = (nats + 0.01 * log_normaliser.square())[is_text | is_image].mean()
    wanted = torch.autograd.grad(plain, list(model.parameters()))

    loss = ChameleonLoss(config.codec, Squares())
    terms = loss.terms(model, batch)
    counts = global_counts([batch], loss)
    assert (counts["text"], counts["image"]) == (is_text.sum(), 3 * TOKENS)
    assert (terms.counts["text"], terms.counts["image"]) == (counts["text"], counts["image"])
    torch.testing.assert_close(terms.sums["text"], nats[is_text].sum())
    torch.testing.assert_close(terms.sums["image"], nats[is_image].sum())
    total = loss.combine(terms, counts)
    torch.testing.assert_close(total, nats[is_text | is_image].mean())
    for got, expected in zip(torch.autograd.grad(total, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_without_images_is_a_batch_of_text(build: Build, pack: Any) -> None:
    """Its image of weight 0 stands on tokens of text, which it must leave alone."""
    config, model = build()
    batch = pack(config, [[[TextSegment((9, 10, 11, 12))]]])
    terms = ChameleonLoss(config.codec, Squares()).terms(model, batch)
    assert (float(terms.sums["image"]), float(terms.counts["image"]), float(terms.counts["text"])) == (
        0,
        0,
        5,
    )
    state = model.norm(model.run_blocks(model.embedding(batch.token_ids_BS), batch.position_BSA, batch.mask))
    total = model.lm_head(state[0, :5], batch.target_ids_BS[0, :5])
    torch.testing.assert_close(terms.sums["text"], total)


@torch.no_grad()
def test_a_token_reaches_no_earlier_position(build: Build, pack: Any) -> None:
    config, model = build()
    batch = pairs(pack, config)
    ids = ids_of(batch, config)
    changed = ids.clone()
    place = int(batch.media[0].patch_slot_IP[0, 7])
    changed[0, place] = config.model.vocabulary + (ids[0, place] - config.model.vocabulary + 1) % 16
    one, other = (
        model.run_blocks(model.embedding(each), batch.position_BSA, batch.mask) for each in (ids, changed)
    )
    assert torch.equal(one[0, :place], other[0, :place]) and torch.equal(one[1], other[1])
    assert ((one - other)[0, place : place + 9].abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_text_has_the_logits_of_a_transfusion_with_the_same_weights(build: Build, pack: Any) -> None:
    config, model = build()
    plain = Transfusion(config.model, CodecConfig(channels=1, image_size=8))
    weights = model.state_dict()
    for name in ("embedding.weight", "lm_head.weight"):
        weights[name] = weights[name][: config.model.vocabulary]
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("patch_") for name in missing)
    batch = pack(config, [[[TextSegment((9, 10, 11, 12))]]])
    one, other = (
        each.lm_head(
            each.norm(each.run_blocks(each.embedding(batch.token_ids_BS), batch.position_BSA, batch.mask))
        )
        for each in (model, plain)
    )
    assert torch.equal(one[..., : config.model.vocabulary], other)
    assert one.shape[-1] == config.model.vocabulary + 16


@pytest.mark.slow
def test_it_learns_images_and_captions_by_heart(tokenizer: Any, pack: Any) -> None:
    """Both ways, through the engine and the pipeline: captions drawn as their images, images told as captions."""
    config = Config.model_validate(
        values_of(optimizer={"learning_rate": 1e-2}, model={"vocabulary": tokenizer.vocabulary})
    )
    engine = LocalEngine(config, ALONE, Squares())
    captions = ["a handwritten three", "the digit seven"]
    images = [flat_image(1), flat_image(2)]
    rows = []
    for caption, pixels in zip(captions, images, strict=True):
        text = TextSegment(tuple(tokenizer.encode(caption)))
        image = ImageSegment(pixels.numpy(), TOKENS)
        rows += [[[text, image]], [[image, text]], [[image]]]
    batch = pack(config, rows)
    counts = global_counts([batch], engine.loss)
    for step in range(140):
        terms = engine.forward_backward(batch, counts)
        assert not engine.step(1e-2 if step < 110 else 1e-3).read().skipped
    # What no model can know: which of two images begins, in four rows; which of two captions begins, or whether
    # an image does, in two each.
    image_floor, text_floor = 4 * math.log(2), 2 * math.log(4) + 2 * math.log(2)
    assert image_floor - 0.01 < float(terms.sums["image"]) < image_floor + 0.5
    assert text_floor - 0.01 < float(terms.sums["text"]) < text_floor + 0.5
    with engine.evaluation("raw") as module:
        pipeline = Pipeline(module, tokenizer, config, "cpu", Squares())
        drawn = pipeline.sample(captions, per_prompt=2, guidance=2.0, seed=5)
        told = pipeline.caption(torch.stack(images))
    assert told == captions
    for sample in drawn:
        assert torch.equal(sample.pixels, images[captions.index(sample.prompt)])


def test_the_switch_brings_the_recipe_and_keeps_what_is_said() -> None:
    config = Config.model_validate(values_of())
    model = config.model
    assert (model.qk_norm, model.norm_placement, model.image_attention, model.patch_size) == (
        True,
        "post",
        "causal",
        1,
    )
    assert (config.train.z_loss, config.optimizer.learning_rate) == (1e-5, 1e-4)
    said = Config.model_validate(
        values_of(model={"qk_norm": False}, train={"z_loss": 0.0}, optimizer={"learning_rate": 1e-3})
    )
    assert (said.model.qk_norm, said.train.z_loss, said.optimizer.learning_rate) == (False, 0.0, 1e-3)
    assert Config.model_validate(config.as_dict()) == config


def test_what_does_not_fit_the_family_is_refused_at_once() -> None:
    pixels = {"kind": "pixels", "folder": "", "latent_channels": 0, "downscale": 0, "codebook_size": 0}
    values = values_of(codec=pixels, model={"patch_size": 2, "image_attention": "bidirectional"})
    with pytest.raises(UserError, match="3 problems") as caught:
        check_as(Config, values, where="test")
    for words in (
        "patch_size must be 1",
        "image_attention must be causal",
        "codec.kind=pixels makes latents",
    ):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="learns latents"):
        check_as(Config, values_of(model={"family": "transfusion", "patch_size": 1}), where="test")


def test_a_loss_without_its_codec_is_a_mistake(build: Build, pack: Any) -> None:
    config, model = build()
    with pytest.raises(ValueError, match="needs the configuration's codec"):
        family_of(config).loss(config, None).terms(model, pairs(pack, config))


def test_operations_are_those_that_torch_counts(build: Build, pack: Any) -> None:
    """Image tokens pass the blocks and the head as the text's do, and no patch encoder."""
    config, model = build()
    batch = pairs(pack, config)

    def addmm_(_: Any, a: Any, b: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    loss = ChameleonLoss(config.codec, Squares())
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        terms = loss.terms(model, batch)
        loss.combine(terms, terms.counts).backward()
    assert FlopModel(config).of([batch]).hardware.products == counter.get_total_flops()


@torch.no_grad()
def test_norms_stand_where_they_are_asked_for(build: Build, pack: Any) -> None:
    for order in ("pre", "post"):
        config, model = build(model={"norm_placement": order})
        block, batch = model.blocks[0], pairs(pack, config)
        x_BSD = model.embedding(batch.token_ids_BS)
        turn = rotation(batch.position_BSA, config.model.head_width, config.model.rope_theta)
        rest = (*turn, batch.mask)
        if order == "pre":
            y_BSD = x_BSD + block.attention(block.attention_norm(x_BSD), *rest)
            wanted = y_BSD + block.feed_forward(block.feed_forward_norm(y_BSD))
        else:
            y_BSD = x_BSD + block.attention_norm(block.attention(x_BSD, *rest))
            wanted = y_BSD + block.feed_forward_norm(block.feed_forward(y_BSD))
        torch.testing.assert_close(block(x_BSD, *rest), wanted)


@pytest.mark.parametrize("family", ["transfusion", "chameleon"])
def test_the_z_loss_reaches_the_head_of_either_family(family: str) -> None:
    values = values_of(train={"z_loss": 0.5}, model={"family": family, "patch_size": 1})
    if family == "transfusion":
        values["codec"] = {"channels": 1, "image_size": 8}
    with torch.device("meta"):
        assert build_model(Config.model_validate(values)).lm_head.z_loss == 0.5
