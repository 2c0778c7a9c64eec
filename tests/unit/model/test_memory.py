"""Nothing in training grows with the square of a row, or with all tokens times the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from transfusion.config import Config
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model import Transfusion
from transfusion.model.attention import PlainAttention
from transfusion.schema import Batch, ImageSegment, TextSegment

LENGTH, VOCABULARY, PATCHES, CHUNK = 1024, 512, 64, 64


def max_allocation(work: Callable[[], object]) -> int:
    """Bytes of the largest tensor or buffer that `work` allocates, inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    events = watched.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


@pytest.fixture
def step(
    build_model: Callable[..., tuple[Config, Transfusion]], pack: Callable[..., Batch], make_image: Any
) -> Callable[[str, int], None]:
    """step(attention, loss_chunk_size): both losses and their gradients on one long row."""

    def run(attention: str, loss_chunk_size: int) -> None:
        config, model = build_model(
            sequence_length=LENGTH, image_size=16, vocabulary=VOCABULARY, hidden_size=32, ffn_size=64
        )
        for block in model.blocks:
            block.attention.attend = PlainAttention(attention)
        model.lm_head.chunk = loss_chunk_size
        image = [ImageSegment(make_image(seed, 16), PATCHES) for seed in range(3)]
        text = TextSegment(tuple(range(10, 245)))
        row = [[text, image[0]], [image[1], text], [text, image[2], TextSegment(tuple(range(10, 80)))]]
        batch = pack(config, [row])
        assert batch.counts.tokens > 0.9 * LENGTH and batch.counts.text_targets > 700
        loss = TransfusionLoss(config.diffusion)
        terms = loss.terms(model, batch)
        loss.combine(terms, terms.counts).backward()

    return run


def test_no_tensor_is_as_large_as_a_mask_or_as_all_logits(step: Callable[[str, int], None]) -> None:
    """Half the least of them: a mask of booleans. All logits in bf16 take three quarters of that."""
    assert max_allocation(lambda: step("auto", CHUNK)) < LENGTH * LENGTH / 2


def test_what_is_watched_would_be_seen(step: Callable[[str, int], None]) -> None:
    """Attention that does make [S, S], and a head that makes all logits at once."""
    assert max_allocation(lambda: torch.ones(LENGTH, LENGTH, dtype=torch.bool)) == LENGTH * LENGTH
    assert max_allocation(lambda: step("reference", CHUNK)) >= LENGTH * LENGTH
    assert max_allocation(lambda: step("auto", LENGTH)) >= 700 * VOCABULARY * 4
