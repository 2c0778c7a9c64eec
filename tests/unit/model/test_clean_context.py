"""Noised copies beside clean images: who sees whom, what is learned, and that it is what generation does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transfusion.codec.pixels import PixelCodec
from transfusion.config import Config
from transfusion.config.objectives import PredictionName
from transfusion.diffusion.objective import ImageObjective
from transfusion.losses.loss import target_counts
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import Transfusion
from transfusion.model.attention import Mask
from transfusion.model.patches import unpatchify_groups
from transfusion.schema import Batch, ImageSegment, Modality, Segment, TextSegment
from transfusion.sequence.layout import lay_out_all, tokenize_document, with_twins

Build = Callable[..., tuple[Config, Transfusion]]
Documents = list[list[list[Segment]]]
NETWORKS: dict[str, dict[str, Any]] = {
    "1d": {},
    "2d": {"position": "2d"},
    "causal images": {"image_attention": "causal"},
    "own weights": {"modality_weights": "all", "qk_norm": True},
    "several sizes": {"image_sizes": ("8x8", "8x16")},
}


def clean(config: Config, prediction: PredictionName = "epsilon") -> Config:
    return Config.model_validate(
        config.as_dict() | {"diffusion": {"context": "clean", "prediction": prediction}}
    )


@pytest.fixture
def documents(make_image: Any) -> Documents:
    """An image before its caption, one behind it, one alone, and a document of which two of three are followed."""
    image = [ImageSegment(make_image(seed), 16) for seed in range(6)]
    text = [TextSegment(tuple(range(10 * n, 10 * n + 5))) for n in range(1, 5)]
    return [
        [[image[0], text[0]], [text[1], image[1]], [text[2]]],
        [[text[0], image[2], image[3], text[3], image[4]], [image[5]]],
    ]


def several_sizes(rows: Documents) -> Documents:
    """The same with every other image twice as wide."""
    wide = iter(range(100))

    def change(segment: Segment) -> Segment:
        if isinstance(segment, TextSegment) or next(wide) % 2:
            return segment
        values = np.concatenate([segment.values_CHW, segment.values_CHW], -1)  # type: ignore[list-item]
        return ImageSegment(values, 32, 8, 320)

    return [[[change(segment) for segment in document] for document in row] for row in rows]


class Dense:
    """Attention by a mask written out, made from the documents alone."""

    def __init__(self, rows: Documents, length: int, causal: bool) -> None:
        self.seen = torch.zeros(len(rows), length, length, dtype=torch.bool)
        for row, documents in enumerate(rows):
            start = 0
            for document in documents:
                start = self._document(self.seen[row], start, document, causal)

    @staticmethod
    def _document(seen: Tensor, start: int, document: Sequence[Segment], causal: bool) -> int:
        places, end = [], start + 1
        for segment in document:
            size = len(segment.token_ids) if isinstance(segment, TextSegment) else segment.patches + 2
            if isinstance(segment, ImageSegment):
                places.append((end + 1, segment.patches))
            end += size
        end += 1
        for position in range(start, end):
            seen[position, start : position + 1] = True
        followed = [place for place in places if sum(place) + 2 < end]
        blocks = list(places)
        for first, patches in followed:
            blocks.append((end, patches))
            seen[end : end + patches, start:first] = True
            end += patches
        for first, patches in blocks:
            inside = torch.ones(patches, patches, dtype=torch.bool)
            seen[first : first + patches, first : first + patches] = inside.tril() if causal else inside
        return end

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        score = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        score = score.masked_fill(~self.seen[:, None], -torch.inf)
        # Padding sees nothing.
        return score.softmax(-1).nan_to_num(0.0) @ value


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients_are_those_of_a_dense_mask(
    build_model: Build, pack: Callable[..., Batch], documents: Documents, name: str
) -> None:
    config, model = build_model(**NETWORKS[name])
    config = clean(config)
    documents = several_sizes(documents) if name == "several sizes" else documents
    batch = pack(config, documents, timesteps=[900, 300, 700, 50, 999, 400])
    assert batch.second is not None and batch.counts.images == 6
    dense = Dense(documents, config.data.sequence_length, causal=name == "causal images")
    loss, found = TransfusionLoss(config.diffusion), []
    plain = [block.attention.attend for block in model.blocks]
    for attends in (plain, [dense] * len(plain)):
        for block, attend in zip(model.blocks, attends, strict=True):
            block.attention.attend = attend
        terms = loss.terms(model, batch)
        total = loss.combine(terms, terms.counts)
        gradients = torch.autograd.grad(total, list(model.parameters()))
        found.append((terms.sums["text"], terms.sums["image"], gradients))
    (text, image, gradients), (dense_text, dense_image, dense_gradients) = found
    torch.testing.assert_close(text, dense_text, rtol=1e-6, atol=0)
    torch.testing.assert_close(image, dense_image, rtol=1e-6, atol=0)
    errors = torch.stack(
        [(one - other).norm() for one, other in zip(gradients, dense_gradients, strict=True)]
    )
    sizes = torch.stack([other.norm() for other in dense_gradients])
    assert errors.norm() < 1e-6 * sizes.norm() and (errors < 1e-5 * sizes + 1e-9).all()


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "x"])
def test_a_copy_is_predicted_as_the_image_that_is_drawn_next(
    build_model: Build, pack: Callable[..., Batch], make_image: Any, prediction: PredictionName
) -> None:
    """Behind the clean images before it, as in generation; and text is predicted behind clean images."""
    config, model = build_model()
    noisy_config, config = config, clean(config, prediction)
    images = [ImageSegment(make_image(seed), 16) for seed in range(2)]
    text = [TextSegment((10, 11, 12)), TextSegment((20, 21))]
    timesteps, objective = [600, 300], ImageObjective(config.diffusion)
    batch = pack(config, [[[text[0], images[0], text[1], images[1], text[0]]]], timesteps=timesteps)
    (group,) = batch.media
    assert group.is_context_I is not None and group.is_context_I.tolist() == [True, False] * 2
    assert len(group.values) == 2
    latents = PixelCodec().encode(torch.from_numpy(np.stack([image.values_CHW for image in images])))
    noised = objective.corrupt(latents, torch.tensor(timesteps), torch.arange(2))
    shown = torch.stack([latents[0], noised.noisy[0], latents[1], noised.noisy[1]])
    output = model(batch, [shown])
    (found,) = unpatchify_groups(output.prediction_NE, [shown])

    def drawn(segments: Sequence[Segment], given: list[Tensor], at: list[int]) -> tuple[Tensor, Tensor]:
        """By the plain network, which takes the images as they are given."""
        plain = pack(noisy_config, [[segments]], timesteps=at)
        output = model(plain, [torch.stack(given)])
        (predicted,) = unpatchify_groups(output.prediction_NE, [torch.stack(given)])
        return predicted[-1], output.text_sum

    first, _ = drawn([text[0], images[0]], [noised.noisy[0]], timesteps[:1])
    second, _ = drawn(
        [text[0], images[0], text[1], images[1]], [latents[0], noised.noisy[1]], [0, timesteps[1]]
    )
    torch.testing.assert_close(found[1], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[3], second, rtol=1e-5, atol=1e-5)
    _, nats = drawn([text[0], images[0], text[1], images[1], text[0]], list(latents), [0, 0])
    torch.testing.assert_close(output.text_sum, nats, rtol=1e-5, atol=1e-5)


def test_only_noised_images_are_learned(
    build_model: Build, pack: Callable[..., Batch], documents: Documents
) -> None:
    config, model = build_model()
    config = clean(config)
    batch = pack(config, documents)
    loss = TransfusionLoss(config.diffusion)
    terms = loss.terms(model, batch)
    assert terms.counts["image"] == 6 * 64 == target_counts(batch, config.codec)["image"]
    assert batch.counts.image_elements == 6 * 64
    # Three of six are followed, and stand there twice.
    assert batch.patches == int((batch.modality_BS == Modality.IMAGE).sum()) == 9 * 16


def test_an_image_that_nothing_follows_costs_nothing_more(
    build_model: Build, pack: Callable[..., Batch], make_image: Any
) -> None:
    noisy_config, _ = build_model()
    rows = [[[TextSegment((10, 11)), ImageSegment(make_image(0), 16)], [TextSegment((12,))]]]
    one, other = pack(noisy_config, rows), pack(clean(noisy_config), rows)
    assert other.second is None and one.counts == other.counts
    assert torch.equal(one.token_ids_BS, other.token_ids_BS)
    assert torch.equal(one.mask.end_key, other.mask.end_key)
    assert other.media[0].is_context_I is None and other.media[0].value_I is None


def test_copies_stand_behind_their_document_at_the_places_of_their_images() -> None:
    image, text = ImageSegment(None, 4), TextSegment((10, 11))
    plain = tokenize_document([image, text, image, text, image])
    document = with_twins(plain)
    length = len(plain.token_ids_S)
    assert document.twins == ((length, 0), (length + 4, 1))
    layout = lay_out_all([tokenize_document([text]), document], axes=3)
    before = len(tokenize_document([text]).token_ids_S)
    for twin, (first, patches) in zip(layout.twins, layout.images, strict=False):
        assert (twin.patches, twin.first_key, twin.end_key) == (patches, before, first)
        of_twin, of_image = (slice(at, at + patches) for at in (twin.first, first))
        assert np.array_equal(layout.position_SA[of_twin], layout.position_SA[of_image])
        assert set(layout.first_key_S[of_twin]) == {twin.first}
        assert set(layout.end_key_S[of_twin]) == {twin.first + patches}
        assert not layout.text_weight_S[of_twin].any()
    for bound in (layout.first_key_S, layout.end_key_S):
        assert (np.diff(bound) >= 0).all()
