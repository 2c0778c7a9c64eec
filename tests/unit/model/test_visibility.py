"""Who sees whom, and where patches stand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.codec import pixels as codec
from transfusion.config import Config
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import Transfusion
from transfusion.model.patches import patchify, unpatchify, unpatchify_groups
from transfusion.schema import Batch, ImageSegment, LossTerms, Segment, TextSegment
from transfusion_kernels.verification.testing import relative_error

Build = Callable[..., tuple[Config, Transfusion]]
Pack = Callable[..., Batch]

KINDS = [{}, {"position": "2d"}, {"timestep_embedding": "patch", "qk_norm": True}]


@torch.no_grad()
def states(model: Transfusion, batch: Batch) -> Tensor:
    """Final states [B, S, D] of a batch whose images are read as they are."""
    dtype = model.lm_head.weight.dtype
    latents = [codec.encode(group.values).to(dtype) for group in batch.media]
    timestep_I = torch.cat([group.timestep_I for group in batch.media])
    hidden_BSD = model.embed(batch, model.encode_patches(latents, timestep_I).patch_ND)
    hidden_BSD = model.run_blocks(hidden_BSD, batch.position_BSA, batch.mask)
    return model.norm(hidden_BSD)


@pytest.mark.parametrize("fields", KINDS)
@torch.no_grad()
def test_patches_know_their_place(
    build_model: Build, pack: Pack, make_image: Any, fields: dict[str, Any]
) -> None:
    """N2: shuffled patches are not predicted as the same patches in their places."""
    config, model = build_model(**fields)
    batch = pack(config, [[[TextSegment((9, 10)), ImageSegment(make_image(0), 16)]]])
    latent = codec.encode(batch.media[0].values)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = unpatchify(patchify(latent, 2)[:, order], 1, 8, 8, 2)
    (prediction,), (of_shuffled,) = (
        unpatchify_groups(model(batch, [noisy]).prediction_NE, [noisy]) for noisy in (latent, shuffled)
    )
    put_back = unpatchify(patchify(of_shuffled, 2)[:, order.argsort()], 1, 8, 8, 2)
    assert (prediction - put_back).abs().max() > 0.01 * prediction.abs().max()


def test_images_never_see_what_comes_later(build_model: Build, pack: Pack, make_image: Any) -> None:
    """N7: neither later text nor a later image reaches an image."""
    config, model = build_model()

    def document(later_text: Sequence[int], later_image: int) -> list[Segment]:
        return [
            TextSegment((9, 10, 11)),
            ImageSegment(make_image(0), 16),
            TextSegment(tuple(later_text)),
            ImageSegment(make_image(later_image), 16),
        ]

    plain = states(model, pack(config, [[document((20, 21), 1)]]))[0]
    other_text = states(model, pack(config, [[document((20, 99), 1)]]))[0]
    other_image = states(model, pack(config, [[document((20, 21), 2)]]))[0]
    # <BOS> 3 tokens <BOI> 16 patches <EOI> 2 tokens <BOI> 16 patches <EOI> <EOS>
    first, text, second = slice(5, 21), slice(22, 24), slice(25, 41)
    for changed, unseen in ((other_text, 23), (other_image, 25)):
        torch.testing.assert_close(changed[:unseen], plain[:unseen], rtol=0, atol=1e-6)
        assert ((changed[second] - plain[second]).abs().amax(1) > 1e-4).all()
    assert torch.equal(plain[first], other_image[first])
    assert text.stop == second.start - 1


def test_every_patch_sees_every_patch_of_its_image(build_model: Build, pack: Pack, make_image: Any) -> None:
    config, model = build_model(layers=1)
    values = make_image(0)
    changed = values.copy()
    changed[0, 7, 7] ^= 128
    plain, other = (
        states(model, pack(config, [[[TextSegment((9,)), ImageSegment(v, 16), TextSegment((8,))]]]))[0]
        for v in (values, changed)
    )
    difference_S = (plain - other).abs().amax(1)
    # <BOS> token <BOI> before, patches and all that follows after.
    assert (difference_S[:3] == 0).all() and (difference_S[3:22] > 1e-6).all()


@pytest.mark.parametrize("fields", KINDS)
@torch.no_grad()
def test_packed_documents_are_read_as_each_alone(
    build_model: Build, pack: Pack, make_image: Any, fields: dict[str, Any]
) -> None:
    """A12: final states and logits of packed documents; their losses below. In float64: fp32 rounds by library and
    processor."""
    config, model = build_model(**fields)
    model.double()
    image = [ImageSegment(make_image(seed), 16) for seed in range(4)]
    documents: list[list[Segment]] = [
        [TextSegment(tuple(range(20, 31)))],
        [TextSegment((12, 13)), image[0]],
        [image[1]],
        [image[2], TextSegment((14,)), image[3], TextSegment(tuple(range(30, 70)))],
    ]
    packed = pack(config, [documents[:2], documents[2:]], timesteps=[5, 50, 500, 950])
    packed_states = states(model, packed)
    given = iter([[5], [50], [500, 950]])
    for row, part in enumerate((documents[:2], documents[2:])):
        start = 0
        for document in part:
            has_images = any(isinstance(segment, ImageSegment) for segment in document)
            batch = pack(config, [[document]], timesteps=next(given) if has_images else None)
            alone = states(model, batch)[0, : batch.counts.tokens]
            here = packed_states[row, start : start + batch.counts.tokens]
            # As a whole: single elements differ by the rounding of products of other shapes, by processor.
            assert relative_error(here, alone) < 1e-6
            assert relative_error(model.lm_head(here), model.lm_head(alone)) < 1e-6
            start += batch.counts.tokens
    assert packed_states[:, -1].isfinite().all()


@pytest.mark.parametrize("fields", KINDS)
@torch.no_grad()
def test_packed_documents_lose_what_they_lose_alone(
    build_model: Build, pack: Pack, make_image: Any, fields: dict[str, Any]
) -> None:
    """A12: the losses of packed rows are the sums of those of the documents, each in a row of its own."""
    config, model = build_model(**fields)
    image = [ImageSegment(make_image(seed), 16) for seed in range(4)]
    documents: list[tuple[list[Segment], list[int], list[int]]] = [
        ([TextSegment(tuple(range(20, 31)))], [], []),
        ([TextSegment((12, 13)), image[0]], [5], [70]),
        ([image[1]], [50], [71]),
        ([image[2], TextSegment((14,)), image[3], TextSegment(tuple(range(30, 70)))], [500, 950], [72, 73]),
    ]
    loss = TransfusionLoss(config.diffusion)
    contents = [document for document, _, _ in documents]
    packed = pack(
        config,
        [contents[:3], contents[3:]],
        timesteps=[timestep for _, timesteps, _ in documents for timestep in timesteps],
        keys=[key for _, _, keys in documents for key in keys],
    )
    together = loss.terms(model, packed)
    alone = [
        loss.terms(model, pack(config, [[document]], timesteps=timesteps, keys=keys))
        for document, timesteps, keys in documents
    ]
    expected = functools.reduce(LossTerms.plus, (terms.double() for terms in alone))
    for found, wanted in (
        (together.double().sums, expected.sums),
        (together.double().counts, expected.counts),
    ):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=2e-6, atol=0)
    # Text of three documents (11 + 1, 2 + 1 and <EOS>, <BOI> twice and 1 + 40 and <EOS>), four images.
    assert together.counts["text"] == 12 + 4 + 44 and together.counts["image"] == 4 * 64


def test_two_axes_leave_text_as_it_is(build_model: Build, pack: Pack, make_image: Any) -> None:
    (plain_config, plain), (config, model) = build_model(), build_model(position="2d")
    model.load_state_dict(plain.state_dict())
    text = TextSegment(tuple(range(20, 50)))
    assert torch.equal(states(model, pack(config, [[[text]]])), states(plain, pack(plain_config, [[[text]]])))
    document = [TextSegment((9, 10)), ImageSegment(make_image(0), 16)]
    difference = states(model, pack(config, [[document]])) - states(plain, pack(plain_config, [[document]]))
    # <BOS> 2 tokens <BOI> as before, patches elsewhere.
    assert difference[0, :4].abs().max() == 0 and difference[0, 4:20].abs().max() > 1e-3
