"""The model as its user meets it: draw images, caption images, continue any mixture of both.

C channels, H/W image height and width, I images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from transfusion.checkpoint.export import read_export
from transfusion.codec import Codec, open_codec
from transfusion.config import Config, SampleGridConfig
from transfusion.errors import UserError
from transfusion.families.build import family_of
from transfusion.generate.engine import Engine
from transfusion.generate.events import Event, ImageDone, MediaDone, extend
from transfusion.generate.inspection import Inspection, inspect
from transfusion.generate.load import Dtype, Weights, load_model
from transfusion.generate.pillow_images import from_image, to_image
from transfusion.generate.recipe import Origin, Recipe
from transfusion.generate.request import Part, Request, segments
from transfusion.generate.scoring import score_image, score_texts
from transfusion.generate.settings import (
    AnswerSettings,
    ImageSettings,
    check_at_least,
    check_seeds,
    check_text,
    image_sampling,
)
from transfusion.inference import image_diffusion, text_sampling
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.image_scores import Score
from transfusion.inference.runner import Media, ModelRunner
from transfusion.inference.text_sampling import TextSampling
from transfusion.model.backbone import Backbone
from transfusion.parallel.environment import find_device
from transfusion.sequence.sizes import IMAGE, Size
from transfusion.sequence.tokenizer import Tokenizer

# An image as users have it: uint8 [C, H, W] of one of the model's sizes, or one of Pillow, of any size and mode, which
# is made fit as in training.
ImageLike = Tensor | Image.Image
# A text, or texts, images and arrays of other modalities in their order.
Prompt = str | Sequence[str | ImageLike | Media]
# Told how many of how many calls of the model are done.
OnCall = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class SampledImage:
    """One drawn image, and what draws it again.

    Attributes:
        pixels: uint8 [C, H, W] on the CPU.
        prompt: The texts of its prompt.
        seed: `Pipeline.sample` draws the image again from this seed and prompt, with the same settings.
        recipe: All that draws it again.
    """

    pixels: Tensor
    prompt: str
    seed: int
    recipe: Recipe | None = None

    @property
    def image(self) -> Image.Image:
        """For Pillow, grey or colour."""
        return to_image(self.pixels)


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
        origin: The weights, as the recipes of images name them.
        captures: On CUDA, launch the steps that come again as graphs. The weights must stay where they are. Those of a
            model that is being trained do not.

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
        origin: Origin | None = None,
        *,
        captures: bool = False,
    ) -> None:
        self.origin, place = origin or Origin(), torch.device(device)
        config = config.with_vocabulary(tokenizer.vocabulary)
        self.tokenizer, self.config, self.family = tokenizer, config, family_of(config)
        codec = open_codec(config.codec, device) if codec is None else codec
        captures = captures and place.type == "cuda"
        self.runner = ModelRunner(model, config, place, codec, captures=captures)

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        *,
        weights: Weights = "auto",
        device: torch.device | str = "auto",
        dtype: Dtype = "auto",
    ) -> Pipeline:
        """Open a folder that `transfusion export` wrote.

        Args:
            folder: The exported folder.
            weights: "raw", "ema" (their moving average), or "auto": the average where there is one, else raw.
            device: Such as "cpu" or "cuda:1". "auto" takes CUDA where there is a device, else the CPU.
            dtype: "float32", "bfloat16", or "auto": on CUDA the precision that the network was trained in, elsewhere
                fp32. With "int8" the matrices take a quarter of the memory of fp32, and all else is as with "auto".

        Raises:
            UserError: For a folder that is incomplete or damaged, weights that it lacks, a missing device, or a dtype
                that does not exist.
        """
        found = read_export(folder)
        tokenizer = Tokenizer(found.tokenizer)
        place = find_device(device)
        model, origin = load_model(found, weights, tokenizer, place, dtype)
        return cls(model, tokenizer, found.config, place, origin=origin, captures=True)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        per_prompt: int = 1,
        seed: int = 0,
        batch: int = 64,
        on_call: OnCall | None = None,
        on_images: Callable[[list[SampledImage]], object] | None = None,
        **settings: Unpack[ImageSettings],
    ) -> list[SampledImage]:
        """Draw images of captions, or behind any texts and images.

        Args:
            prompts: Captions, or texts and images. An empty one draws without a caption and needs guidance 1.
            per_prompt: Images of each prompt, at least 1.
            seed: Of the first image. Image k of the call has seed `seed + k`, from 0 to 2**38 - 1.
            batch: Images that are drawn at once.
            on_call: Called before each call of the model, with how many are done and how many there are. What it raises
                ends the drawing.
            on_images: Called with each batch of images as soon as it is drawn.
            **settings: See `ImageSettings`.

        Returns:
            All images of the first prompt, then those of the next.

        Raises:
            UserError: For settings out of range, guidance that cannot be applied, images that do not fit the model, or
                a prompt too long for `data.sequence_length`.
        """
        check_at_least(1, per_prompt=per_prompt, batch=batch)
        sampling = image_sampling(settings, seed)
        wanted = [parts for parts in map(self._parts, prompts) for _ in range(per_prompt)]
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
    def sample_media(
        self,
        modality: str,
        prompts: Sequence[Prompt],
        *,
        per_prompt: int = 1,
        seed: int = 0,
        batch: int = 64,
        on_call: OnCall | None = None,
        on_media: Callable[[int, Media], object] | None = None,
        **settings: Unpack[ImageSettings],
    ) -> list[Media]:
        """Draw arrays of a further modality, as `sample` draws images.

        Args:
            modality: One that the configuration declares.
            prompts: As in `sample`.
            per_prompt: As in `sample`.
            seed: As in `sample`.
            batch: As in `sample`.
            on_call: As in `sample`.
            on_media: Called with the number of each, from 0, and the array as soon as it is drawn.
            **settings: See `ImageSettings`. The size is one of the modality's shapes. Default: its first.

        Returns:
            All of the first prompt, then those of the next.

        Raises:
            UserError: As `sample`, and for a modality that is not declared.
        """
        check_at_least(1, per_prompt=per_prompt, batch=batch)
        sampling = self._sampling(modality, settings, seed)
        wanted = [parts for parts in map(self._parts, prompts) for _ in range(per_prompt)]
        self._check_sampling(sampling, wanted)
        counted = self._counted(sampling, -(-len(wanted) // batch), on_call)
        requests = [self._image_request(parts, sampling, seed + n) for n, parts in enumerate(wanted)]
        found: dict[int, Media] = {}
        for events in self._run(requests, batch, counted):
            drawn = {number: event.media for number, event in events if isinstance(event, MediaDone)}
            for number, media in sorted(drawn.items()):
                found[number] = media
                if on_media is not None:
                    on_media(number, media)
        return [found[number] for number in range(len(wanted))]

    def edit(
        self,
        images: Sequence[ImageLike],
        instructions: Sequence[str],
        *,
        seed: int = 0,
        batch: int = 64,
        on_call: OnCall | None = None,
        **settings: Unpack[ImageSettings],
    ) -> list[SampledImage]:
        """Draw the image that follows an image and an instruction (paper, section 4.4).

        The model must have been trained on such triples.

        Args:
            images: To be edited.
            instructions: One for each image.
            seed: As in `sample`.
            batch: As in `sample`.
            on_call: As in `sample`, for the images of one size after another.
            **settings: See `ImageSettings`. Without a size each result has that of its image.

        Returns:
            An image for each.

        Raises:
            UserError: As `sample`, and where there are not as many instructions as images.
        """
        check_at_least(1, batch=batch)
        check_seeds(seed, len(images))
        if len(images) != len(instructions):
            raise UserError(
                f"{len(images)} images and {len(instructions)} instructions; give one for each image"
            )
        pixels = [self._pixels(image) for image in images]
        size = image_sampling(settings, seed).size
        by_size: dict[Size, list[int]] = {}
        for number, values in enumerate(pixels):
            by_size.setdefault(size or Size(*values.shape[1:]), []).append(number)
        found: dict[int, SampledImage] = {}
        for each, numbers in by_size.items():
            sampling = image_sampling({**settings, "size": each}, seed)
            prompts: list[list[Part]] = [[pixels[number], instructions[number]] for number in numbers]
            self._check_sampling(sampling, prompts)
            counted = self._counted(sampling, -(-len(numbers) // batch), on_call)
            for drawn in self._draw(prompts, [seed + number for number in numbers], sampling, batch, counted):
                found |= {numbers[place]: image for place, image in drawn.items()}
        return [found[number] for number in range(len(images))]

    def best_of(
        self,
        prompts: Sequence[str],
        *,
        count: int,
        seed: int = 0,
        batch: int = 64,
        on_call: OnCall | None = None,
        **settings: Unpack[ImageSettings],
    ) -> list[SampledImage]:
        """Draw several images of each caption, and keep the one from which the model itself reads the caption best.

        The measure is the log-likelihood of the caption behind the image (Ding et al., 2021, section 3.3). The model
        must have been trained on images that stand before their captions too (`data.caption_first` below 1).

        Args:
            prompts: Captions.
            count: Images that are drawn of each, at least 1.
            seed: As in `sample`. Those of the second caption follow those of the first.
            batch: As in `sample`.
            on_call: As in `sample`.
            **settings: See `ImageSettings`.

        Returns:
            An image for each caption, with its own seed.

        Raises:
            UserError: As `sample`.
        """
        drawn = self.sample(prompts, per_prompt=count, seed=seed, batch=batch, on_call=on_call, **settings)
        scores = self.score([image.pixels for image in drawn], [image.prompt for image in drawn], batch=batch)
        best = []
        for number in range(len(prompts)):
            mine = range(number * count, (number + 1) * count)
            best.append(drawn[max(mine, key=lambda place: scores[place].log_likelihood)])
        return best

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
        wanted: list[list[Part]] = [[prompt] for prompt in grid.prompts for _ in range(grid.per_prompt)]
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
            # All ranks read their prompts in one call.
            (images,) = self._draw(
                [wanted[number] for number in drawn], seeds, sampling, share, counted, shares_prompts=False
            )
            found += [images[place] for place, number in enumerate(mine) if number < len(wanted)]
        return found

    def caption(
        self,
        images: Tensor | Sequence[ImageLike | Media],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch: int = 256,
        on_event: Callable[[int, Event], object] | None = None,
    ) -> list[str]:
        """Write the text that follows each image.

        Args:
            images: uint8 [I, C, H, W], or one by one, with sounds or other arrays among them.
            max_tokens: Maximum of text tokens for each image, at least 1.
            temperature: As in `AnswerSettings`.
            top_p: As in `AnswerSettings`.
            seed: The text of image k is drawn from `seed + k`, from 0 to 2**38 - 1.
            batch: Images that are captioned at once.
            on_event: As in `generate`.

        Returns:
            A text for each image.

        Raises:
            UserError: For settings out of range, or images that do not fit the model.
        """
        answers = self.generate(
            [[image] for image in images],
            seed=seed,
            batch=batch,
            on_event=on_event,
            max_tokens=max_tokens,
            max_images=0,
            temperature=temperature,
            top_p=top_p,
        )
        return ["".join(part for part in answer[1:] if isinstance(part, str)) for answer in answers]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int = 0,
        batch: int = 64,
        on_event: Callable[[int, Event], object] | None = None,
        **settings: Unpack[AnswerSettings],
    ) -> list[list[Part]]:
        """Continue prompts of text and images with text and images.

        An answer ends at <EOS>, after `max_tokens` text tokens, or where prompt and answer fill
        `data.sequence_length`.

        Args:
            prompts: Texts, or texts and images.
            seed: Prompt r draws its text and its first image from `seed + r`, from 0 to 2**38 - 1.
            batch: Prompts that are continued at once.
            on_event: Called with the number of a prompt and what came of it, as it comes. What it raises ends all.
            **settings: See `AnswerSettings`.

        Returns:
            The parts of each prompt, images as the network reads them, followed by those of its answer: texts, and
                images as uint8 [C, H, W] on the CPU.

        Raises:
            UserError: For settings out of range, images that do not fit the model, or a prompt that fills
                `data.sequence_length`.
        """
        check_at_least(1, batch=batch)
        check_seeds(seed, len(prompts))
        requests = [
            self.request(prompt, seed=seed + number, **settings) for number, prompt in enumerate(prompts)
        ]
        answers: list[list[Part]] = [list(request.prompt) for request in requests]
        said: list[list[Part]] = [[] for _ in requests]
        for events in self._run(requests, batch):
            for number, event in events:
                extend(said[number], event)
                if on_event is not None:
                    on_event(number, event)
        return [[*prompt, *answer] for prompt, answer in zip(answers, said, strict=True)]

    def stream(
        self, prompt: Prompt, *, seed: int = 0, preview_every: int = 0, **settings: Unpack[AnswerSettings]
    ) -> Iterator[Event]:
        """Continue a prompt as `generate` does, and tell each piece of the answer as soon as it is there.

        Closing the iterator ends the answer and frees its memory.

        Args:
            prompt: A text, or texts and images.
            seed: The text and the first image are drawn from it, from 0 to 2**38 - 1.
            preview_every: Calls of the model from one preview of an image to the next. 0 gives none.
            **settings: See `AnswerSettings`.

        Returns:
            `TextDelta`, `ImageStart`, `ImagePreview` and `ImageDone` in their order, and at last `Done`.

        Raises:
            UserError: As `generate`, and for previews of a codec that has none, at once and not with the first event.
        """
        request = self.request(prompt, seed=seed, preview_every=preview_every, **settings)
        ticks = self._run([request], 1)
        return (event for events in ticks for _, event in events)

    @torch.no_grad()
    def score(
        self,
        contexts: Sequence[Prompt | ImageLike],
        targets: Sequence[str | ImageLike | Media],
        *,
        samples: int = 128,
        seed: int = 0,
        batch: int = 64,
    ) -> list[Score]:
        """How likely the model finds each target behind its context, in nats.

        The log-likelihood of a text is exact, and so is that of an image of a Chameleon model. For an image that is
        diffused it is the variational bound, estimated from random timesteps and noise.

        Args:
            contexts: Texts, images, or several of both. An empty text is no context.
            targets: A text or an image for each. A text that continues a text is tokenized with it.
            samples: Draws for each image, an even number of at least 4. Each calls the model once.
            seed: Of the draws. All images share them, so that what is compared differs by little else.
            batch: Texts that are scored at once.

        Returns:
            A score for each.

        Raises:
            UserError: For lists of different lengths, settings out of range, images that do not fit the model, or what
                does not fit `data.sequence_length`.
        """
        check_at_least(1, batch=batch)
        check_seeds(seed, 1)
        if samples < 4 or samples % 2:
            raise UserError(f"samples {samples} must be an even number of at least 4")
        if len(contexts) != len(targets):
            raise UserError(f"{len(contexts)} contexts and {len(targets)} targets; give one for each")
        before = [self._parts(context) for context in contexts]
        after = [self._target(target) for target in targets]
        for parts, target in zip(before, after, strict=True):
            self._check_length([*parts, target])
        found: dict[int, Score] = {}
        texts = [(number, target) for number, target in enumerate(after) if isinstance(target, str)]
        for begin in range(0, len(texts), batch):
            numbers, batched = zip(*texts[begin : begin + batch], strict=True)
            scores = score_texts([before[number] for number in numbers], batched, self.runner, self.tokenizer)
            found |= dict(zip(numbers, scores, strict=True))
        for number, target in enumerate(after):
            if isinstance(target, Media):
                raise UserError(f"a {target.modality} cannot be scored; score texts and images")
            if isinstance(target, Tensor):
                found[number] = score_image(
                    before[number],
                    target,
                    self.runner,
                    self.tokenizer,
                    self.config,
                    self.family,
                    samples=samples,
                    seed=seed,
                )
        return [found[number] for number in range(len(after))]

    @torch.no_grad()
    def inspect(self, document: Prompt) -> Inspection:
        """A document as the model sees it: tokens, patches, what each sees, and the loss of each token.

        Args:
            document: A text, or texts and images, such as a prompt with its answer.

        Returns:
            One entry for each position.

        Raises:
            UserError: For images that do not fit the model, or what does not fit `data.sequence_length`.
        """
        parts = self._parts(document)
        self._check_length(parts, finished=False)
        return inspect(parts, self.runner, self.tokenizer)

    def replay(self, recipe: Recipe, images: Sequence[ImageLike] = ()) -> SampledImage:
        """Make an image again. On the machine and versions that made it, its pixels are the same.

        Args:
            recipe: Of an `ImageDone`, a `SampledImage` or a PNG (`read_recipe`).
            images: Those of its prompt.

        Returns:
            The image. Its own recipe has the digest of its pixels, to compare.

        Raises:
            UserError: For a recipe of another model or of other weights, or an answer that came out otherwise and has
                no such image.
        """
        for name in ("model", "weights", "dtype"):
            made, here = getattr(recipe.origin, name), getattr(self.origin, name)
            if made != here:
                raise UserError(
                    f"the image was made with {name} {made or 'unknown'}, this is {here or 'unknown'}"
                )
        request = recipe.request([self._pixels(image) for image in images])
        request = replace(request, prompt=self._parts(request.prompt))
        self._check_request(request)
        prompt = _texts(request.prompt)
        for events in self._run([request], 1):
            for _, event in events:
                if isinstance(event, ImageDone) and event.index == recipe.index:
                    return SampledImage(event.pixels, prompt, event.seed, event.recipe)
        raise UserError(f"the answer came out otherwise, and has no image number {recipe.index}")

    def request(
        self, prompt: Prompt, *, seed: int = 0, preview_every: int = 0, **settings: Unpack[AnswerSettings]
    ) -> Request:
        """What `stream` asks of the engine: a checked request, to be submitted to `engine`.

        Args:
            prompt: As in `stream`.
            seed: As in `stream`.
            preview_every: As in `stream`.
            **settings: See `AnswerSettings`.

        Raises:
            UserError: As `generate`.
        """
        check_at_least(0, preview_every=preview_every)
        image = {name: value for name, value in settings.items() if name not in _ANSWER_ONLY}
        text = {name: settings[name] for name in ("temperature", "top_p") if name in settings}
        counts: dict[str, Any] = {
            name: settings[name] for name in ("max_tokens", "max_images") if name in settings
        }
        if "modalities" in settings:
            counts["modalities"] = tuple(settings["modalities"])
        request = Request(
            prompt=self._parts(prompt),
            text=TextSampling(seed=seed, **text),
            image=image_sampling(image, seed),  # type: ignore[arg-type]
            preview_every=preview_every,
            **counts,
        )
        self._check_request(request)
        return request

    def image_request(
        self,
        prompt: Prompt,
        *,
        modality: str = IMAGE,
        seed: int = 0,
        preview_every: int = 0,
        **settings: Unpack[ImageSettings],
    ) -> Request:
        """What `sample` or `sample_media` asks of the engine for one: a checked request, to be submitted to `engine`.

        Args:
            prompt: As in `sample`.
            modality: What is drawn: "image", or a further modality.
            seed: Of what is drawn, from 0 to 2**38 - 1.
            preview_every: As in `stream`.
            **settings: See `ImageSettings`. The size is one of the modality's. Default: its first.

        Raises:
            UserError: As `sample`, and for a modality that is not declared.
        """
        check_at_least(0, preview_every=preview_every)
        sampling, parts = self._sampling(modality, settings, seed), self._parts(prompt)
        self._check_sampling(sampling, [parts])
        return replace(self._image_request(parts, sampling, seed), preview_every=preview_every)

    def check_letters(self, texts: Iterable[str]) -> None:
        """Tell at once what no tokenizing could make fit, which for megabytes takes seconds.

        Args:
            texts: Of one prompt.

        Raises:
            UserError: Where they have more letters than a sequence of the longest pieces.
        """
        letters, limit = sum(map(len, texts)), self.config.data.sequence_length
        if letters > limit * self.tokenizer.longest_piece:
            raise UserError(
                f"a prompt of {letters:,} letters leaves no room in a sequence of {limit} (data.sequence_length);"
                " shorten it"
            )

    def engine(
        self,
        *,
        pages: int | None = None,
        most_requests: int = 64,
        prompt_positions: int | None = None,
        on_image_call: Callable[[], object] | None = None,
        shares_prompts: bool = True,
    ) -> Engine:
        """An engine over this model, for requests that come and go. See `Engine` for what it takes."""
        return Engine(
            self.runner,
            self.tokenizer,
            self.config,
            self.family,
            pages=pages,
            most_requests=most_requests,
            prompt_positions=prompt_positions,
            on_image_call=on_image_call,
            shares_prompts=shares_prompts,
            origin=self.origin,
        )

    def _sampling(self, modality: str, settings: ImageSettings, seed: int) -> ImageSampling:
        """How one of a modality is drawn, of a size of its own. Not checked yet, but for the modality."""
        self._check_modalities([modality])
        sampling = image_sampling(settings, seed)
        size = sampling.size or self.runner.sizes.first_of(modality)
        return replace(sampling, size=size._replace(modality=modality))

    def _image_request(self, parts: Sequence[Part], sampling: ImageSampling, seed: int) -> Request:
        """An image behind parts, both checked."""
        size = sampling.size or self.runner.sizes.first
        image = replace(sampling, seed=seed, size=size)
        return Request(prompt=parts, text=TextSampling(seed=seed), image=image, draws=True)

    def _parts(self, prompt: Prompt | ImageLike | Media) -> list[Part]:
        """Checked parts, images as the network reads them."""
        given = [prompt] if isinstance(prompt, str | Tensor | Image.Image | Media) else prompt
        parts: list[Part] = []
        for part in given:
            if isinstance(part, str):
                check_text(part)
                parts.append(part)
            elif isinstance(part, Media):
                self._check_array(part)
                parts.append(part)
            else:
                parts.append(self._pixels(part))
        self.check_letters(part for part in parts if isinstance(part, str))
        return parts

    def _target(self, target: str | ImageLike | Media) -> Part:
        parts = self._parts(target)
        if len(parts) != 1:
            raise UserError(f"a target is one text or one image, got {len(parts)} parts")
        return parts[0]

    def _pixels(self, image: ImageLike) -> Tensor:
        if isinstance(image, Image.Image):
            return from_image(image, self.config)
        shapes = self.runner.image_shapes
        if image.dtype != torch.uint8 or image.shape not in shapes:
            raise UserError(
                f"an image must be uint8 of shape {' or '.join(str(list(shape)) for shape in shapes)},"
                f" got {image.dtype} of shape {list(image.shape)}"
            )
        return image

    def _check_array(self, media: Media) -> None:
        self._check_modalities([media.modality])
        shapes, values = self.runner.array_shapes(media.modality), media.values
        if not values.is_floating_point() or values.shape not in shapes or not values.isfinite().all():
            raise UserError(
                f"a {media.modality} must be finite floats of shape {' or '.join(str(list(each)) for each in shapes)},"
                f" got {values.dtype} of shape {list(values.shape)}"
            )

    def _check_modalities(self, names: Iterable[str]) -> None:
        known = self.runner.sizes.modalities
        for name in names:
            if name not in known:
                raise UserError(f"this model has no modality {name!r}; choose {' or '.join(known)}")

    def _check_request(self, request: Request) -> None:
        self._check_modalities(request.modalities)
        if not request.modalities:
            raise UserError("modalities names none; for text alone set max_images=0")
        check_at_least(1, max_tokens=request.max_tokens)
        check_at_least(0, max_images=request.max_images)
        for seed in (request.text.seed, request.image.seed):
            check_seeds(seed, 1)
        text_sampling.check(request.text)
        if request.draws or request.max_images or request.image.size is not None:
            image_diffusion.check(request.image, self.config)
            for name in set(request.modalities) - {IMAGE}:
                size = self.runner.sizes.first_of(name)
                image_diffusion.check(replace(request.image, size=size, sampler="auto"), self.config)
            check_text(request.image.negative_prompt)
            self.check_letters([request.image.negative_prompt])

    def _run(
        self,
        requests: Sequence[Request],
        batch: int,
        on_image_call: Callable[[], object] | None = None,
        *,
        shares_prompts: bool = True,
    ) -> Iterator[list[tuple[int, Event]]]:
        """The events of requests, tick by tick, at most `batch` of them at a time, in an engine of their own."""
        engine = self.engine(most_requests=batch, on_image_call=on_image_call, shares_prompts=shares_prompts)
        for request in requests:
            engine.submit(request)
        return _ticks(engine)

    def _draw(
        self,
        prompts: Sequence[Sequence[Part]],
        seeds: Sequence[int],
        sampling: ImageSampling,
        batch: int,
        on_image_call: Callable[[], object] | None,
        *,
        shares_prompts: bool = True,
    ) -> Iterator[dict[int, SampledImage]]:
        """Images by their numbers, as they are finished, each from its own seed."""
        requests = [
            self._image_request(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for events in self._run(requests, batch, on_image_call, shares_prompts=shares_prompts):
            images = {
                number: SampledImage(event.pixels, _texts(prompts[number]), seeds[number], event.recipe)
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
        diffusion = self.runner.diffusion(sampling.size or self.runner.sizes.first)
        calls = batches * self.family.image_calls(sampling, diffusion, patches)
        done = itertools.count()
        return lambda: on_call(next(done), calls)

    def _check_sampling(self, sampling: ImageSampling, prompts: Sequence[Sequence[Part]]) -> None:
        image_diffusion.check(sampling, self.config)
        check_text(sampling.negative_prompt)
        self.check_letters([sampling.negative_prompt])
        check_seeds(sampling.seed, len(prompts))
        size = sampling.size or self.runner.sizes.first
        checked: Sequence[Part] | None = None
        for parts in prompts:
            if parts is checked:
                continue
            checked = parts
            if sampling.guidance != 1 and all(isinstance(part, str) and not part for part in parts):
                raise UserError(
                    f"guidance {sampling.guidance} cannot be applied to an empty prompt: there is nothing to"
                    " guide by; use guidance 1 for images without a caption"
                )
            self._check_length(parts, size)

    def _check_length(
        self, parts: Sequence[Part], size: Size | None = None, *, finished: bool = True
    ) -> None:
        """Of a document of these parts, and an image of this size where there is one."""
        document = segments(parts, self.runner, self.tokenizer)
        if size is not None:
            document.append(self.runner.image(size))
        length = len(self.runner.lay_out(document, finished=finished))
        limit = self.config.data.sequence_length
        if length > limit:
            what = "a prompt and its image take" if size else "a document takes"
            said = _texts(parts)
            which = f" that begins {said[:60]!r}" if said else ""
            raise UserError(
                f"{what} {length} positions, more than data.sequence_length {limit}; shorten the one{which}"
            )


# Settings of answers that are none of images.
_ANSWER_ONLY = ("max_tokens", "max_images", "temperature", "top_p", "modalities")


def _texts(parts: Sequence[Part]) -> str:
    return " ".join(part for part in parts if isinstance(part, str))


def _ticks(engine: Engine) -> Iterator[list[tuple[int, Event]]]:
    while not engine.is_idle:
        yield engine.tick()
