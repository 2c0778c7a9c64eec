"""Grouped-query attention over an interval mask, with a cache to continue from.

B rows, S queries, L cached keys, H query heads, K key heads, E head dimension, D width, F frequencies.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from transfusion_kernels import IntervalMask, interval_attention

from transfusion.config import ModelConfig
from transfusion.model.embedding import rotate


class LayerCache(Protocol):
    """Keys and values of the positions before the ones at hand, for one layer."""

    def extend(self, key_BKSE: Tensor, value_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new positions and return all keys and values [B, K, L, E]."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
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
        attended = interval_attention(query, key, value, mask, backend=self.backend)
        assert isinstance(attended, Tensor)  # not a pair: the log-sum-exp is not asked for
        return self.out(attended.transpose(1, 2).reshape(B, S, self.heads * self.head_dim))
