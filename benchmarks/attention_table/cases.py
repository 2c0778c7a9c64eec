"""What attention.py attends with: families of masks, and random inputs, the same for every provider.

Shape suffixes: B rows, S positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limits import DTYPES
from transfusion_kernels import IntervalMask

# Documents of 2,000 to 4,000 tokens do not fit into rows shorter than this. There the mix is scaled down.
SHORTEST_UNSCALED = 2048

Span = tuple[int, int]


def causal(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """One document of text."""
    return [(0, size)], []


def transfusion_mix(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """Documents of 2,048 to 4,096 tokens, text and images of 256 to 1,024 patches in turn, about as much of each."""
    scale = min(1.0, size / SHORTEST_UNSCALED)
    documents, images, position = [], [], 0
    while position < size:
        start, end = position, min(position + round(random_.randint(2048, 4096) * scale), size)
        while position < end:
            position += round(random_.randint(128, 768) * scale)
            patches = round(random_.choice((256, 576, 1024)) * scale)
            if position + patches <= end:
                images.append((position, position + patches))
                position += patches
        documents.append((start, end))
        position = end
    return documents, images


def captions(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """Captions of 8 to 64 tokens, each with an image of 16, 64 or 256 patches."""
    documents, images, position = [], [], 0
    while position < size:
        start = position
        position = min(position + random_.randint(8, 64), size)
        patches = random_.choice((16, 64, 256))
        if position + patches <= size:
            images.append((position, position + patches))
            position += patches
        documents.append((start, position))
    return documents, images


def tiny_documents(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """Documents of 32 to 96 tokens, half of them with an image of 16 patches."""
    documents, images, position = [], [], 0
    while position < size:
        end = min(position + random_.randint(32, 96), size)
        if random_.random() < 0.5 and end - position >= 24:
            images.append((position + 8, position + 24))
        documents.append((position, end))
        position = end
    return documents, images


def one_document(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """One document with an image of 256 patches in the middle of every 1,024 tokens."""
    return [(0, size)], [(first, first + 256) for first in range(384, size - 255, 1024)]


def packed(length: int) -> Callable[[int, random.Random], tuple[list[Span], list[Span]]]:
    """Documents of one length, half of each an image."""

    def build(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
        documents = [(first, min(first + length, size)) for first in range(0, size, length)]
        images = [(first + length // 4, first + length // 4 + length // 2) for first, end in documents]
        return documents, [(first, end) for first, end in images if end <= size]

    return build


FAMILIES: dict[str, Callable[[int, random.Random], tuple[list[Span], list[Span]]]] = {
    "causal": causal,
    "transfusion": transfusion_mix,
    "captions": captions,
    "tiny": tiny_documents,
    "document": one_document,
    "packed-512": packed(512),
    "packed-64": packed(64),
}


@dataclass(frozen=True)
class Case:
    """One line of the table, all providers alike."""

    family: str
    length: int
    rows: int
    heads: int
    head_dim: int
    dtype: str

    def inputs(self, device: torch.device) -> Inputs:
        """Random queries, keys, values and gradient, and the mask. They are the same for the same case."""
        torch.manual_seed(self.length + self.head_dim)
        shape = (self.rows, self.length, self.heads, self.head_dim)
        q, k, v, grad_out = (
            torch.randn(shape, device=device, dtype=DTYPES[self.dtype]).transpose(1, 2) for _ in range(4)
        )
        start_BS, end_BS = self._spans()
        return Inputs(
            q=q.requires_grad_(),
            k=k.requires_grad_(),
            v=v.requires_grad_(),
            grad_out=grad_out,
            document_start_BS=start_BS.to(device),
            image_end_BS=end_BS.to(device),
            mask=IntervalMask.from_spans(start_BS, end_BS).to(device),
            is_causal=self.family == "causal",
        )

    def _spans(self) -> tuple[Tensor, Tensor]:
        start_BS, end_BS = torch.zeros(2, self.rows, self.length, dtype=torch.int64)
        for row in range(self.rows):
            documents, images = FAMILIES[self.family](self.length, random.Random(row))
            for first, end in documents:
                start_BS[row, first:end] = first
            for first, end in images:
                end_BS[row, first:end] = end
        return start_BS, end_BS


@dataclass(frozen=True)
class Inputs:
    """q, k, v, grad_out: [B, H, S, D], laid out as [B, S, H, D]. The spans are what masks are built from."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    document_start_BS: Tensor
    image_end_BS: Tensor
    mask: IntervalMask
    is_causal: bool
