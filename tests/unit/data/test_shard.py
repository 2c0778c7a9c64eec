"""The shard seam: whatever keeps `Shard` is indexed and read. Local and remote ones have tests of their own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfusion.data.index.build import IndexLocation
from transfusion.data.index.shard_index import IndexFingerprint, ShardIndex, StaleIndex, index_shard
from transfusion.data.shards.shard import Facts, LocalShard, Shard
from transfusion.data.shards.webdataset import write_shards
from transfusion.sequence.tokenizer import Tokenizer


class Counted:
    """A shard of some other kind: one that has no place beside it, and counts who opens it."""

    is_remote, folder, identity, siblings = False, None, "0123", "all of them"

    def __init__(self, path: Path) -> None:
        self.path, self.opened, self.version = path, 0, 1
        self.name, self.suffix = path.name, path.suffix

    def __str__(self) -> str:
        return "somewhere"

    def nominal_bytes(self) -> int:
        return 1

    @contextlib.contextmanager
    def whole(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        yield self.path, {"size": 1, "version": self.version}

    def has_changed(self, facts: Facts) -> bool:
        return bool(facts["version"] != self.version)

    def fetch(self, facts: Facts, *, must: bool = True, stop: threading.Event | None = None) -> bool:
        return True

    def open(self, facts: Facts) -> int:
        self.opened += 1
        return os.open(self.path, os.O_RDONLY)

    def copy_name(self, facts: Facts) -> str:
        return self.name


def test_a_shard_of_ones_own(tmp_path: Path, tokenizer: Tokenizer, data: Path) -> None:
    (path,) = write_shards([{"png": b"no image", "txt": b"a"}, {"txt": b"a text"}], tmp_path / "shards")
    shard = Counted(path)
    as_shard: Shard = shard
    place = IndexLocation(folder=tmp_path / "index").path(as_shard)
    assert place.name == f"{path.name}.0123.index"
    place.parent.mkdir()
    index_shard(as_shard, place, tokenizer)
    index = ShardIndex(place, as_shard)
    index.check(IndexFingerprint.of(tokenizer))
    assert len(index) == 1 and [fault.reason for fault in index.faults()] == ["image_corrupt"]
    os.close(index.open())
    assert shard.opened == 1
    shard.version = 2
    with contextlib.suppress(StaleIndex):
        index.check(IndexFingerprint.of(tokenizer))
        raise AssertionError("a changed shard was taken")


def test_a_local_shard_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    shard = LocalShard(path)
    with shard.whole() as (file, facts):
        assert file == path
    assert not shard.has_changed(facts)
    os.utime(path, (2, 2))
    assert not shard.has_changed(facts), "another time, the same bytes"
    path.write_text('{"text": "two"}\n')
    assert shard.has_changed(facts)
    assert shard.identity != LocalShard(tmp_path / "b" / "a.jsonl").identity
    assert os.fspath(shard) == str(shard) == str(path) and shard.siblings == str(tmp_path / "*.jsonl")
