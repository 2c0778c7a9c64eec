"""Free generation: rows speak until <BOI>, are drawn together, are read again clean, and go on speaking.

R rows at hand, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.errors import UserError
from transfusion.families import ImageGenerator
from transfusion.inference.cache import KeyValueCache
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.runner import ModelRunner
from transfusion.inference.text_sampling import TextSampling, mask_logits, sample_token
from transfusion.schema import Segment, SpecialToken, TextSegment
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer

# An image is uint8 [C, H, W].
Part = str | Tensor

# Images of one row draw from keys this far apart: the first has the row's own seed, as a single image would.
_IMAGE_KEY_STRIDE = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """For each row: text tokens and images to generate, and positions altogether, the prompt included."""

    tokens: int
    images: int
    length: int


@dataclass(slots=True)
class _Row:
    """One answer in the making. `number` is its place in the request, which its random draws depend on.

    size: of the image that it waits for. None: it decodes, unless it is done.
    """

    number: int
    done: bool = False
    size: Size | None = None
    parts: list[list[int] | Tensor] = field(default_factory=list)
    tokens: int = 0
    images: int = 0

    def say(self, token: int) -> None:
        if not self.parts or isinstance(self.parts[-1], Tensor):
            self.parts.append([])
        text = self.parts[-1]
        assert isinstance(text, list)
        text.append(token)
        self.tokens += 1


class InterleavedGenerator:
    """Continues a batch of prompts, ragged and of any mixture."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        diffusion: DiffusionConfig,
        draw_images: ImageGenerator,
        *,
        text: TextSampling,
        image: ImageSampling,
        limits: Limits,
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.diffusion, self.draw_images = diffusion, draw_images
        self.text, self.image, self.limits = text, image, limits
        # Of drawn images, by what begins them.
        self._size_by_begin_token = {
            token: size
            for token, size in runner.sizes.size_by_begin_token.items()
            if image.size in (None, size)
        }

    def run(self, prompts: Sequence[Sequence[Part]], first_row: int) -> list[list[Part]]:
        """What each prompt is continued with. `first_row` is the first prompt's number in the request."""
        rows = [_Row(first_row + place) for place in range(len(prompts))]
        cache, state_BD = self._read_prompts(prompts)
        while True:
            left = [place for place, row in enumerate(rows) if not row.done]
            decoding = [place for place in left if rows[place].size is None]
            # Images wait until no row decodes, so that as many as possible are drawn in one batch.
            if decoding:
                self._decode_step(rows, decoding, cache, state_BD)
            elif left:
                self._draw(rows, left, cache, state_BD)
            else:
                return [
                    [part if isinstance(part, Tensor) else self.tokenizer.decode(part) for part in row.parts]
                    for row in rows
                ]

    def _read_prompts(self, prompts: Sequence[Sequence[Part]]) -> tuple[KeyValueCache, Tensor]:
        """The cache that holds the prompts, and the state [B, D] that the first new tokens are read from."""
        layouts = [self.runner.lay_out(self._segments(parts), finished=False) for parts in prompts]
        counts = [len(layout) for layout in layouts]
        if max(counts) >= self.limits.length:
            raise UserError(
                f"a prompt of {max(counts)} tokens and patches leaves no room in a sequence of"
                f" {self.limits.length} (data.sequence_length)"
            )
        most = max(map(self.runner.sizes.patches, self._size_by_begin_token.values()))
        new = self.limits.tokens + self.limits.images * (most + 2)
        cache = self.runner.cache(len(prompts), min(max(counts) + new, self.limits.length))
        images = [part for parts in prompts for part in parts if isinstance(part, Tensor)]
        return cache, self.runner.read(cache.view(), self.runner.prefix_block(layouts, counts, images))

    def _segments(self, parts: Sequence[Part]) -> list[Segment]:
        return [
            self.runner.image(Size(*part.shape[1:]), part)
            if isinstance(part, Tensor)
            else TextSegment(tuple(self.tokenizer.encode(part)))
            for part in parts
        ]

    def _decode_step(
        self, rows: list[_Row], decoding: list[int], cache: KeyValueCache, state_BD: Tensor
    ) -> None:
        """One token for each decoding row; updates the rows' states in place."""
        lengths = [cache.lengths[place] for place in decoding]
        chosen = self._sample_tokens([rows[place] for place in decoding], lengths, state_BD[decoding])
        reading = []
        for place, token in zip(decoding, chosen, strict=True):
            row = rows[place]
            if token == SpecialToken.END_DOCUMENT:
                row.done = True
            elif token in self._size_by_begin_token:
                row.size = self._size_by_begin_token[token]
            else:
                row.say(token)
                full = cache.lengths[place] + 1 >= self.limits.length
                row.done = full or row.tokens == self.limits.tokens
            if not row.done:
                reading.append((place, token))
        if reading:
            places = [place for place, _ in reading]
            view = cache.view(places)
            block = self.runner.token_block([token for _, token in reading], view.lengths)
            state_BD[places] = self.runner.read(view, block)

    def _sample_tokens(self, rows: list[_Row], lengths: list[int], state_RD: Tensor) -> list[int]:
        patches_K = [self.runner.sizes.patches(size) for size in self._size_by_begin_token.values()]
        image_allowed_RK = torch.tensor(
            [
                [
                    row.images < self.limits.images and length + patches + 2 <= self.limits.length
                    for patches in patches_K
                ]
                for row, length in zip(rows, lengths, strict=True)
            ],
            device=state_RD.device,
        )
        logit_RV = self.runner.logits(state_RD)
        logit_RV = mask_logits(
            logit_RV, self.tokenizer.vocabulary, list(self._size_by_begin_token), image_allowed_RK
        )
        numbers, indices = [row.number for row in rows], [row.tokens + row.images for row in rows]
        chosen: list[int] = sample_token(logit_RV, self.text, numbers, indices).tolist()
        return chosen

    def _draw(self, rows: list[_Row], waiting: list[int], cache: KeyValueCache, state_BD: Tensor) -> None:
        """Images of one size for waiting rows, read again as the images they became; updates states in place."""
        size = rows[waiting[0]].size
        assert size is not None
        waiting = [place for place in waiting if rows[place].size == size]
        image = replace(self.image, size=size)
        keys = [
            self.image.seed + row.number + row.images * _IMAGE_KEY_STRIDE
            for row in (rows[place] for place in waiting)
        ]
        drawn = self.draw_images(self.runner, cache, waiting, keys, image, self.diffusion)
        codec = self.runner.codec
        for place, pixels_CHW in zip(waiting, codec.decode(drawn).cpu(), strict=True):
            row = rows[place]
            row.parts.append(pixels_CHW)
            row.images += 1
            row.size = None
            row.done = cache.lengths[place] + self.runner.sizes.patches(size) + 1 >= self.limits.length
        view = cache.view(waiting)
        block = self.runner.image_block(codec.as_context(drawn), view.lengths, size)
        state_BD[waiting] = self.runner.read(view, block)
