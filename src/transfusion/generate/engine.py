"""The engine: requests enter and leave at any tick, and text and images are made side by side.

A tick reads prompts, says one token of every answer that speaks, and takes one denoising step of every image under way.
All keys and values are in one paged cache, written in place. An image under guidance has a second row, without a
caption. An answer depends on its request alone, not on the others that it shares ticks with.

R rows of one forward, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.families import Family, ImageDrawing
from transfusion.files import digest
from transfusion.generate.events import (
    Done,
    Event,
    ImageDone,
    ImagePreview,
    ImageStart,
    MediaDone,
    Reason,
    TextDelta,
)
from transfusion.generate.recipe import Origin, Recipe
from transfusion.generate.request import Request, media, segments, values
from transfusion.inference.cache import PagedCache, Row, pages_for
from transfusion.inference.image_diffusion import sampler_name
from transfusion.inference.runner import Media, ModelRunner
from transfusion.inference.text_sampling import mask_logits, sample_token
from transfusion.schema import SpecialToken
from transfusion.sequence.layout import Integers, Layout
from transfusion.sequence.sizes import IMAGE, Size
from transfusion.sequence.tokenizer import Tokenizer

# Images of one answer draw from keys this far apart: the first has the request's own seed, as a single image would.
_IMAGE_KEY_STRIDE = 1 << 32
# At least so many prompts are kept to be begun with again, as long as there is room.
_PROMPTS_KEPT = 32


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt that is read, or has been.

    Attributes:
        layout: Its positions and, where an image follows at once, those of the image.
        count: Positions to read.
        images: In them, with arrays of other modalities.
        content_S: int64 [count], equal where tokens and images are.
        row: Where it is read to, from the beginning on `row.length` positions.
        state_D: The state of the last position, once it is read.
    """

    layout: Layout
    count: int
    images: list[Tensor | Media]
    content_S: Integers
    row: Row
    state_D: Tensor | None = None

    def common(self, other: _Prompt) -> int:
        """How many positions both begin with, none of which sees more."""
        length = min(self.count, other.count)
        differs = np.flatnonzero(self.content_S[:length] != other.content_S[:length])
        return self.cut(int(differs[0]) if len(differs) else length)

    def cut(self, length: int) -> int:
        """The greatest number of positions, up to `length`, after which no image is cut in two."""
        for first, patches in self.layout.images:
            if first < length < first + patches:
                return first
        return length

    def unread(self) -> int:
        """How many positions are left to read."""
        return self.count - self.row.length

    def following(self, most: int) -> int:
        """Up to where the next piece of about `most` positions is read, at least one image or one position."""
        begin = self.row.length
        end = self.cut(min(begin + most, self.count))
        for first, patches in self.layout.images:
            if first == begin == end:
                end = first + patches
        return end


@dataclass(slots=True, eq=False)
class _Task:
    """An answer in the making.

    Attributes:
        number: What the engine's user knows it by.
        prompt: What is answered. Its row goes on as the answer's.
        bare: The second row of its images, for what guidance leads away from.
        room: Positions that prompt and answer may fill.
        bare_room: Positions that the second row may fill. 0 where no image will be guided.
        bare_size: Of the image that the second row is ready for.
        token_ids: Of the text that is not told yet.
        in_text: Whether text stands before it, of the prompt or told.
        size: Of the image that it makes, None while it speaks.
        drawing: That image, once it is begun.
        unread: What the codec made of a finished image that is not read yet.
    """

    number: int
    request: Request
    prompt: _Prompt
    room: int
    bare_room: int
    bare: Row = field(default_factory=Row)
    bare_size: Size | None = None
    state_D: Tensor | None = None
    token_ids: list[int] = field(default_factory=list)
    in_text: bool = False
    tokens: int = 0
    images: int = 0
    size: Size | None = None
    drawing: ImageDrawing | None = None
    unread: Tensor | None = None

    @property
    def row(self) -> Row:
        return self.prompt.row

    @property
    def is_read(self) -> bool:
        return self.prompt.state_D is not None


