"""Grouped-query attention over an interval mask, whatever carries it out.

B rows, S queries, H query heads, K key heads, E head dimension, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.model.embedding import rotate
from transfusion.model.grouping import ALL_TEXT, Grouping
from transfusion.schema import Batch
from transfusion_kernels import IntervalMask, interval_attention


class TwoIntervals(NamedTuple):
    """A mask under which some queries see a second interval, as `interval_attention` takes both."""

    mask: IntervalMask
    second: tuple[Tensor, IntervalMask]


Mask = IntervalMask | TwoIntervals


def visibility(batch: Batch) -> Mask:
    """Who sees whom in a batch."""
    return batch.mask if batch.second is None else TwoIntervals(batch.mask, batch.second)


class Attend(Protocol):
    """What attends: queries [B, H, S, E], keys and values [B, K, S, E] and a mask give [B, H, S, E].

    `PlainAttention` does so in one process, `parallel.ulysses` over ranks that share rows, and `inference.cache` to
    the keys of a cache too.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PlainAttention:
    """Attention of whole rows in this process.

    Attributes:
        backend: The implementation, as `interval_attention` takes it. In a run it is `train.attention`.
    """

    backend: str = "auto"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        first, second = mask if isinstance(mask, TwoIntervals) else (mask, None)
        attended = interval_attention(query, key, value, first, second=second, backend=self.backend)
        assert isinstance(attended, Tensor)  # not a pair: the log-sum-exp is not asked for
        return attended


WHOLE_ROWS = PlainAttention()


class Sharing(Protocol):
    """Ranks that share rows, each with a slice of the positions (`parallel.ulysses`)."""

    def attention(self, backend: str) -> Attend:
        """What attends for slices of rows, under a mask of whole rows.

        Args:
            backend: As for `PlainAttention`.
        """

    def exchange(self, x_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Swap rows of a tensor among the ranks.

        Args:
            x_ND: Rows to send, rank after rank.
            sent: How many of them go to each rank.
            received: How many come from each rank.

        Returns:
            The rows that came, rank after rank.
        """


class Attention(nn.Module):
    """Self-attention of one block.

    Args:
        config: Width, heads, biases and norms.
        attend: What carries it out, unless `forward` is given another.
    """

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_width
        bias = config.attention_bias
        self.query = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.key = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon)
            self.key_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon)

    def queries(self, x: Tensor) -> Tensor:
        """States [..., D] to queries [..., H, E], before they are turned."""
        query = self.query(x).unflatten(-1, (self.heads, self.head_dim))
        return query if self.query_norm is None else self.query_norm(query)

    def keys(self, x: Tensor) -> Tensor:
        """States [..., D] to keys [..., K, E], before they are turned."""
        key = self.key(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return key if self.key_norm is None else self.key_norm(key)

    def values(self, x: Tensor) -> Tensor:
        """States [..., D] to values [..., K, E]."""
        return self.value(x).unflatten(-1, (self.kv_heads, self.head_dim))

    def forward(
        self,
        x: Tensor,
        cosine_B1SE: Tensor,
        sine_B1SE: Tensor,
        mask: Mask,
        attend: Attend | None = None,
        grouping: Grouping = ALL_TEXT,
        image: Attention | None = None,
    ) -> Tensor:
        """Attend from every position to those that it sees.

        Args:
            x: States of the positions, [B, S, D], or as the grouping orders them.
            cosine_B1SE: Cosines of the rotary angles, as `rotate` takes them.
            sine_B1SE: Their signed sines.
            mask: Which positions see which.
            attend: What carries it out this time, such as a layer of a cache.
            grouping: Which positions are of images.
            image: Whose weights these have. None: the same as text.

        Returns:
            New states, in the shape of `x`.
        """
        rows = len(cosine_B1SE)
        of_text = (self.queries, self.keys, self.values)
        of_images = (None,) * 3 if image is None else (image.queries, image.keys, image.values)
        query, key, value = (
            grouping.in_rows(grouping.apply(x, *modules), rows).transpose(1, 2)
            for modules in zip(of_text, of_images, strict=True)
        )
        query, key = (rotate(x, cosine_B1SE, sine_B1SE) for x in (query, key))
        attended = (attend or self.attend)(query, key, value, mask)
        seen = grouping.ordered(attended.transpose(1, 2).flatten(2))
        return grouping.apply(seen, self.out, None if image is None else image.out)
