"""What other processes do in the tests of remote sources; importable by name, as starting them needs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from transfusion.config import Config
from transfusion.data.loading.loader import Loader
from transfusion.data.remote.cache import CacheSettings, RemoteShard, ShardCache
from transfusion.data.remote.download import ShardDigest
from transfusion.sequence.tokenizer import Tokenizer


def run_rank(config: Config, tokenizer: Path, rank: int, steps: int, results: Any) -> None:
    """Some steps of one of two ranks; puts (state, faults, most bytes seen in the cache)."""
    loader = Loader(config, config.data.sources, Tokenizer(tokenizer), rank=rank, world_size=2)
    with contextlib.closing(loader):
        for _ in range(steps):
            loader.next_step()
        assert loader.fetching is not None
        peak = loader.fetching.fetcher.cache.peak_bytes
        results.put((json.dumps(loader.state()), len(loader.faults()), peak))


def fetch(address: str, contents: ShardDigest, settings: CacheSettings) -> None:
    """Download one shard into a cache."""
    ShardCache(settings).fetch(RemoteShard(address, settings), contents)
