"""Grouped-query attention over an interval mask, whatever carries it out.

B rows, S queries, H query heads, K key heads, E head dimension, D width, F frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.model.embedding import rotate
from transfusion_kernels import IntervalMask, interval_attention


class Attend(Protocol):
    """Attention of queries [B, H, S, E] to keys and values [B, K, S, E] under a mask, to [B, H, S, E].

    Plain here, over ranks that share rows in `parallel.ulysses`, and with keys of a cache in `generate.cache`.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PlainAttention:
    """Of whole rows in this process. backend: implementation of the kernels, see `train.attention`."""

    backend: str = "auto"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor:
        attended = interval_attention(query, key, value, mask, backend=self.backend)
        assert isinstance(attended, Tensor)  # not a pair: the log-sum-exp is not asked for
        return attended


WHOLE_ROWS = PlainAttention()


class Sharing(Protocol):
    """Ranks that share rows, each with a slice of the positions (`parallel.ulysses`)."""

    def attention(self, backend: str) -> Attend:
        """Attention of slices of rows, whose mask is of whole rows."""

    def exchange(self, x_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send as many rows of x_ND to each rank as `sent` says; returns those that came, rank after rank."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.query = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon)
            self.key_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon)

    def forward(
        self,
        x_BSD: Tensor,
        cosine_BSF: Tensor,
        sine_BSF: Tensor,
        mask: IntervalMask,
        attend: Attend | None = None,
    ) -> Tensor:
        """Attend from x_BSD to itself. Returns [B, S, D]. attend: what carries it out this time."""
        B, S, _ = x_BSD.shape
        query = self.query(x_BSD).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        key = self.key(x_BSD).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.value(x_BSD).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        query = rotate(self.query_norm(query), cosine_BSF, sine_BSF)
        key = rotate(self.key_norm(key), cosine_BSF, sine_BSF)
        attended = (attend or self.attend)(query, key, value, mask)
        return self.out(attended.transpose(1, 2).reshape(B, S, self.heads * self.head_dim))
