"""How often and on how much the model is called, and what the unconditional branch is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.diffusion.sampler import guide
from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.inference import image_diffusion
from transfusion.inference.cache import PagedCache
from transfusion.model.patches import Encoding
from transfusion.schema import ImageSegment, TextSegment
from transfusion.sequence.layout import lay_out, position_axes


class Calls:
    """What the blocks were given: rows, positions [R, S, A] and the end of what each position sees."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        run_blocks = pipeline.runner.model.run_blocks

        def spying(hidden_BSD: Tensor, position_BSA: Tensor, mask: Any, *others: Any) -> Tensor:
            self.inputs.append((hidden_BSD.clone(), position_BSA.clone(), mask.end_key.clone()))
            return run_blocks(hidden_BSD, position_BSA, mask, *others)

        pipeline.runner.model.run_blocks = spying  # type: ignore[method-assign]

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        return [tuple(hidden.shape[:2]) for hidden, _, _ in self.inputs]


@pytest.mark.parametrize("prompt", ["one", "a much longer prompt " * 5])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_each_step_reads_the_image_blocks_and_nothing_else(
    build_pipeline: Callable[..., Pipeline], prompt: str, sampler: str
) -> None:
    """N9: the prefix is cached, and the work of a step does not depend on its length."""
    pipeline = build_pipeline()
    calls = Calls(pipeline)
    pipeline.sample([prompt], per_prompt=3, guidance=3.0, steps=7, sampler=sampler)
    prefix = len(pipeline.tokenizer.encode(prompt)) + 2
    # The prompt once, the unconditional prefix of each image, then both branches of three images seven times.
    assert calls.sizes == [(1, prefix), (3, 2), *[(6, 16)] * 7]


@pytest.mark.parametrize("position", ["1d", "2d"])
def test_the_unconditional_branch_is_a_dropped_caption_of_training(
    build_pipeline: Callable[..., Pipeline], position: str
) -> None:
    """N4: ids, positions and visibility of the unconditional branch are those of training."""
    pipeline = build_pipeline(position=position)
    calls = Calls(pipeline)
    pipeline.sample(["a handwritten three"], guidance=3.0, steps=2)
    trained = lay_out([ImageSegment(None, 16)], axes=position_axes(position))
    hidden_BSD, position_BSA, end_BS = calls.inputs[1]
    expected_BSD = pipeline.runner.model.embedding(torch.from_numpy(trained.token_ids_S[:2]))[None]
    assert torch.equal(hidden_BSD, expected_BSD)
    assert torch.equal(position_BSA[0], torch.from_numpy(trained.position_SA[:2]))
    assert end_BS[0].tolist() == trained.end_key_S[:2].tolist()
    for _, position_BSA, end_BS in calls.inputs[2:]:
        assert torch.equal(position_BSA[1], torch.from_numpy(trained.position_SA[2:18]))
        assert end_BS[1].tolist() == trained.end_key_S[2:18].tolist()


@pytest.mark.parametrize("position", ["1d", "2d"])
def test_prompt_and_image_are_laid_out_as_in_training(
    build_pipeline: Callable[..., Pipeline], position: str
) -> None:
    pipeline = build_pipeline(position=position)
    calls = Calls(pipeline)
    pipeline.sample(["a handwritten three"], guidance=1.0, steps=1)
    ids = pipeline.tokenizer.encode("a handwritten three")
    trained = lay_out([TextSegment(tuple(ids)), ImageSegment(None, 16)], axes=position_axes(position))
    first = trained.images[0][0]
    for (_, position_BSA, end_BS), part in zip(
        calls.inputs, (slice(0, first), slice(first, first + 16)), strict=True
    ):
        assert torch.equal(position_BSA[0], torch.from_numpy(trained.position_SA[part]))
        assert end_BS[0].tolist() == trained.end_key_S[part].tolist()


