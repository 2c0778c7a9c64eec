"""Our mask equals, exactly, the masks of the same meaning that others build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion_kernels import IntervalMask
from transfusion_kernels.verification.testing import random_layout

SIZE, ROWS = 150, 3
SEEDS = pytest.mark.parametrize("seed", range(4))


@SEEDS
@pytest.mark.parametrize(
    ("rows_are", "how"),
    # In packed rows or_mask_function is given positions counted from the document's start.
    [("packed", "block_sequence_ids"), ("padded", "block_sequence_ids"), ("padded", "or_mask_function")],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_the_mask_of_transformers(seed: int, rows_are: str, how: str, implementation: str) -> None:
    """Images as Gemma 3 and PaliGemma have them, in documents packed by positions that start anew, or in one document
    with padding behind it: where there is padding, packed documents are not looked for."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")
    from transformers import LlamaConfig
    from transformers.masking_utils import blockwise_overlay, create_causal_mask

    start, end, _, image = random_layout(ROWS, SIZE, seed)
    length = torch.full((ROWS,), SIZE)
    if rows_are == "padded":
        length, start = torch.tensor([SIZE, SIZE - 20, 31]), torch.zeros_like(start)
        image[torch.arange(SIZE) >= length[:, None]] = -1
    given: dict[str, Any] = {how: image if how == "block_sequence_ids" else blockwise_overlay(image)}
    if rows_are == "padded":
        given["attention_mask"] = (torch.arange(SIZE) < length[:, None]).long()
    theirs = create_causal_mask(
        config=LlamaConfig(attn_implementation=implementation),
        inputs_embeds=torch.zeros(ROWS, SIZE, 8),
        past_key_values=None,
        position_ids=torch.arange(SIZE) - start,
        **({"attention_mask": None} | given),
    )
    assert isinstance(theirs, Tensor)
    visible = theirs[:, 0] if theirs.dtype == torch.bool else theirs[:, 0] == 0
    mask = IntervalMask.from_spans(start, end.minimum(length[:, None]), length=length)
    mask.validate()
    for row, real in enumerate(length.tolist()):  # theirs lets padding see, ours does not
        assert torch.equal(mask.dense()[row, :real], visible[row, :real])


def one_document(seed: int) -> tuple[IntervalMask, Tensor]:
    """Rows of one document each, and the images in them, int64 [rows, images, 3]: type, offset, length."""
    _, end, _, image = random_layout(ROWS, SIZE, seed)
    images = [
        [(0, first, int((row_image == first).sum())) for first in sorted(set(row_image.tolist()) - {-1})]
        for row_image in image
    ]
    most = max(map(len, images))
    padded = torch.tensor([row + [(0, 0, 0)] * (most - len(row)) for row in images])
    return IntervalMask.from_spans(torch.zeros_like(end), end), padded


@SEEDS
def test_equals_the_mask_of_transfusion_pytorch(seed: int) -> None:
    """Its two builders: one makes the whole mask, one is a function of indices for FlexAttention."""
    theirs = pytest.importorskip(
        "transfusion_pytorch.transfusion", reason="transfusion-pytorch is not installed (extra: oracles)"
    )
    mask, images = one_document(seed)
    assert torch.equal(mask.dense(), theirs.naive_attn_mask(SIZE, images))
    # One position more in an image is seen.
    images[0, 0, 2] += 1
    assert not torch.equal(mask.dense(), theirs.naive_attn_mask(SIZE, images))
    images[0, 0, 2] -= 1
    from torch.nn.attention.flex_attention import create_mask

    built = create_mask(theirs.transfusion_attn_mask(images), ROWS, 1, SIZE, SIZE, device="cpu")
    assert torch.equal(mask.dense(), built[:, 0])


@SEEDS
def test_equals_the_rule_of_transfusion_pytorch(seed: int) -> None:
    """The same without the package. Its rule: a position sees those before it and itself, and from an image's first
    position on, all that stands before the image's end."""
    mask, images = one_document(seed)
    query, key = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    for row, row_images in enumerate(images.tolist()):
        visible = query >= key
        for _, offset, length in row_images:
            visible |= (query >= offset) & (key < offset + length)
        assert torch.equal(mask.dense()[row], visible)
