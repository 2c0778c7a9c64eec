"""A small run of the campaign over remote shards, and that it can tell a difference."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import remote
from remote import Place
from web import Web


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with contextlib.closing(Web(tmp_path_factory.mktemp("campaign") / "served")) as web:
        yield web


@pytest.fixture(scope="module")
def place(web: Web) -> Place:
    return remote.make_place(web.folder.parent, web, 6, 60)


def test_streams_are_told_apart(place: Place, web: Web) -> None:
    def passed(run: str, window: int, size: int) -> remote.Passed:
        config = place.config(web, run=run, window=window, cache_bytes=size, connections=2)
        return remote.go(config, samples=200)

    small, whole, other = passed("small", 2, 1), passed("whole", 2, 1 << 30), passed("other", 3, 1 << 30)
    assert small.digest == whole.digest != other.digest
    assert small.downloaded > whole.downloaded == place.bytes
    assert small.samples == whole.samples >= 200


def test_a_slow_server_is_waited_for(place: Place, web: Web) -> None:
    web.rate = place.bytes * 2
    config = place.config(web, run="slow", window=2, cache_bytes=1 << 30, connections=1)
    slow = remote.go(config, samples=1)
    web.rate = 0
    # The first block reads all six shards, one after another.
    assert slow.waited_first > 0.3
