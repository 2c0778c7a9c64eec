"""Grouped-query attention over an interval mask, with a cache to continue from.

B rows, S queries, L cached keys, H query heads, K key heads, E head dimension, D width, F frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.model.embedding import rotate
from transfusion_kernels import IntervalMask, interval_attention


class LayerCache(Protocol):
    """Keys and values of the positions before the ones at hand, for one layer."""

    def extend(self, key_BKSE: Tensor, value_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new positions and return all keys and values [B, K, L, E]."""


class Sharing(Protocol):
    """Ranks that share rows, each with a slice of the positions (`parallel.sequence`)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask, backend: str) -> Tensor:
        """Attention of this rank's queries [B, H, S, E] to the keys of all ranks; the mask is of whole rows."""

    def exchange(self, x_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send as many rows of x_ND to each rank as `sent` says; returns those that came, rank after rank."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, backend: str, sharing: Sharing | None = None) -> None:
        super().__init__()
        self.sharing = sharing
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.backend = backend
        self.query = nn.Linear(config.width, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, config.width, bias=False)
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
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from x_BSD to itself, or to the cache extended by it; returns [B, S, D]."""
        B, S, _ = x_BSD.shape
        query = self.query(x_BSD).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        key = self.key(x_BSD).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.value(x_BSD).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        query = rotate(self.query_norm(query), cosine_BSF, sine_BSF)
        key = rotate(self.key_norm(key), cosine_BSF, sine_BSF)
        if cache is not None:
            key, value = cache.extend(key, value)
        # In evaluation a rank has whole rows, and with them as many queries as the mask.
        if self.sharing is not None and mask.num_queries > S:
            attended = self.sharing.attend(query, key, value, mask, self.backend)
        else:
            whole = interval_attention(query, key, value, mask, backend=self.backend)
            assert isinstance(whole, Tensor)  # not a pair: the log-sum-exp is not asked for
            attended = whole
        return self.out(attended.transpose(1, 2).reshape(B, S, self.heads * self.head_dim))
