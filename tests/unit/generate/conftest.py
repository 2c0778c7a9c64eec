"""A pipeline over a small talkative model, and the plain truth: one row, no cache, everything read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transfusion.codec import pixels as codec
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.sampler import sample
from transfusion.generate import Pipeline
from transfusion.inference.cache import PagedCache, Row
from transfusion.inference.image_diffusion import ImageSampling, build_sampler
from transfusion.model.patches import Encoding, unpatchify_groups
from transfusion.schema import Batch, ImageSegment, Segment, SpecialToken, TextSegment
from transfusion.sequence.layout import Layout


def read_prompts(
    pipeline: Pipeline, prompts: Sequence[tuple[Layout, int, list[Tensor]]]
) -> tuple[PagedCache, list[Row]]:
    """A cache with the first positions of some documents, in which these images are."""
    runner = pipeline.runner
    cache = runner.cache(100)
    rows = [cache.row(count + 32) for _, count, _ in prompts]
    pieces = [(layout, 0, count) for layout, count, _ in prompts]
    runner.read(
        cache.view(rows), runner.prompt_block(pieces, [image for *_, images in prompts for image in images])
    )
    return cache, rows


def draw_latents(
    pipeline: Pipeline, cache: PagedCache, rows: Sequence[Row], keys: Sequence[int], sampling: ImageSampling
) -> list[Tensor]:
    """Latents [C, H, W] of images behind rows, drawn side by side."""
    runner, size = pipeline.runner, pipeline.runner.sizes.first
    layout = runner.lay_out([runner.image(size)], finished=False)
    drawings = []
    for row, key in zip(rows, keys, strict=True):
        branches = [row]
        if sampling.guidance != 1:
            branches.append(cache.row(20))
            runner.read(cache.view(branches[1:]), runner.prompt_block([(layout, 0, 2)]))
        diffusion = pipeline.config.diffusion
        of_key = replace(sampling, seed=key)
        drawings.append(pipeline.family.drawing(runner, diffusion, of_key, branches))
    while drawings[0].result is None:
        pipeline.family.advance(runner, cache, drawings)
    return [drawing.result for drawing in drawings]


class Truth:
    """What generation must equal, by the training forward alone: `model.embed`, `run_blocks`, no cache."""

    def __init__(self, pipeline: Pipeline, pack: Callable[..., Batch]) -> None:
        self.config, self.model = pipeline.config, pipeline.runner.model
        self.tokenizer, self._pack = pipeline.tokenizer, pack

    @torch.no_grad()
    def states(
        self, segments: Sequence[Segment], latents: Sequence[Tensor], timesteps: Sequence[int]
    ) -> Tensor:
        """Final states [S, D] of one document, images given as latents [C, H, W] at their timesteps."""
        return self._states(segments, latents, timesteps)[0]

    @torch.no_grad()
    def _states(
        self, segments: Sequence[Segment], latents: Sequence[Tensor], timesteps: Sequence[int]
    ) -> tuple[Tensor, Encoding]:
        nothing = np.zeros((1, 8, 8), np.uint8)
        plain = [ImageSegment(nothing, s.patches) if isinstance(s, ImageSegment) else s for s in segments]
        batch = self._pack(self.config, [[plain]], timesteps=timesteps or None)
        given = [torch.stack(list(latents))] if latents else [torch.zeros(1, 1, 8, 8)]
        encoding = self.model.encode_patches(given, batch.media[0].timestep_I)
        hidden_BSD = self.model.embed(batch, encoding.patch_ND)
        grouping = self.model.grouping_of(batch)
        hidden_BSD = self.model.run_blocks(hidden_BSD, batch.position_BSA, batch.mask, grouping=grouping)
        return self.model.norm(hidden_BSD[0]), encoding

    def noise(
        self, segments: Sequence[Segment], latents: Sequence[Tensor], timesteps: Sequence[int], first: int
    ) -> Tensor:
        """Predicted noise [1, C, H, W] of the image whose first patch stands at `first`."""
        state_SD, encoding = self._states(segments, latents, timesteps)
        # The decoder, too, sees all images of the document; the one asked for is the last.
        firsts = [first - back for back in self._distances(segments)]
        states = torch.cat([state_SD[start : start + 16] for start in firsts])
        predicted_NE = self.model.decode_patches(states, encoding)
        return unpatchify_groups(predicted_NE, [torch.stack(list(latents))])[0][-1:]

    @staticmethod
    def _distances(segments: Sequence[Segment]) -> list[int]:
        """How far before the last segment, an image, each image begins."""
        lengths = [len(s.token_ids) if isinstance(s, TextSegment) else 18 for s in segments]
        return [sum(lengths[number:-1]) for number, s in enumerate(segments) if isinstance(s, ImageSegment)]

    @torch.no_grad()
    def draw(
        self,
        segments: list[Segment],
        clean: list[Tensor],
        key: int,
        *,
        guidance: float,
        steps: int,
        sampler: str,
    ) -> Tensor:
        """Latent [C, H, W] of an image behind the segments."""
        image = ImageSegment(None, 16)
        first = 2 + sum(len(s.token_ids) if isinstance(s, TextSegment) else 18 for s in segments)
        sampling = ImageSampling(steps=steps, sampler=sampler)  # type: ignore[arg-type]
        key_I = torch.tensor([key])

        def predict(latent: Tensor, timestep: float) -> Tensor:
            at, known = int(timestep), [0] * len(clean)
            assert at == timestep, "documents here have whole timesteps"
            noise = self.noise([*segments, image], [*clean, latent[0]], [*known, at], first)
            if guidance != 1:
                unconditional = self.noise([image], [latent[0]], [at], 2)
                noise = unconditional + guidance * (noise - unconditional)
            return noise

        plan = build_sampler(sampling, self.config.diffusion, clip=1.0)
        latent = sample(plan, counter_normal(key_I, (1, 8, 8)), predict, key_I)
        return latent[0]

    @torch.no_grad()
    def generate(
        self,
        parts: Sequence[str | Tensor],
        *,
        max_tokens: int,
        max_images: int,
        seed: int = 0,
        **drawing: Any,
    ) -> tuple[list[int], list[Tensor]]:
        """Greedy continuation: all new ids, <BOI> and <EOS> among them, and the new images."""
        segments: list[Segment] = []
        clean: list[Tensor] = []
        for part in parts:
            if isinstance(part, str):
                segments.append(TextSegment(tuple(self.tokenizer.encode(part))))
            else:
                segments.append(ImageSegment(None, 16))
                clean.append(codec.encode(part))
        ids: list[int] = []
        images: list[Tensor] = []
        said = 0
        while said < max_tokens:
            state_SD = self.states(segments, clean, [0] * len(clean))
            length = 1 + sum(len(s.token_ids) if isinstance(s, TextSegment) else 18 for s in segments)
            logit_V = self.model.lm_head(state_SD[length - 1 : length])[0]
            allowed = [SpecialToken.END_DOCUMENT, *range(len(SpecialToken), self.tokenizer.vocabulary)]
            if len(images) < max_images:
                allowed.append(SpecialToken.BEGIN_IMAGE)
            token = max(allowed, key=lambda token: logit_V[token].item())
            ids.append(int(token))
            if token == SpecialToken.END_DOCUMENT:
                break
            if token == SpecialToken.BEGIN_IMAGE:
                key = seed + (len(images) << 32)
                image = codec.decode(self.draw(segments, clean, key, **drawing))
                images.append(image)
                clean.append(codec.encode(image))
                segments.append(ImageSegment(None, 16))
            else:
                said += 1
                segments.append(TextSegment((int(token),)))
        return ids, images


@pytest.fixture
def truth(pack: Callable[..., Batch]) -> Callable[[Pipeline], Truth]:
    return lambda pipeline: Truth(pipeline, pack)
