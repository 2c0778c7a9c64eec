"""The attention seam: whatever keeps `Attend` goes through the unchanged network.

That of ranks which share rows is compared with one process in `tests/dist`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.families.build import build_model as build
from transfusion.inference.cache import PagedCache
from transfusion.model.attention import PlainAttention
from transfusion.model.transformer import Transfusion
from transfusion.parallel.ulysses import SequenceGroup
from transfusion_kernels import IntervalMask

CAUSAL = IntervalMask(
    torch.zeros(2, 9, dtype=torch.int32), torch.arange(1, 10, dtype=torch.int32).repeat(2, 1)
)


class Counting:
    """Somebody's own attention."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor:
        self.calls += 1
        return PlainAttention("reference")(query, key, value, mask)


def inputs(width: int) -> tuple[Tensor, Tensor]:
    hidden_BSD = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
    return hidden_BSD, torch.arange(9).repeat(2, 1)[..., None]


@torch.no_grad()
def test_an_attention_of_ones_own(build_model: Callable[..., tuple[Config, Transfusion]]) -> None:
    config, plain = build_model()
    own = Counting()
    model = Transfusion(config.model, config.codec, attend=own)
    model.load_state_dict(plain.state_dict())
    hidden_BSD, position_BSA = inputs(config.model.hidden_size)
    found = model.run_blocks(hidden_BSD, position_BSA, CAUSAL)
    torch.testing.assert_close(
        found, plain.run_blocks(hidden_BSD, position_BSA, CAUSAL), rtol=1e-5, atol=1e-4
    )
    assert own.calls == config.model.layers


@torch.no_grad()
def test_a_cache_is_an_attention(build_model: Callable[..., tuple[Config, Transfusion]]) -> None:
    """The same states in three parts, each continuing from the keys of those before."""
    config, model = build_model()
    hidden_BSD, position_BSA = inputs(config.model.hidden_size)
    whole = model.run_blocks(hidden_BSD, position_BSA, CAUSAL)
    cache = PagedCache(config.model.layers, 2, torch.device("cpu"))
    rows = cache.view([cache.row(9), cache.row(9)])
    for first, end in ((0, 4), (4, 5), (5, 9)):
        here = slice(first, end)
        mask = rows.mask(torch.arange(1, end - first + 1).repeat(2, 1), [end - first] * 2)
        part = model.run_blocks(hidden_BSD[:, here], position_BSA[:, here], mask, rows.layers)
        rows.advance([end - first] * 2)
        torch.testing.assert_close(part, whole[:, here], rtol=1e-5, atol=1e-4)


def test_ranks_that_share_rows_take_whole_ones_plainly(
    build_model: Callable[..., tuple[Config, Transfusion]],
) -> None:
    """As sampling and evaluation do: no collective, and the same states."""
    config, plain = build_model()
    group: Any = SequenceGroup()
    model = build(config, group)
    model.load_state_dict(plain.state_dict())
    hidden_BSD, position_BSA = inputs(config.model.hidden_size)
    found = model.run_blocks(hidden_BSD, position_BSA, CAUSAL)
    assert torch.equal(found, plain.run_blocks(hidden_BSD, position_BSA, CAUSAL))
