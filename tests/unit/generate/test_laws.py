"""The eight laws of interleaved inference, each through the pipeline or the engine, in fp32.

P patches an image, E values a patch, C channels, H/W image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from transfusion.codec import pixels as codec
from transfusion.errors import UserError
from transfusion.generate import (
    Engine,
    Event,
    ImageDone,
    ImagePreview,
    ImageSampling,
    Pipeline,
    Request,
    TextDelta,
)
from transfusion.generate.image_files import save_samples
from transfusion.model.patches import Encoding, unpatchify
from transfusion.schema import ImageSegment, Segment, TextSegment
from transfusion.sequence.layout import lay_out

Build = Callable[..., Pipeline]
PATCHES = 16
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# Of a finished image: each step adds its rounding to that of the steps before, three times under guidance 3.
LATENT_TOLERANCE: dict[str, Any] = {"rtol": 5e-5, "atol": 5e-5}


class Step(NamedTuple):
    """A call of the model that draws.

    Attributes:
        latent_ICHW: What it was asked about.
        timesteps: Of each image.
        answer_RCHW: What it predicted: for all images, and behind them for those under guidance without a caption.
    """

    latent_ICHW: Tensor
    timesteps: list[float]
    answer_RCHW: Tensor


class Watch:
    """What the network of a pipeline is asked.

    Attributes:
        rows: Of each call of the blocks, rows and positions.
        steps: The calls that draw.
        states: Final states that a token was chosen from, in their order.
        latents: The results of all images by their keys.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.rows: list[tuple[int, int]] = []
        self.steps: list[Step] = []
        self.states: list[Tensor] = []
        self._drawings: list[Any] = []
        runner: Any = pipeline.runner
        model = runner.model
        self._encode, self._decode, self._blocks = (
            model.encode_patches,
            model.decode_patches,
            model.run_blocks,
        )
        self._logits, self._begin = runner.logits, pipeline.family.drawing
        self._size: int = model.config.patch_size
        model.encode_patches, model.decode_patches = self._encoding, self._decoding
        model.run_blocks, runner.logits = self._running, self._choosing
        pipeline.family = replace(pipeline.family, drawing=self._drawing)

    @property
    def latents(self) -> dict[int, Tensor]:
        return {drawing.sampling.seed: drawing.result for drawing in self._drawings}

    def clear(self) -> None:
        for seen in (self.rows, self.steps, self.states, self._drawings):
            seen.clear()

    def _encoding(self, noisy: Sequence[Tensor], timestep_I: Tensor, *modality: str) -> Encoding:
        self._asked = noisy[0], timestep_I
        encoding: Encoding = self._encode(noisy, timestep_I, *modality)
        return encoding

    def _decoding(self, state_ND: Tensor, encoding: Encoding) -> Tensor:
        predicted_NE: Tensor = self._decode(state_ND, encoding)
        latent_ICHW, timestep_I = self._asked
        channels, height, width = latent_ICHW.shape[1:]
        answer_RCHW = unpatchify(predicted_NE, channels, height, width, self._size)
        self.steps.append(Step(latent_ICHW, timestep_I.tolist(), answer_RCHW))
        return predicted_NE

    def _running(self, hidden_BSD: Tensor, *others: Any, **named: Any) -> Tensor:
        self.rows.append((hidden_BSD.shape[0], hidden_BSD.shape[1]))
        hidden_BSD = self._blocks(hidden_BSD, *others, **named)
        return hidden_BSD

    def _choosing(self, state_RD: Tensor) -> Tensor:
        self.states.append(state_RD.clone())
        logit_RV: Tensor = self._logits(state_RD)
        return logit_RV

    def _drawing(self, *arguments: Any) -> Any:
        self._drawings.append(self._begin(*arguments))
        return self._drawings[-1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The network is so small that more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text_of(pipeline: Pipeline, text: str) -> TextSegment:
    return TextSegment(tuple(pipeline.tokenizer.encode(text)))


def images_of(parts: Sequence[Any]) -> list[Tensor]:
    return [part for part in parts if isinstance(part, Tensor)]


def texts_of(parts: Sequence[Any]) -> list[str]:
    return [part for part in parts if isinstance(part, str)]


def assert_within_a_level(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Rounding to whole levels may tell apart what differs by next to nothing."""
    assert [image.shape for image in mine] == [image.shape for image in theirs]
    for image, other in zip(mine, theirs, strict=True):
        assert (image.int() - other.int()).abs().max() <= 1


def assert_same_latents(mine: dict[int, Tensor], theirs: dict[int, Tensor]) -> None:
    """Every image of theirs is one of mine."""
    for key, latent in theirs.items():
        torch.testing.assert_close(mine[key], latent, **LATENT_TOLERANCE)


@pytest.mark.parametrize("fields", [{}, {"position": "2d"}])
def test_1_a_step_behind_the_cached_prefix_is_a_step_of_the_full_forward(
    build_pipeline: Build, truth: Any, make_image: Any, fields: dict[str, Any]
) -> None:
    """At every step, both branches of guidance: the training forward under the mixed mask, without a cache."""
    pipeline = build_pipeline(image=100.0, **fields)
    watch = Watch(pipeline)
    given = torch.from_numpy(make_image(6))
    pipeline.generate([["one", given, "seven"]], max_tokens=1, max_images=2, steps=4, guidance=3.0)
    before: list[Segment] = [
        text_of(pipeline, "one"),
        ImageSegment(None, PATCHES),
        text_of(pipeline, "seven"),
    ]
    steps, clean = list(watch.steps), [codec.encode(given)]
    assert len(steps) == 2 * 4
    for number, (latent_ICHW, (timestep,), answer_RCHW) in enumerate(steps):
        if number == 4:
            first = next(iter(watch.latents.values()))
            before, clean = (
                [*before, ImageSegment(None, PATCHES)],
                [*clean, codec.encode(codec.decode(first))],
            )
        assert timestep == int(timestep)
        segments: list[Segment] = [*before, ImageSegment(None, PATCHES)]
        latents, timesteps = [*clean, latent_ICHW[0]], [*[0] * len(clean), int(timestep)]
        first_patch = lay_out(segments).images[-1][0]
        conditional = truth(pipeline).noise(segments, latents, timesteps, first_patch)
        unconditional = truth(pipeline).noise(segments[-1:], latents[-1:], timesteps[-1:], 2)
        torch.testing.assert_close(answer_RCHW, torch.cat([conditional, unconditional]), **TOLERANCE)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_2_a_batch_of_ragged_prompts_is_each_alone(
    build_pipeline: Build, make_image: Any, guidance: float, temperature: float
) -> None:
    """Also in smaller batches. Some answers speak while others draw."""
    pipeline = build_pipeline(image=3.0, end=2.0)
    one, two = (torch.from_numpy(make_image(seed)) for seed in (1, 2))
    prompts: list[list[str | Tensor]] = [
        ["a handwritten three"],
        [one, "and", two],
        [""],
        ["seven", one],
        [two],
        ["a much longer prompt than all of the others"],
    ]
    settings: dict[str, Any] = {"max_tokens": 9, "max_images": 2, "steps": 4}
    settings |= {"guidance": guidance, "temperature": temperature}
    watch = Watch(pipeline)
    answers = pipeline.generate(prompts, seed=40, **settings)
    together = watch.latents
    new = [answer[len(prompt) :] for prompt, answer in zip(prompts, answers, strict=True)]
    assert len({len(images_of(answer)) for answer in new}) > 1, "want mixed phases"
    watch.clear()
    again = pipeline.generate(prompts, seed=40, batch=4, **settings)
    for number, prompt in enumerate(prompts):
        again += pipeline.generate([prompt], seed=40 + number, **settings)
    assert watch.latents.keys() == together.keys()
    assert_same_latents(together, watch.latents)
    for answer, other in zip(again, [*answers, *answers], strict=True):
        assert texts_of(answer) == texts_of(other)
        assert_within_a_level(images_of(answer), images_of(other))


def test_2_a_guided_image_beside_an_unguided_one_of_the_same_prompt(build_pipeline: Build) -> None:
    """The second is let in by the tick that reads the prompt of both, and draws at once."""
    pipeline = build_pipeline()
    requests = [
        Request(prompt=["a three"], image=ImageSampling(guidance=guidance, steps=4, seed=seed), draws=True)
        for guidance, seed in ((1.0, 0), (3.0, 1))
    ]
    watch = Watch(pipeline)
    run(pipeline.engine(), requests)
    together = watch.latents
    watch.clear()
    run(pipeline.engine(), requests[1:])
    assert watch.latents.keys() == {1}
    assert_same_latents(together, watch.latents)


def run(engine: Engine, requests: Sequence[Request]) -> list[tuple[int, Event]]:
    for request in requests:
        engine.submit(request)
    events = []
    while not engine.is_idle:
        events += engine.tick()
    return events


def test_3_guidance_of_1_runs_nothing_without_a_caption_and_other_guidance_needs_dropped_captions(
    build_pipeline: Build,
) -> None:
    pipeline = build_pipeline(image=100.0)
    prompts = ["one", "two"]
    prefix = 2 + max(len(pipeline.tokenizer.encode(prompt)) for prompt in prompts)
    watch = Watch(pipeline)
    pipeline.sample(prompts, guidance=1.0, steps=5)
    assert watch.rows == [(2, prefix), *[(2, PATCHES)] * 5]
    watch.clear()
    pipeline.generate([["one"], ["two"]], guidance=1.0, steps=5, max_tokens=1, max_images=1)
    assert watch.rows == [(2, prefix - 1), (2, 1), *[(2, PATCHES)] * 5, (2, PATCHES + 1)]
    watch.clear()
    data = pipeline.config.data.model_copy(update={"caption_dropout": 0.0})
    pipeline.config = pipeline.config.model_copy(update={"data": data})
    for guidance in (0.0, 3.0):
        for ask in (
            lambda: pipeline.sample(prompts, guidance=guidance),  # noqa: B023
            lambda: pipeline.generate([prompts], guidance=guidance),  # noqa: B023
            lambda: pipeline.stream("one", guidance=guidance),  # noqa: B023
        ):
            with pytest.raises(UserError, match=r"cannot be applied.*caption_dropout.*use guidance 1"):
                ask()
    assert not watch.rows
    pipeline.sample(prompts, guidance=1.0, steps=1)


def test_4_image_k_is_the_image_of_seed_plus_k_alone(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    prompts = ["one", "two two two two", "three"]
    settings: dict[str, Any] = {"steps": 5, "guidance": 2.0}
    watch = Watch(pipeline)
    drawn = pipeline.sample(prompts, per_prompt=2, seed=10, **settings)
    together = watch.latents
    assert [image.seed for image in drawn] == [10, 11, 12, 13, 14, 15]
    assert [image.prompt for image in drawn] == [prompt for prompt in prompts for _ in range(2)]
    watch.clear()
    again = pipeline.sample(prompts, per_prompt=2, seed=10, batch=4, **settings)
    for number, image in enumerate(drawn):
        again += pipeline.sample([image.prompt], seed=10 + number, **settings)
    assert watch.latents.keys() == together.keys()
    assert_same_latents(together, watch.latents)
    assert_within_a_level([image.pixels for image in again], [image.pixels for image in [*drawn, *drawn]])
    assert not torch.equal(drawn[0].pixels, drawn[1].pixels)


@pytest.mark.parametrize(
    ("prediction", "sampler"),
    [("epsilon", "ddim"), ("epsilon", "ddpm"), ("v", "ddim"), ("flow", "euler"), ("flow", "heun")],
)
def test_5_steps_are_calls_of_the_model(build_pipeline: Build, prediction: str, sampler: str) -> None:
    """heun corrects every step but the last."""
    pipeline = build_pipeline(image=100.0, diffusion={"prediction": prediction})
    watch = Watch(pipeline)
    for steps in (1, 4):
        calls = 2 * steps - 1 if sampler == "heun" else steps
        told: list[tuple[int, int]] = []
        watch.clear()
        watch.clear()
        pipeline.sample(
            ["one", "two"],
            steps=steps,
            sampler=sampler,
            on_call=lambda done, of: told.append((done, of)),  # noqa: B023
        )
        assert len(watch.steps) == calls and watch.rows[-calls:] == [(4, PATCHES)] * calls
        assert told == [(done, calls) for done in range(calls)]
        watch.clear()
        pipeline.generate([["one"]], max_tokens=1, max_images=2, steps=steps, sampler=sampler)
        assert len(watch.steps) == 2 * calls


def test_6_text_behind_an_image_sees_the_clean_image(build_pipeline: Build, truth: Any) -> None:
    """The state that the next token is chosen from is that of the image at timestep 0, not of the last noisy one."""
    pipeline = build_pipeline(image=100.0)
    watch = Watch(pipeline)
    answer = pipeline.generate([["three"]], max_tokens=2, max_images=1, steps=3, guidance=3.0)[0]
    segments: list[Segment] = [text_of(pipeline, "three"), ImageSegment(None, PATCHES)]
    end = len(lay_out(segments, finished=False)) - 1
    last, (image,) = watch.steps[-1], images_of(answer)
    # The first token is <BOI>, the second follows the image.
    begin, behind = watch.states[:2]
    clean = truth(pipeline).states(segments, [codec.encode(image)], [0])
    torch.testing.assert_close(begin[0], clean[end - PATCHES - 2], **TOLERANCE)
    torch.testing.assert_close(behind[0], clean[end], **TOLERANCE)
    noisy = truth(pipeline).states(segments, [last.latent_ICHW[0]], [int(last.timesteps[0])])
    assert (behind[0] - noisy[end]).abs().max() > 1e-3


@pytest.mark.parametrize(("prediction", "sampler"), [("epsilon", "ddpm"), ("flow", "heun")])
def test_7_previews_change_no_bit(build_pipeline: Build, prediction: str, sampler: str) -> None:
    pipeline = build_pipeline(image=20.0, diffusion={"prediction": prediction})
    settings: dict[str, Any] = {"max_tokens": 5, "max_images": 2, "steps": 5, "seed": 4, "sampler": sampler}
    plain, *others = (list(pipeline.stream("one", preview_every=every, **settings)) for every in (0, 1, 3))
    assert sum(isinstance(event, ImageDone) for event in plain) == 2
    for events in others:
        assert any(isinstance(event, ImagePreview) for event in events)
        assert_same_events([event for event in events if not isinstance(event, ImagePreview)], plain)


def assert_same_events(mine: Sequence[Event], theirs: Sequence[Event]) -> None:
    """To the bit."""
    for event, other in zip(mine, theirs, strict=True):
        if isinstance(event, ImageDone) and isinstance(other, ImageDone):
            assert (event.index, event.seed) == (other.index, other.seed)
            assert torch.equal(event.pixels, other.pixels)
        else:
            assert event == other


def test_8_the_same_settings_give_the_same_bytes(build_pipeline: Build, tmp_path: Path) -> None:
    """From a pipeline that has drawn, and from a new one. Another seed gives others."""
    used = build_pipeline(image=3.0, end=1.0)
    settings: dict[str, Any] = {"steps": 4, "guidance": 3.0, "sampler": "ddpm"}

    def files(pipeline: Pipeline, name: str, seed: int) -> dict[str, bytes]:
        save_samples(pipeline.sample(["one", "three"], per_prompt=2, seed=seed, **settings), tmp_path / name)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    def events(pipeline: Pipeline) -> list[Event]:
        return list(pipeline.stream("one", temperature=1.0, max_tokens=12, max_images=2, seed=7, **settings))

    first, said = files(used, "first", 5), events(used)
    assert any(isinstance(event, TextDelta) for event in said) and len(first) == 5
    for number, pipeline in enumerate((used, build_pipeline(image=3.0, end=1.0))):
        assert files(pipeline, f"again {number}", 5) == first
        assert_same_events(events(pipeline), said)
    other = files(used, "other", 6)
    assert other.keys() == first.keys() and all(other[name] != first[name] for name in first)
