"""Drawing token by token with caches equals reading the whole document again for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.generate import Pipeline
from transfusion.inference.image_tokens import choose_token
from transfusion.model import Chameleon
from transfusion.model.patches import Grid
from transfusion.schema import ImageSegment, Segment, SpecialToken, TextSegment
from transfusion.sequence.layout import image_segment, lay_out
from transfusion.sequence.sizes import Size

from .conftest import TOKENS, Squares, flat_image

Build = Callable[..., tuple[Config, Chameleon]]


class Truth:
    """One row, no cache, no batch: everything read again for each token."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.model, self.config = pipeline.runner.model, pipeline.config

    @torch.no_grad()
    def states(self, segments: Sequence[Segment], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Final states [S, D]; the images' tokens may be fewer than an image has: the rest is not looked at."""
        axes = 3 if self.config.model.position == "2d" else 1
        layout = lay_out(segments, axes=axes, finished=False, causal_images=True)
        ids = torch.from_numpy(layout.token_ids_S)
        for (first, _), of_image in zip(layout.images, tokens, strict=True):
            for place, token in enumerate(of_image):
                ids[first + place] = self.config.model.vocabulary + token
        from transfusion_kernels import IntervalMask

        mask = IntervalMask(
            torch.zeros(1, len(ids), dtype=torch.int32),
            torch.arange(1, len(ids) + 1, dtype=torch.int32)[None],
        )
        position = torch.from_numpy(layout.position_SA)[None]
        hidden_SD = self.model.embedding(ids)
        images = [segment for segment in segments if isinstance(segment, ImageSegment)]
        for (first, patches), image in zip(layout.images, images, strict=True):
            of_image, columns = slice(first, first + patches), image.columns or 4
            grid = Grid(1, patches // columns, columns)
            hidden_SD[of_image] = self.model.at_their_places(hidden_SD[of_image], [grid])
        return self.model.norm(self.model.run_blocks(hidden_SD[None], position, mask)[0])

    def draw(
        self,
        segments: Sequence[Segment],
        tokens: Sequence[Sequence[int]],
        key: int,
        guidance: float,
        image: ImageSegment = ImageSegment(None, TOKENS),  # noqa: B008
    ) -> list[int]:
        """Tokens of an image behind the segments."""
        drawn: list[int] = []
        prefix = 2 + sum(len(s.token_ids) if isinstance(s, TextSegment) else TOKENS + 2 for s in segments)
        for place in range(image.patches):
            logit = self._logits([*segments, image], [*tokens, drawn], prefix - 1 + place)
            if guidance != 1:
                bare = self._logits([image], [drawn], 1 + place)
                logit = bare + guidance * (logit - bare)
            drawn.append(int(choose_token(logit[None], torch.tensor([key]), place)))
        return drawn

    def _logits(self, segments: Sequence[Segment], tokens: Sequence[Sequence[int]], place: int) -> Tensor:
        state = self.states(segments, tokens)[place : place + 1]
        return self.model.lm_head(state)[0, self.config.model.vocabulary :].detach()


def pixels_of(tokens: list[int]) -> Tensor:
    return Squares().decode(torch.tensor(tokens).view(1, 4, 4))[0]


@pytest.mark.parametrize(("guidance", "position"), [(1.0, "1d"), (3.0, "2d")])
def test_captioned_images(build: Build, tokenizer: Any, guidance: float, position: str) -> None:
    config, model = build(model={"position": position})
    pipeline = Pipeline(model, tokenizer, config, "cpu", Squares())
    prompts = ["a handwritten three", "seven"]
    drawn = pipeline.sample(prompts, guidance=guidance, seed=3)
    for number, sample in enumerate(drawn):
        segment = TextSegment(tuple(tokenizer.encode(sample.prompt)))
        expected = Truth(pipeline).draw([segment], [], 3 + number, guidance)
        assert torch.equal(sample.pixels, pixels_of(expected))
    assert not torch.equal(drawn[0].pixels, drawn[1].pixels)


def test_a_wide_image(build: Build, tokenizer: Any) -> None:
    """Of the second of two sizes, so that rows and columns are not as many."""
    config, model = build(
        model={"patch_position": "learned", "vocabulary": 321}, codec={"image_sizes": ["8x8", "4x12"]}
    )
    pipeline = Pipeline(model, tokenizer, config, "cpu", Squares())
    wide = image_segment(config.media_sizes, Size(4, 12))
    (drawn,) = pipeline.sample(["a handwritten three"], guidance=3.0, seed=3, size=Size(4, 12))
    segment = TextSegment(tuple(tokenizer.encode(drawn.prompt)))
    expected = Truth(pipeline).draw([segment], [], 3, 3.0, wide)
    assert torch.equal(drawn.pixels, Squares().decode(torch.tensor(expected).view(1, 2, 6))[0])


def test_images_behind_images_and_text_behind_them(build: Build, tokenizer: Any) -> None:
    """A prompt with an image, then a drawn one, then greedy text: every token as without a cache."""
    config, model = build()
    pipeline = Pipeline(model, tokenizer, config, "cpu", Squares())
    head = model.lm_head
    original = head.weight.detach().clone()
    given = flat_image(7)
    known = Squares().encode(given[None]).flatten().tolist()
    prompt_ids = tuple(tokenizer.encode("one"))
    answer = None
    # A head that begins an image after the prompt: <BOI> has the prompt's own state as its row.
    state = Truth(pipeline).states([TextSegment(prompt_ids), ImageSegment(None, TOKENS)], [known])[-1]
    with torch.no_grad():
        head.weight[SpecialToken.BEGIN_IMAGE] = 10 * state / state.norm()
    answer = pipeline.generate([["one", given]], max_tokens=5, max_images=1, guidance=3.0, seed=11)[0]
    assert isinstance(answer[2], Tensor)
    segments: list[Segment] = [TextSegment(prompt_ids), ImageSegment(None, TOKENS)]
    tokens = Truth(pipeline).draw(segments, [known], 11, 3.0)
    assert torch.equal(answer[2], pixels_of(tokens))
    segments.append(ImageSegment(None, TOKENS))
    ids: list[int] = []
    for _ in range(5):
        after = [TextSegment(tuple(ids))] if ids else []
        logit = head(Truth(pipeline).states([*segments, *after], [known, tokens])[-1:])[0].detach()
        allowed = [int(SpecialToken.END_DOCUMENT), *range(len(SpecialToken), tokenizer.vocabulary)]
        ids.append(max(allowed, key=lambda token: float(logit[token])))
        if ids[-1] == SpecialToken.END_DOCUMENT:
            ids.pop()
            break
    assert "".join(part for part in answer[3:] if isinstance(part, str)) == tokenizer.decode(ids)
    assert not torch.equal(original, head.weight)


def test_draws_follow_the_softmax_and_the_key_alone() -> None:
    logit = torch.tensor([0.0, 1.0, -1.0, 2.0])
    key_I = torch.arange(20_000)
    drawn = choose_token(logit.expand(len(key_I), -1), key_I, 3)
    shares = torch.bincount(drawn, minlength=4) / len(key_I)
    torch.testing.assert_close(shares, logit.softmax(-1), rtol=0, atol=0.01)
    assert torch.equal(drawn[5:9], choose_token(logit.expand(4, -1), key_I[5:9], 3))
    assert not torch.equal(drawn, choose_token(logit.expand(len(key_I), -1), key_I, 4))


def test_a_stream_with_previews_asked_for(build: Build, tokenizer: Any) -> None:
    """Token by token there is nothing to preview."""
    config, model = build()
    pipeline = Pipeline(model, tokenizer, config, "cpu", Squares())
    pipeline.runner.model.lm_head.weight.data[SpecialToken.BEGIN_IMAGE] *= 0
    settings = {"max_tokens": 3, "max_images": 1, "seed": 2, "guidance": 3.0}
    events = list(pipeline.stream("one", preview_every=1, **settings))
    assert events == list(pipeline.stream("one", **settings))


def test_scores_of_images_are_exact(build: Build, tokenizer: Any) -> None:
    """Behind a text and an image, as if all were read at once. Nothing is drawn, so nothing errs."""
    config, model = build(data={"sequence_length": 128})
    pipeline = Pipeline(model, tokenizer, config, "cpu", codec=Squares())  # type: ignore[arg-type]
    before, image = flat_image(1), flat_image(2)
    (score,) = pipeline.score([["one", before]], [image])
    tokens = [Squares().encode(pixels[None])[0].flatten().tolist() for pixels in (before, image)]
    segments: list[Segment] = [
        TextSegment(tuple(tokenizer.encode("one"))),
        ImageSegment(None, TOKENS),
        ImageSegment(None, TOKENS),
    ]
    state_SD = Truth(pipeline).states(segments, tokens)
    first = len(state_SD) - TOKENS - 1
    with torch.no_grad():
        logit_PK = model.lm_head(state_SD[first - 1 : first - 1 + TOKENS])[:, config.model.vocabulary :]
    nats_P = logit_PK.double().log_softmax(-1)[torch.arange(TOKENS), torch.tensor(tokens[1])]
    assert score.log_likelihood == pytest.approx(nats_P.sum().item(), rel=1e-5)
    assert (score.standard_error, score.count) == (0, TOKENS)