def test_a_finished_image_is_read_once_more_with_its_end(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline(image=50.0)
    calls = Calls(pipeline)
    pipeline.generate([["one"], ["seven"]], max_tokens=3, max_images=1, guidance=1.0, steps=4)
    # Prompt, <BOI>, four steps, the clean image with <EOI>, two tokens (the third need not be read).
    assert calls.sizes[1:] == [(2, 1), *[(2, 16)] * 4, (2, 17), (2, 1), (2, 1)]


def test_the_cache_is_written_in_place(build_pipeline: Callable[..., Pipeline], make_image: Any) -> None:
    pipeline = build_pipeline()
    seen: set[int] = set()
    storage = PagedCache.storage

    def spying(self: PagedCache, like: Tensor) -> Tensor:
        kept = storage(self, like)
        seen.add(kept.data_ptr())
        return kept

    PagedCache.storage = spying  # type: ignore[method-assign]
    try:
        pipeline.caption(torch.from_numpy(make_image(0))[None], max_tokens=10)
    finally:
        PagedCache.storage = storage  # type: ignore[method-assign]
    assert len(seen) == 1


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, 16)])
def test_every_drawn_image_has_the_configured_size(
    build_pipeline: Callable[..., Pipeline], channels: int, size: int
) -> None:
    """N5: a model of this version draws one size, that of its configuration, whatever a prompt asks for."""
    pipeline = build_pipeline(channels=channels, image_size=size, image=50.0)
    assert pipeline.config.codec.image_size == size
    calls = Calls(pipeline)
    drawn = [image.pixels for image in pipeline.sample(["one", "16,16", "4 by 4"], steps=2)]
    patches = (size // 2) ** 2
    assert calls.sizes[-2:] == [(6, patches)] * 2
    answers = pipeline.generate([["one"], ["16,16"]], max_tokens=2, max_images=2, steps=2)
    said = [part for answer in answers for part in answer if isinstance(part, Tensor)]
    assert len(said) == 4
    assert {tuple(image.shape) for image in drawn + said} == {(channels, size, size)}
    with pytest.raises(UserError, match="an image must be uint8"):
        pipeline.generate([[torch.zeros(channels, 2 * size, size, dtype=torch.uint8)]])


def test_bf16_generates(
    build_pipeline: Callable[..., Pipeline], make_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network in bf16, as trained with train.precision=bf16: images and captions, the same each time."""
    plain, pipeline = build_pipeline(end=1.0), build_pipeline(end=1.0)
    pipeline.runner.model.bfloat16()
    predicted: list[Tensor] = []
    guided: list[Tensor] = []
    decode = pipeline.runner.model.decode_patches

    def decoding(state_ND: Tensor, encoding: Encoding) -> Tensor:
        predicted.append(decode(state_ND, encoding))
        return predicted[-1]

    def guiding(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        guided.append(guide(conditional, unconditional, scale))
        return guided[-1]

    prompts, settings = ["a handwritten three", "seven"], {"steps": 6, "guidance": 3.0, "seed": 2}
    exact = plain.sample(prompts, **settings)
    monkeypatch.setattr(pipeline.runner.model, "decode_patches", decoding)
    monkeypatch.setattr(image_diffusion, "guide", guiding)
    drawn, again = (pipeline.sample(prompts, **settings) for _ in range(2))
    # The network rounds; what is made of its answers does not.
    assert {noise.dtype for noise in predicted} == {torch.bfloat16}
    assert {noise.dtype for noise in guided} == {torch.float32}
    assert all(noise.isfinite().all() for noise in predicted + guided)
    for one, other, reference in zip(drawn, again, exact, strict=True):
        assert one.pixels.shape == (1, 8, 8) and one.pixels.dtype == torch.uint8
        assert torch.equal(one.pixels, other.pixels)
        assert (one.pixels.float() - reference.pixels.float()).abs().mean() < 20
    images = torch.stack([torch.from_numpy(make_image(seed)) for seed in range(3)])
    for temperature in (0.0, 1.0):
        captions, repeated = (
            pipeline.caption(images, max_tokens=12, temperature=temperature) for _ in range(2)
        )
        assert captions == repeated and len(captions) == 3 and any(captions)


@pytest.mark.parametrize("guidance", [-0.5, float("nan"), float("inf")])
def test_impossible_guidance_is_an_error(build_pipeline: Callable[..., Pipeline], guidance: float) -> None:
    pipeline = build_pipeline()
    with pytest.raises(UserError, match="guidance"):
        pipeline.sample(["one"], guidance=guidance)
    with pytest.raises(UserError, match="guidance"):
        pipeline.generate([["one"]], guidance=guidance)


def test_guidance_of_an_empty_prompt_is_an_error(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline()
    with pytest.raises(UserError, match="empty prompt"):
        pipeline.sample(["one", ""], guidance=3.0)
    assert len(pipeline.sample([""], guidance=1.0, steps=1)) == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"sampler": "euler"}, "sampler"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 60}, "seed"),
    ],
)
def test_settings_out_of_range_are_named(
    build_pipeline: Callable[..., Pipeline], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        build_pipeline().generate([["one"]], **settings)


@pytest.mark.parametrize("shape", [(1, 8, 9), (3, 8, 8), (8, 8)])
def test_images_of_another_shape_are_refused(
    build_pipeline: Callable[..., Pipeline], shape: Sequence[int]
) -> None:
    with pytest.raises(UserError, match="an image must be uint8"):
        build_pipeline().generate([[torch.zeros(*shape, dtype=torch.uint8)]])
    with pytest.raises(UserError, match="an image must be uint8"):
        build_pipeline().caption(torch.zeros(1, 1, 8, 8))


def test_prompts_that_are_no_text_are_refused(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline()
    with pytest.raises(UserError, match="not Unicode"):
        pipeline.sample(["a \udcff"], steps=1)
    with pytest.raises(UserError, match="not Unicode"):
        pipeline.generate([["a \udcff"]])


def test_rows_end_where_training_rows_did(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline(sequence_length=24)
    answer = pipeline.generate([["one"]], max_tokens=1000, max_images=0)[0]
    assert len(pipeline.tokenizer.encode("one")) + 1 + len(answer[1]) == 24
    drawing = build_pipeline(sequence_length=24, image=50.0)
    answer = drawing.generate([["o"]], max_tokens=1000, max_images=4, steps=1)[0]
    assert sum(isinstance(part, Tensor) for part in answer) == 1
    with pytest.raises(UserError, match="sequence_length"):
        pipeline.generate([["one " * 30]])
    with pytest.raises(UserError, match="sequence_length"):
        pipeline.sample(["one one one one one one one"], steps=1)
