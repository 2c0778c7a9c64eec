"""The model as its user meets it: draw images, caption images, continue any mixture of both.

C channels, H/W image height and width, I images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion.checkpoint.export import read_export
from transfusion.codec import Codec, open_codec
from transfusion.config import Config, SampleGridConfig
from transfusion.errors import UserError
from transfusion.families.build import family_of
from transfusion.generate.engine import Engine, Part, Request
from transfusion.generate.events import Event, ImageDone, TextDelta
from transfusion.generate.load import Weights, load_model
from transfusion.inference import image_diffusion, text_sampling
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.runner import ModelRunner
from transfusion.inference.text_sampling import TextSampling
from transfusion.model.backbone import Backbone
from transfusion.parallel.environment import find_device
from transfusion.schema import TextSegment
from transfusion.sequence.layout import Layout
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.tokens import MAX_SAMPLING_SEED

# Told how many of how many calls of the model are done.
OnCall = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class SampledImage:
    """One drawn image, and what draws it again.

    Attributes:
        pixels: uint8 [C, H, W] on the CPU.
        prompt: Its caption.
        seed: `Pipeline.sample` draws the image again from this seed and caption, with the same settings.
    """

    pixels: Tensor
    prompt: str
    seed: int


class Pipeline:
    """Draws and captions images, and continues any mixture of text and images. `from_export` opens a saved model.

    Every random draw is keyed by the seed and the number of the image or row. So the same settings give the same
    results, whatever the batch size.

    Args:
        model: The network with its weights, on `device`. It is not changed.
        tokenizer: The tokenizer that the model was trained with.
        config: The configuration that the model was trained with.
        device: Where `model` is.
        codec: An open codec for the images. None opens that of `config.codec` on `device`.

    Raises:
        UserError: For a codec folder that was changed or lacks weights.
    """

    def __init__(
        self,
        model: Backbone,
        tokenizer: Tokenizer,
        config: Config,
        device: torch.device | str,
        codec: Codec | None = None,
    ) -> None:
        config = config.with_vocabulary(tokenizer.vocabulary)
        self.tokenizer, self.config, self.family = tokenizer, config, family_of(config)
        codec = open_codec(config.codec, device) if codec is None else codec
        self.runner = ModelRunner(model, config, torch.device(device), codec)

    @classmethod
    def from_export(
        cls, folder: str | Path, *, weights: Weights = "auto", device: torch.device | str = "auto"
    ) -> Pipeline:
        """Open a folder that `transfusion export` wrote.

        On CUDA the network runs in the precision that it was trained in, elsewhere in fp32.

        Args:
            folder: The exported folder.
            weights: "raw", "ema" (their moving average), or "auto": the average where there is one, else raw.
            device: Such as "cpu" or "cuda:1". "auto" takes CUDA where there is a device, else the CPU.

        Raises:
            UserError: For a folder that is incomplete or damaged, weights that it lacks, or a missing device.
        """
        found = read_export(folder)
        tokenizer = Tokenizer(found.tokenizer)
        place = find_device(device)
        model = load_model(found, weights, tokenizer, place)
        return cls(model, tokenizer, found.config, place)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        per_prompt: int = 1,
        guidance: float = 3.0,
        steps: int = 25,
        sampler: str = "auto",
        seed: int = 0,
        batch: int = 64,
        size: tuple[int, int] | None = None,
        on_call: OnCall | None = None,
        on_images: Callable[[list[SampledImage]], object] | None = None,
    ) -> list[SampledImage]:
        """Draw images of captions.

        Args:
            prompts: Captions. An empty one draws without a caption and needs guidance 1.
            per_prompt: Images of each caption, at least 1.
            guidance: Scale of classifier-free guidance, at least 0. 1 is the model itself. Any other value needs a
                model that was trained with `data.caption_dropout` above 0.
            steps: Sampler steps for each image, from 1 to `diffusion.steps`. Each calls the model once. With heun it is
                twice, except in the last. A Chameleon model draws token by token, whatever the steps and the sampler.
            sampler: "ddim" or "ddpm", for flow prediction "euler" or "heun". "auto" is ddim, for flow euler.
            seed: Of the first image. Image k of the call has seed `seed + k`, from 0 to 2**38 - 1.
            batch: Images that are drawn at once.
            size: Height and width in pixels, one of the model's sizes. None takes the first.
            on_call: Called before each call of the model, with how many are done and how many there are. What it raises
                ends the drawing.
            on_images: Called with each batch of images as soon as it is drawn.

        Returns:
            All images of the first caption, then those of the next.

        Raises:
            UserError: For settings out of range, guidance that cannot be applied, or a caption too long for
                `data.sequence_length`.
        """
        _check_at_least_one(per_prompt=per_prompt, batch=batch)
        sampling = ImageSampling(guidance=guidance, steps=steps, sampler=sampler, seed=seed, size=_size(size))
        wanted = [prompt for prompt in prompts for _ in range(per_prompt)]
        self._check_sampling(sampling, wanted)
        seeds = list(range(seed, seed + len(wanted)))
        counted = self._counted(sampling, -(-len(wanted) // batch), on_call)
        found: dict[int, SampledImage] = {}
        for images in self._draw(wanted, seeds, sampling, batch, counted):
            found |= images
            if on_images is not None:
                on_images(list(images.values()))
        return [found[number] for number in range(len(wanted))]

    @torch.no_grad()
    def sample_grid(
        self, grid: SampleGridConfig, *, rank: int = 0, ranks: int = 1, on_call: OnCall | None = None
    ) -> list[SampledImage]:
        """Draw this rank's share of a grid.

        Every rank runs the same number of forwards. One with a shorter share draws the last image again.

        Args:
            grid: Captions, sizes and settings, such as `config.sample_grid`.
            rank: Number of this process among those that share the grid, from 0.
            ranks: How many those are.
            on_call: As in `sample`, for one size after another. Called by every rank equally often.

        Returns:
            For one size after another, images number `rank`, `rank + ranks` and so on of what `sample` gives. Seeds
                run on from size to size. No captions give no images.

        Raises:
            UserError: As `sample`.
        """
        wanted = [prompt for prompt in grid.prompts for _ in range(grid.per_prompt)]
        if not wanted:
            return []
        share = -(-len(wanted) // ranks)
        mine = [rank + turn * ranks for turn in range(share)]
        drawn = [min(number, len(wanted) - 1) for number in mine]
        found: list[SampledImage] = []
        for turn, size in enumerate(map(Size.parse, grid.sizes) if grid.sizes else (None,)):
            seed = grid.seed + turn * len(wanted)
            sampling = ImageSampling(
                guidance=grid.guidance, steps=grid.steps, sampler=grid.sampler, seed=seed, size=size
            )
            self._check_sampling(sampling, wanted)
            seeds = [seed + number for number in drawn]
            counted = self._counted(sampling, 1, on_call)
            (images,) = self._draw([wanted[number] for number in drawn], seeds, sampling, share, counted)
            found += [images[place] for place, number in enumerate(mine) if number < len(wanted)]
        return found

    @torch.no_grad()
    def caption(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch: int = 256,
    ) -> list[str]:
        """Write the text that follows each image.

        Args:
            images: uint8 [I, C, H, W], or one by one uint8 [C, H, W], of the model's sizes.
            max_tokens: Maximum of text tokens for each image, at least 1.
            temperature: Of the softmax over the next token, at least 0. 0 takes the likeliest token.
            top_p: In (0, 1]. Only the likeliest tokens whose probabilities together reach it are drawn. 1 keeps all.
            seed: The text of image k is drawn from `seed + k`, from 0 to 2**38 - 1.
            batch: Images that are captioned at once.

        Returns:
            A text for each image.

        Raises:
            UserError: For settings out of range, or images that do not fit the model.
        """
        answers = self.generate(
            [[image] for image in images],
            max_tokens=max_tokens,
            max_images=0,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch=batch,
        )
        return ["".join(part for part in answer[1:] if isinstance(part, str)) for answer in answers]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        max_tokens: int = 256,
        max_images: int = 4,
        temperature: float = 0.0,
        top_p: float = 1.0,
        guidance: float = 3.0,
        steps: int = 25,
        sampler: str = "auto",
        seed: int = 0,
        batch: int = 64,
        size: tuple[int, int] | None = None,
    ) -> list[list[Part]]:
        """Continue prompts of text and images with text and images.

        An answer ends at <EOS>, after `max_tokens` text tokens, or where prompt and answer fill
        `data.sequence_length`.

        Args:
            prompts: The parts of each: texts, and images as uint8 [C, H, W] of one of the model's sizes.
            max_tokens: Maximum of new text tokens for each prompt, at least 1.
            max_images: Maximum of new images for each prompt. 0 writes text alone.
            temperature: As in `caption`.
            top_p: As in `caption`.
            guidance: As in `sample`.
            steps: As in `sample`.
            sampler: As in `sample`.
            seed: Prompt r draws its text and its first image from `seed + r`, from 0 to 2**38 - 1.
            batch: Prompts that are continued at once.
            size: Of new images, one of the model's sizes. None leaves the choice to the model.

        Returns:
            The parts of each prompt, unchanged, followed by those of its answer: texts, and images as uint8 [C, H, W]
                on the CPU.

        Raises:
            UserError: For settings out of range, images that do not fit the model, or a prompt that fills
                `data.sequence_length`.
        """
        _check_at_least_one(batch=batch)
        _check_seeds(seed, len(prompts))
        requests = [
            self._request(
                prompt,
                seed + number,
                text={"temperature": temperature, "top_p": top_p},
                image={"guidance": guidance, "steps": steps, "sampler": sampler, "size": _size(size)},
                max_tokens=max_tokens,
                max_images=max_images,
            )
            for number, prompt in enumerate(prompts)
        ]
        answers: list[list[Part]] = [[] for _ in prompts]
        for events in self._run(requests, batch):
            for number, event in events:
                _extend(answers[number], event)
        return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]

    def stream(
        self,
        prompt: str | Sequence[Part],
        *,
        max_tokens: int = 256,
        max_images: int = 4,
        temperature: float = 0.0,
        top_p: float = 1.0,
        guidance: float = 3.0,
        steps: int = 25,
        sampler: str = "auto",
        seed: int = 0,
        size: tuple[int, int] | None = None,
        preview_every: int = 0,
    ) -> Iterator[Event]:
        """Continue a prompt as `generate` does, and tell each piece of the answer as soon as it is there.

        Closing the iterator ends the answer and frees its memory.

        Args:
            prompt: A text, or parts as in `generate`.
            max_tokens: As in `generate`.
            max_images: As in `generate`.
            temperature: As in `generate`.
            top_p: As in `generate`.
            guidance: As in `generate`.
            steps: As in `generate`.
            sampler: As in `generate`.
            seed: The text and the first image are drawn from it, from 0 to 2**38 - 1.
            size: As in `generate`.
            preview_every: Calls of the model from one preview of an image to the next. 0 gives none.

        Returns:
            `TextDelta`, `ImageStart`, `ImagePreview` and `ImageDone` in their order, and at last `Done`.

        Raises:
            UserError: As `generate`, and for previews of a codec that has none, at once and not with the first event.
        """
        request = self._request(
            [prompt] if isinstance(prompt, str) else prompt,
            seed,
            text={"temperature": temperature, "top_p": top_p},
            image={"guidance": guidance, "steps": steps, "sampler": sampler, "size": _size(size)},
            max_tokens=max_tokens,
            max_images=max_images,
            preview_every=preview_every,
        )
        ticks = self._run([request], 1)
        return (event for events in ticks for _, event in events)

    def _request(
        self,
        prompt: Sequence[Part],
        seed: int,
        *,
        text: dict[str, Any],
        image: dict[str, Any],
        max_tokens: int,
        max_images: int,
        preview_every: int = 0,
    ) -> Request:
        """A checked request."""
        _check_at_least_one(max_tokens=max_tokens)
        for name, count in {"max_images": max_images, "preview_every": preview_every}.items():
            if count < 0:
                raise UserError(f"{name} {count} must be at least 0")
        _check_seeds(seed, 1)
        request = Request(
            prompt=prompt,
            text=TextSampling(seed=seed, **text),
            image=ImageSampling(seed=seed, **image),
            max_tokens=max_tokens,
            max_images=max_images,
            preview_every=preview_every,
        )
        text_sampling.check(request.text)
        if max_images or request.image.size is not None:
            image_diffusion.check(request.image, self.config)
        self._check_parts(prompt)
        return request

    def _run(
        self, requests: Sequence[Request], batch: int, on_image_call: Callable[[], object] | None = None
    ) -> Iterator[list[tuple[int, Event]]]:
        """The events of requests, tick by tick, at most `batch` of them at a time, in an engine of their own."""
        engine = Engine(
            self.runner,
            self.tokenizer,
            self.config,
            self.family,
            most_requests=batch,
            on_image_call=on_image_call,
        )
        for request in requests:
            engine.submit(request)
        return _ticks(engine)

    def _draw(
        self,
        prompts: list[str],
        seeds: list[int],
        sampling: ImageSampling,
        batch: int,
        on_image_call: Callable[[], object] | None,
    ) -> Iterator[dict[int, SampledImage]]:
        """Images by their numbers, as they are finished, each from its own seed."""
        sampling = replace(sampling, size=sampling.size or self.runner.sizes.first)
        requests = [
            Request(prompt=[prompt], image=replace(sampling, seed=seed), draws=True)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for events in self._run(requests, batch, on_image_call):
            images = {
                number: SampledImage(event.pixels, prompts[number], seeds[number])
                for number, event in events
                if isinstance(event, ImageDone)
            }
            if images:
                yield dict(sorted(images.items()))

    def _counted(
        self, sampling: ImageSampling, batches: int, on_call: OnCall | None
    ) -> Callable[[], object] | None:
        """What tells `on_call` how many calls of so many batches are done."""
        if on_call is None:
            return None
        patches = self.runner.sizes.patches(sampling.size or self.runner.sizes.first)
        calls = batches * self.family.image_calls(sampling, self.config.diffusion, patches)
        done = itertools.count()
        return lambda: on_call(next(done), calls)

    def _caption_first(self, prompt: str, size: Size | None) -> Layout:
        caption = TextSegment(tuple(self.tokenizer.encode(prompt)))
        return self.runner.lay_out([caption, self.runner.image(size or self.runner.sizes.first)])

    def _check_sampling(self, sampling: ImageSampling, prompts: Sequence[str]) -> None:
        image_diffusion.check(sampling, self.config)
        _check_seeds(sampling.seed, len(prompts))
        if sampling.guidance != 1 and "" in prompts:
            raise UserError(
                f"guidance {sampling.guidance} cannot be applied to an empty prompt: there is nothing to"
                " guide by; use guidance 1 for images without a caption"
            )
        for prompt in set(prompts):
            _check_text(prompt)
            length = len(self._caption_first(prompt, sampling.size))
            if length > self.config.data.sequence_length:
                raise UserError(
                    f"a prompt and its image take {length} positions, more than data.sequence_length"
                    f" {self.config.data.sequence_length}: {prompt[:60]!r}"
                )

    def _check_parts(self, prompt: Sequence[Part]) -> None:
        shapes = self.runner.image_shapes
        for part in prompt:
            if isinstance(part, str):
                _check_text(part)
            elif part.dtype != torch.uint8 or part.shape not in shapes:
                raise UserError(
                    f"an image must be uint8 of shape {' or '.join(str(list(shape)) for shape in shapes)},"
                    f" got {part.dtype} of shape {list(part.shape)}"
                )


def _ticks(engine: Engine) -> Iterator[list[tuple[int, Event]]]:
    while not engine.is_idle:
        yield engine.tick()


def _extend(answer: list[Part], event: Event) -> None:
    """Add what an event brings to the parts of an answer."""
    if isinstance(event, TextDelta):
        if answer and isinstance(answer[-1], str):
            answer[-1] += event.text
        else:
            answer.append(event.text)
    elif isinstance(event, ImageDone):
        answer.append(event.pixels)


def _size(size: tuple[int, int] | None) -> Size | None:
    if size is None:
        return None
    if len(size) != 2:
        raise UserError(f"size must be height and width, got {size!r}")
    return Size(*size)


def _check_at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} {count} must be at least 1")


def _check_seeds(seed: int, count: int) -> None:
    """Of the request's images or rows, numbered from `seed` on."""
    last = seed + max(count - 1, 0)
    if not 0 <= seed <= last <= MAX_SAMPLING_SEED:
        seeds = f"seed {seed}" if last == seed else f"seeds {seed} to {last}"
        raise UserError(f"{seeds} must lie in [0, {MAX_SAMPLING_SEED}]")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"a prompt is not Unicode text: {ascii(text)[:60]}; give it as UTF-8") from None