class Engine:
    """Answers requests side by side.

    Args:
        runner: The network, with its codec and sizes.
        tokenizer: The model's.
        config: The model's.
        family: The model's.
        pages: Of the cache. None: as many as those requests take that are submitted before the first tick.
        most_requests: How many are under way at a time. Others wait in their order.
        prompt_positions: A tick reads prompts that are short enough up to this many positions together, and about as
            many of longer ones, so that a long prompt keeps nobody waiting. None reads all at once.
        on_image_call: Called before each call of the model that draws. What it raises ends the tick.
        shares_prompts: Whether what prompts begin with in common is read once. Without, requests that are let in
            together are read in one call, whatever their prompts.
        origin: The weights, as the recipes of images name them.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        config: Config,
        family: Family,
        *,
        pages: int | None = None,
        most_requests: int = 64,
        prompt_positions: int | None = None,
        on_image_call: Callable[[], object] | None = None,
        shares_prompts: bool = True,
        origin: Origin | None = None,
    ) -> None:
        self.runner, self.tokenizer, self.config, self.family = runner, tokenizer, config, family
        self.most_requests, self.prompt_positions = most_requests, prompt_positions
        self._on_image_call, self._shares_prompts = on_image_call, shares_prompts
        self.pages, self.origin = pages, origin or Origin()
        self._cache: PagedCache | None = None
        self._sizes = list(runner.sizes.all)
        self._begin_tokens = [runner.sizes.begin_token(size) for size in self._sizes]
        self._waiting: list[_Task] = []
        self._tasks: list[_Task] = []
        self._kept: list[_Prompt] = []
        self._events: list[tuple[int, Event]] = []
        self._submitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do, nor to tell."""
        return not (self._waiting or self._tasks or self._events)

    def submit(self, request: Request) -> int:
        """Take a request.

        Returns:
            The number that its events come with.

        Raises:
            UserError: For a prompt or negative prompt that fills the row, a request that the cache could never hold, or
                previews of a codec that has none.
        """
        if request.preview_every and self.config.codec.kind != "vq":
            # So that what is missing is told before anything is drawn.
            self.runner.check_previews()
        task = self._task(request)
        needs = _needs(task)
        if self.pages is not None and needs > self.pages:
            raise UserError(
                f"a request of {task.room} positions takes {needs} pages of the cache, which has {self.pages};"
                " ask for fewer tokens or images"
            )
        self._waiting.append(task)
        self._submitted += 1
        return task.number

    def cancel(self, number: int) -> None:
        """End a request now. Its pages are free at once. One that has ended is left alone."""
        for task in [*self._waiting, *self._tasks]:
            if task.number == number:
                if task in self._waiting:
                    self._waiting.remove(task)
                    self._tell(task, self._summary(task, "cancelled"))
                else:
                    self._end(task, "cancelled")

    @torch.no_grad()
    def tick(self) -> list[tuple[int, Event]]:
        """Take one step of everything under way.

        Returns:
            What came of it: events with the numbers of their requests.
        """
        if self._cache is None and self._waiting:
            self.pages = self.pages or self._pages_of_the_waiting()
            self._cache = self.runner.cache(self.pages)
        self._admit()
        self._read_prompts()
        # Those that waited for a prompt that is read now. Where all is read at once, they are too.
        while self._admit() and self.prompt_positions is None:
            self._read_prompts()
        self._read_finished_images()
        self._speak()
        self._read_negative_prompts()
        self._draw()
        events, self._events = self._events, []
        return events

    @property
    def cache(self) -> PagedCache:
        """The memory of all rows, from the first request that was let in."""
        assert self._cache is not None
        return self._cache

    # Requests come and go

    def _task(self, request: Request) -> _Task:
        size = request.image.size or self.runner.sizes.first
        parts = segments(request.prompt, self.runner, self.tokenizer)
        if request.draws:
            parts.append(self.runner.image(size))
        layout = self.runner.lay_out(parts, finished=False)
        limit = self.config.data.sequence_length
        count = layout.images[-1][0] if request.draws else len(layout)
        patches = [self.runner.sizes.patches(size) for size in self._allowed_sizes(request)]
        taken = count + patches[0] if request.draws else count + 1
        if taken > limit:
            raise UserError(
                f"a prompt of {count} tokens and patches leaves no room in a sequence of {limit}"
                " (data.sequence_length); shorten it"
            )
        if request.draws:
            room = taken
        else:
            room = min(count + request.max_tokens + request.max_images * (max(patches) + 2), limit)
        images = media(request.prompt)
        prompt = _Prompt(layout, count, images, _content(layout, count, images), Row())
        in_text = bool(request.prompt) and isinstance(request.prompt[-1], str) and request.prompt[-1] != ""
        return _Task(self._submitted, request, prompt, room, self._bare_room(request), in_text=in_text)

    def _bare_room(self, request: Request) -> int:
        """Positions of the second row of a request's images, 0 if it needs none."""
        if request.image.guidance == 1 or not (request.draws or request.max_images):
            return 0
        sizes, limit = self._allowed_sizes(request), self.config.data.sequence_length
        room = max(len(self._negative_layout(request, size)) for size in sizes)
        if room > limit:
            raise UserError(
                f"a negative prompt and its image take {room} positions, more than data.sequence_length {limit};"
                " shorten it"
            )
        return room

    def _negative_layout(self, request: Request, size: Size) -> Layout:
        """What guidance leads away from, as in training with a dropped caption, and an image of this size."""
        negative = request.image.negative_prompt
        before = segments([negative] if negative else [], self.runner, self.tokenizer)
        return self.runner.lay_out([*before, self.runner.image(size)], finished=False)

    def _allowed_sizes(self, request: Request) -> list[Size]:
        """Those that the answer may have. One that draws at once has its own."""
        chosen = request.image.size
        if request.draws:
            return [chosen or self.runner.sizes.first]
        return [
            size
            for size in self._sizes
            if size.modality in request.modalities and (chosen in (None, size) or size.modality != IMAGE)
        ]

    def _pages_of_the_waiting(self) -> int:
        """What so many as can be under way take at most, with a page for each prompt that is kept."""
        greatest = sorted(map(_needs, self._waiting), reverse=True)[: self.most_requests]
        return sum(greatest) + len(greatest)

    def _admit(self) -> bool:
        """Let waiting requests in, first come first served, as far as there is room. Returns whether any was.

        One that begins as another that is being read waits for that, and lets others pass.
        """
        passed, under_way = [], len(self._tasks)
        while self._waiting and len(self._tasks) < self.most_requests:
            task = self._waiting.pop(0)
            if self._is_being_read(task.prompt):
                passed.append(task)
                continue
            if not self._make_room(_needs(task)):
                passed.append(task)
                break
            self._begin(task)
        self._waiting = passed + self._waiting
        return len(self._tasks) > under_way

    def _is_being_read(self, prompt: _Prompt) -> bool:
        """Whether a task under way will soon have read more of what this one begins with than any kept one has."""
        if not self._shares_prompts:
            return False
        reading = [task.prompt.common(prompt) for task in self._tasks if not task.is_read]
        kept = [known.common(prompt) for known in self._kept]
        most = max(reading, default=0)
        worth = most == prompt.count or pages_for(most + 1) > 1
        return worth and most > max(kept, default=0)

    def _make_room(self, pages: int) -> bool:
        """Whether so many pages are free, without prompts that were only kept."""
        while self.cache.free_pages < pages and self._kept:
            self.cache.release(self._kept.pop(0).row)
        return self.cache.free_pages >= pages

    def _begin(self, task: _Task) -> None:
        prompt = task.prompt
        known = max(self._kept, key=prompt.common, default=None)
        common = 0 if known is None else known.common(prompt)
        if known is not None and common:
            self._kept.remove(known)
            self._kept.append(known)
            whole = common == prompt.count == known.count
            # The last position is read again, where nobody kept its state.
            common = common if whole else prompt.cut(min(common, prompt.count - 1))
            prompt.row = self.cache.fork(known.row, task.room, common)
            prompt.state_D = known.state_D if whole else None
        else:
            prompt.row = self.cache.row(task.room)
        task.bare = self.cache.row(task.bare_room)
        self._tasks.append(task)
        if task.is_read:
            self._start_answer(task)

    def _end(self, task: _Task, reason: Reason) -> None:
        self._tasks.remove(task)
        self.cache.release(task.row)
        self.cache.release(task.bare)
        self._tell_text(task, complete=True)
        self._tell(task, self._summary(task, reason))

    def _summary(self, task: _Task, reason: Reason) -> Done:
        return Done(reason, task.prompt.count, task.tokens, task.images)

    def _tell(self, task: _Task, event: Event) -> None:
        self._events.append((task.number, event))

    # Reading

    def _read_prompts(self) -> None:
        """The next pieces of prompts in one call."""
        pieces = self._next_pieces([task.prompt for task in self._tasks if not task.is_read])
        if not pieces:
            return
        images = [
            image
            for prompt, end in pieces
            for image, (first, _) in zip(prompt.images, prompt.layout.images, strict=False)
            if prompt.row.length <= first < end
        ]
        block = self.runner.prompt_block(
            [(prompt.layout, prompt.row.length, end) for prompt, end in pieces], images
        )
        view = self.cache.view([prompt.row for prompt, _ in pieces])
        for (prompt, end), state_D in zip(pieces, self.runner.read(view, block), strict=True):
            if end == prompt.count:
                prompt.state_D = state_D
        for task in self._tasks:
            if task.is_read and task.state_D is None and task.drawing is None and task.size is None:
                self._keep(task.prompt)
                self._start_answer(task)

    def _next_pieces(self, unread: Sequence[_Prompt]) -> list[tuple[_Prompt, int]]:
        """Prompts and up to where each is read now.

        What is short does not wait behind what is long: prompts that can be read to their ends are, the shortest
        first, and then the others in their order. Both have as many positions as the engine reads in a tick.
        """
        if self.prompt_positions is None:
            return [(prompt, prompt.count) for prompt in unread]
        pieces: dict[_Prompt, int] = {}
        left = self.prompt_positions
        for prompt in sorted(unread, key=_Prompt.unread):
            left -= prompt.unread()
            if left < 0:
                break
            pieces[prompt] = prompt.count
        left = self.prompt_positions
        for prompt in unread:
            if left > 0 and prompt not in pieces:
                pieces[prompt] = prompt.following(left)
                left -= pieces[prompt] - prompt.row.length
        return list(pieces.items())

    def _keep(self, prompt: _Prompt) -> None:
        """Keep a prompt that was just read, if there is a page for its last positions."""
        if not self._shares_prompts:
            return
        if self.cache.free_pages and not any(
            np.array_equal(known.content_S, prompt.content_S) for known in self._kept
        ):
            row = self.cache.fork(prompt.row, prompt.count)
            self._kept.append(_Prompt(prompt.layout, prompt.count, [], prompt.content_S, row, prompt.state_D))
        if len(self._kept) > max(_PROMPTS_KEPT, self.most_requests):
            self.cache.release(self._kept.pop(0).row)

    def _start_answer(self, task: _Task) -> None:
        task.state_D = task.prompt.state_D
        if task.request.draws:
            task.size = task.request.image.size or self.runner.sizes.first

    def _read_finished_images(self) -> None:
        """Images that were drawn, read as the clean images that they became. One call for each size."""
        for size in self._sizes:
            tasks = [task for task in self._tasks if task.unread is not None and task.size == size]
            if not tasks:
                continue
            view = self.cache.view([task.row for task in tasks])
            encoded = torch.stack([task.unread for task in tasks if task.unread is not None])
            block = self.runner.image_block(self.runner.as_context(encoded, size), view.lengths, size)
            for task, state_D in zip(tasks, self.runner.read(view, block), strict=True):
                task.state_D, task.size, task.unread = state_D, None, None

    # Text

    def _speak(self) -> None:
        """One token of every answer that speaks, and the states behind them."""
        tasks = [task for task in self._tasks if task.is_read and task.size is None]
        if not tasks:
            return
        reading: list[tuple[_Task, int]] = []
        for task, token in zip(tasks, self._choose(tasks), strict=True):
            if token == SpecialToken.END_DOCUMENT:
                self._end(task, "end")
                continue
            if token in self._begin_tokens:
                self._tell_text(task, complete=True)
                task.size = self._sizes[self._begin_tokens.index(token)]
                task.in_text = False
            else:
                task.token_ids.append(token)
                task.tokens += 1
                self._tell_text(task)
                if task.tokens == task.request.max_tokens:
                    self._end(task, "tokens")
                    continue
                if task.row.length + 1 >= self.config.data.sequence_length:
                    self._end(task, "length")
                    continue
            reading.append((task, token))
        if reading:
            view = self.cache.view([task.row for task, _ in reading])
            state_RD = self.runner.read_tokens(view, [token for _, token in reading])
            for (task, _), state_D in zip(reading, state_RD, strict=True):
                task.state_D = state_D

    def _choose(self, tasks: Sequence[_Task]) -> list[int]:
        state_RD = torch.stack([task.state_D for task in tasks if task.state_D is not None])
        allowed_RK = torch.tensor(
            [[self._may_begin(task, size) for size in self._sizes] for task in tasks], device=state_RD.device
        )
        logit_RV = self.runner.logits(state_RD)
        logit_RV = mask_logits(logit_RV, self.tokenizer.vocabulary, self._begin_tokens, allowed_RK)
        indices = [task.tokens + task.images for task in tasks]
        chosen: list[int] = sample_token(logit_RV, [task.request.text for task in tasks], indices).tolist()
        return chosen

    def _may_begin(self, task: _Task, size: Size) -> bool:
        request = task.request
        if task.images >= request.max_images or size not in self._allowed_sizes(request):
            return False
        ends = task.row.length + self.runner.sizes.patches(size) + 2
        return ends <= self.config.data.sequence_length

    def _tell_text(self, task: _Task, *, complete: bool = False) -> None:
        """Tell what was said. The bytes of a letter that is not complete wait, unless nothing follows them."""
        text = self.tokenizer.decode(task.token_ids, continues=task.in_text) if task.token_ids else ""
        if text and (complete or not text.endswith("\ufffd")):
            self._tell(task, TextDelta(text))
            task.token_ids, task.in_text = [], True

    # Images

    def _read_negative_prompts(self) -> None:
        """The second rows of images that begin, in one call. That of an image before may serve again."""
        tasks = [task for task in self._tasks if task.bare_room and task.size not in (None, task.bare_size)]
        pieces = []
        for task in tasks:
            assert task.size is not None
            layout = self._negative_layout(task.request, task.size)
            pieces.append((layout, 0, layout.images[0][0]))
            task.bare.length, task.bare_size = 0, task.size
        if pieces:
            view = self.cache.view([task.bare for task in tasks])
            self.runner.read(view, self.runner.prompt_block(pieces))

    def _draw(self) -> None:
        """One call of the model for every image under way, and what is finished by it."""
        tasks = [task for task in self._tasks if task.size is not None and task.unread is None]
        groups: dict[Hashable, list[ImageDrawing]] = {}
        for task in tasks:
            task.drawing = task.drawing or self._begin_image(task)
            groups.setdefault(task.drawing.group, []).append(task.drawing)
        for drawings in groups.values():
            if self._on_image_call is not None:
                self._on_image_call()
            self.family.advance(self.runner, self.cache, drawings)
        for task in tasks:
            self._preview(task)
        for size in self._sizes:
            finished = [
                (task, task.drawing.result)
                for task in tasks
                if task.size == size and task.drawing is not None and task.drawing.result is not None
            ]
            if finished:
                decoded = self.runner.decode(torch.stack([result for _, result in finished]), size).cpu()
                for (task, result), values_CHW in zip(finished, decoded, strict=True):
                    self._finish_image(task, result, values_CHW)

    def _preview(self, task: _Task) -> None:
        drawing, every = task.drawing, task.request.preview_every
        if (
            task.size is None
            or task.size.modality != IMAGE
            or drawing is None
            or every == 0
            or drawing.calls % every
            or drawing.result is not None
        ):
            return
        if (clean_CHW := drawing.preview) is not None:
            pixels = self.runner.codec.preview(clean_CHW[None])[0].cpu()
            self._tell(task, ImagePreview(task.images, drawing.calls, pixels))

    def _begin_image(self, task: _Task) -> ImageDrawing:
        size, rows = task.size, [task.row, *([task.bare] if task.bare_room else [])]
        assert size is not None
        sampling = replace(task.request.image, size=size, seed=self._image_key(task))
        if size.modality != IMAGE and not task.request.draws:
            # It was chosen, and checked, for images.
            sampling = replace(sampling, sampler="auto")
        drawing = self.family.drawing(self.runner, self.runner.diffusion(size), sampling, rows)
        if size.modality == IMAGE:
            self._tell(task, ImageStart(task.images, size, drawing.all_calls))
        return drawing

    def _image_key(self, task: _Task) -> int:
        return task.request.image.seed + task.images * _IMAGE_KEY_STRIDE

    def _finish_image(self, task: _Task, encoded: Tensor, values_CHW: Tensor) -> None:
        assert task.size is not None
        if task.size.modality == IMAGE:
            sampler = sampler_name(task.request.image, self.config.diffusion)
            recipe = Recipe.of(task.request, task.images, values_CHW, self.origin, sampler)
            self._tell(task, ImageDone(task.images, values_CHW, self._image_key(task), recipe))
        else:
            made = Media(task.size.modality, values_CHW)
            self._tell(task, MediaDone(task.images, made, self._image_key(task)))
        task.images += 1
        task.drawing = None
        if task.request.draws:
            self._end(task, "image")
            return
        ends = task.row.length + self.runner.sizes.patches(task.size) + 1
        if ends >= self.config.data.sequence_length:
            self._end(task, "length")
            return
        task.unread = encoded


def _needs(task: _Task) -> int:
    """Pages of a task."""
    return pages_for(task.room) + pages_for(task.bare_room)


def _content(layout: Layout, count: int, images: Sequence[Tensor | Media]) -> Integers:
    """int64 [count]: the tokens, and for the patches of an image a number of its pixels."""
    content_S = layout.token_ids_S[:count].copy()
    for image, (first, patches) in zip(images, layout.images, strict=False):
        pixels = values(image).cpu().contiguous().numpy().tobytes()
        number = int(digest(pixels, 7), 16) + (1 << 56)
        content_S[first : first + patches] = number
    return content_S
