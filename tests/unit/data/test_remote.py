"""Remote sources: the same stream whatever the cache and the network do, a bound that holds, no credentials told."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from transfusion.cli import main
from transfusion.config import CacheConfig, Config
from transfusion.data.index.source_index import build_indexes
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.prefetch import shards_of
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.data.loading.validation import documents as all_documents
from transfusion.data.planning.epoch import Windows
from transfusion.data.remote import download
from transfusion.data.remote.cache import CacheSettings, RemoteShard, ShardCache
from transfusion.data.remote.download import DownloadFailed, ShardChanged, ShardDigest, Stopped
from transfusion.data.shards.webdataset import open_address, write_shards
from transfusion.errors import UserError
from transfusion.files import digest
from transfusion.schema import Batch
from transfusion.sequence.tokenizer import Tokenizer

sys.path += [str(Path(__file__).parents[3] / "benchmarks"), str(Path(__file__).parent)]
from remote_process import fetch, run_rank

from web import Answer, Web

Rows = list[list[torch.Tensor]]
RowsOf = Callable[[Sequence[Batch]], Rows]
Same = Callable[[Rows, Rows], bool]
Make = Callable[..., Config]
SHARDS, SAMPLES, WINDOW, STEPS = 10, 30, 3, 12
# For processes that start on a machine that does much else.
LONGEST_WAIT = 600
QUICK = {"attempts": 3, "timeout": 20.0, "pause": 0.01, "connections": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards of thirty captioned images each, and a .jsonl of texts."""
    folder, generator = tmp_path_factory.mktemp("served"), np.random.default_rng(0)

    def samples() -> Iterator[dict[str, bytes]]:
        for number in range(SHARDS * SAMPLES):
            stream = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(stream, "png")
            yield {"png": stream.getvalue(), "txt": b"the digit %d" % (number % 10)}

    write_shards(samples(), folder, per_shard=SAMPLES)
    lines = [json.dumps({"text": "someone wrote the number nine " * (1 + n % 5)}) for n in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with contextlib.closing(Web(folder)) as web:
        yield web


@pytest.fixture
def shard_bytes(folder: Path) -> int:
    return (folder / "00000.tar").stat().st_size


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(address of a folder) -> configuration; cache=... and others change section data."""

    def make(base: str, *, run: str = "run", texts: bool = True, cache: Any = None, **changes: Any) -> Config:
        sources = [{"name": "images", "shards": f"{base}/{{00000..00009}}.tar", "shuffle_window": WINDOW}]
        if texts:
            sources.append({"name": "texts", "shards": f"{base}/texts.jsonl", "weight": 0.3})
        section: dict[str, Any] = {
            "sources": sources,
            "validation": sources[:1],
            "sequence_length": 128,
            "global_batch_size": 4,
            "cache": {**QUICK, "folder": str(tmp_path / "cache"), **(cache or {})},
            **changes,
        }
        codec = {"channels": 1, "image_size": 8}
        return Config.model_validate({"codec": codec, "data": section, "run": {"dir": str(tmp_path / run)}})

    return make


def open_loaders(
    config: Config, tokenizer: Tokenizer, world_size: int = 1, state: dict[str, Any] | None = None
) -> list[Loader]:
    return [
        Loader(config, config.data.sources, tokenizer, rank=rank, world_size=world_size, state=state)
        for rank in range(world_size)
    ]


@contextlib.contextmanager
def loaders(*words: Any, **named: Any) -> Iterator[list[Loader]]:
    opened = open_loaders(*words, **named)
    try:
        yield opened
    finally:
        for loader in opened:
            loader.close()


def global_step(ranks: Sequence[Loader], rows_of: RowsOf) -> Rows:
    steps = [rows_of(loader.next_step()) for loader in ranks]
    return [row for rows in zip(*steps, strict=True) for row in rows]


def cache_of(loader: Loader) -> ShardCache:
    assert loader.fetching is not None
    return loader.fetching.fetcher.cache


@pytest.fixture
def truth(folder: Path, make: Make, tokenizer: Tokenizer, rows_of: RowsOf) -> tuple[list[Rows], list[str]]:
    """Global batches by `file:`, and the state before each."""
    batches, states = [], []
    with loaders(make(f"file:{folder}", run="truth", cache={"folder": ""}), tokenizer) as (loader,):
        for _ in range(STEPS):
            states.append(json.dumps(loader.state()))
            batches.append(rows_of(loader.next_step()))
    return batches, states


def test_windows_give_each_sample_once_and_need_each_shard_once() -> None:
    counts = np.array([5, 0, 7, 1, 12, 3, 0, 4])
    for shards in (1, 3, 8, 20):
        windows = Windows(counts, shards)
        orders = []
        for epoch in range(3):
            places = np.arange(counts.sum())
            samples = windows.samples(places, 1, 2, epoch)
            assert sorted(samples.tolist()) == places.tolist()
            parts = [windows.samples(places[first : first + 5], 1, 2, epoch) for first in range(0, 32, 5)]
            assert np.array_equal(np.concatenate(parts), samples)
            shard = windows.shard_of(samples)
            assert np.array_equal(np.repeat(np.arange(8), counts), windows.shard_of(np.arange(32)))
            # Where each shard is needed first and last: never beyond its window.
            ahead = dict((shard, place) for place, shard in windows.ahead(0, 1, 2, epoch))
            assert all(ahead[number] <= place for place, number in enumerate(shard.tolist()))
            for place in range(0, 32, 3):
                rest = [number for _, number in windows.ahead(place, 1, 2, epoch)]
                assert set(shard[place:].tolist()) <= set(rest)
                assert rest == list(ahead)[len(ahead) - len(rest) :]
            orders.append(samples.tolist())
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("tiny", [True, False])
def test_the_same_rows_at_any_world_size_and_cache(
    folder: Path,
    make: Make,
    tokenizer: Tokenizer,
    rows_of: RowsOf,
    same: Same,
    truth: tuple[list[Rows], list[str]],
    world_size: int,
    tiny: bool,
) -> None:
    config = make(f"file://{folder}", cache={"gigabytes": 1e-9} if tiny else None)
    with loaders(config, tokenizer, world_size) as ranks:
        for step in range(STEPS):
            assert same(global_step(ranks, rows_of), truth[0][step])
        assert len({json.dumps(loader.state()) for loader in ranks}) == 1
    resumed = random.Random(world_size).randrange(1, STEPS - 2)
    with loaders(config, tokenizer, 1, json.loads(truth[1][resumed])) as ranks:
        assert same(global_step(ranks, rows_of), truth[0][resumed])
        assert json.dumps(ranks[0].state()) == truth[1][resumed + 1]


def test_workers_and_the_network_change_nothing(
    web: Web,
    make: Make,
    tokenizer: Tokenizer,
    rows_of: RowsOf,
    same: Same,
    truth: tuple[list[Rows], list[str]],
    shard_bytes: int,
) -> None:
    config = make(web.address, workers=2, cache={"gigabytes": 4 * shard_bytes / 1e9})
    with loaders(config, tokenizer) as ranks:
        for step in range(STEPS):
            assert same(global_step(ranks, rows_of), truth[0][step])


def test_an_epoch_downloads_each_shard_once_and_keeps_the_bound(
    web: Web,
    make: Make,
    tokenizer: Tokenizer,
    shard_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten shards through a cache of seven, windows of three, a block and open rows smaller than a window."""
    monkeypatch.setattr("transfusion.data.planning.epoch._ROWS_PER_BLOCK", 8)
    bound = 7 * shard_bytes + 1000
    config = make(web.address, texts=False, packing_buffer=2, cache={"gigabytes": bound / 1e9})
    with loaders(config, tokenizer) as (loader,):
        web.asked.clear()
        cache, most = cache_of(loader), 0
        cache.peak_bytes = 0
        drawn = 0
        while drawn < SHARDS * SAMPLES:
            loader.next_step()
            drawn += loader.reading.samples
            most = max(most, cache.used_bytes())
        # The index pass has left seven of them; the first windows of the next epoch come ahead.
        assert sum(web.asked.values()) <= SHARDS + 2 * WINDOW
        assert max(web.asked.values()) <= 2
        assert 3 * shard_bytes < most <= cache.peak_bytes <= bound
    assert not list((tmp_path / "cache").glob(".*.tmp-*"))


def test_a_cache_below_the_working_set_is_told_once(
    folder: Path, make: Make, tokenizer: Tokenizer, shard_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = make(f"file:{folder}", texts=False, cache={"gigabytes": 4 * shard_bytes / 1e9})
    with caplog.at_level(logging.WARNING), loaders(config, tokenizer) as (loader,):
        for _ in range(130):
            loader.next_step()
    (record,) = caplog.records
    assert "more than data.cache.gigabytes" in record.getMessage()


def test_rows_that_nothing_fits_do_not_hold_their_shards(
    folder: Path, make: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows to come are fetched before what only rows need that may stay open for ever."""
    monkeypatch.setattr("transfusion.data.planning.epoch._ROWS_PER_BLOCK", 8)
    with loaders(make(f"file:{folder}", texts=False), tokenizer) as (loader,):
        assert loader.fetching is not None
        for _ in range(60):
            loader.next_step()
        plans = loader.fetching._planner.rest_of_block()
        block = {need for batch in plans for need in shards_of(batch, loader.indexes)}
        after = list(loader.fetching._after(block))
        draw = loader.fetching._planner.draws_after_block()["images"]
        epoch_order = loader.fetching._schedules[0]._epoch_order
        coming = [(0, shard) for _, shard in itertools.islice(epoch_order.shards_ahead(draw), 2 * WINDOW)]
        begun = shards_of(loader.fetching._planner.rows_after_block(), loader.indexes)
        assert set(begun) - block, "no row was left behind: the test shows nothing"
        assert after[: len(set(begun) & block)] == [need for need in begun if need in block]
        assert after[len(set(begun) & block) :][: 2 * WINDOW] == coming


def test_who_waits_for_a_download_can_be_stopped(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, 1 << 30)
    one, other = ShardCache(settings), ShardCache(settings)
    shard, contents = shard_of(folder / "00000.tar", settings)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with one._one_at_a_time(shard, threading.Event()), pytest.raises(Stopped):
        other.fetch(shard, contents, stop=stop)
    slow = RemoteShard("pipe:sleep 30", settings)
    stop.clear()
    threading.Timer(0.2, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        other.fetch(slow, contents, stop=stop)
    assert time.monotonic() - begin < 10 and other.used_bytes() == 0


def test_a_tiny_cache_goes_above_its_bound_by_one_step(
    web: Web, make: Make, tokenizer: Tokenizer, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfusion.data.planning.epoch._ROWS_PER_BLOCK", 8)
    config = make(web.address, texts=False, global_batch_size=1, cache={"gigabytes": 1e-9})
    with loaders(config, tokenizer) as (loader,):
        cache = cache_of(loader)
        cache.peak_bytes = 0
        for _ in range(20):
            loader.next_step()
        # The window and, at its border, the next one: what a single step can touch.
        assert shard_bytes <= cache.peak_bytes <= 2 * WINDOW * shard_bytes
    cache.trim()
    assert cache.used_bytes() == 0


def test_a_server_that_fails_twice_then_works(
    web: Web, make: Make, tokenizer: Tokenizer, rows_of: RowsOf, same: Same, truth: Any
) -> None:
    def fail_twice(name: str, number: int, body: bytes) -> Answer | None:
        answers = [None, Answer(body, cut=len(body) // 2), Answer(body)]
        return answers[(number - 1) % 3]

    web.behave = fail_twice
    with loaders(make(web.address), tokenizer) as ranks:
        for step in range(4):
            assert same(global_step(ranks, rows_of), truth[0][step])
        assert not ranks[0].faults()
    assert set(web.asked.values()) == {3}


def test_corrupt_and_stalled_downloads_are_tried_again(
    web: Web, make: Make, tokenizer: Tokenizer, rows_of: RowsOf, same: Same, truth: Any, tmp_path: Path
) -> None:
    config = make(web.address, cache={"timeout": 0.4})
    build_indexes(config, config.data.sources, tokenizer)
    shutil.rmtree(tmp_path / "cache")

    def misbehave(name: str, number: int, body: bytes) -> Answer | None:
        if number == 2:
            middle = len(body) // 2
            return Answer(body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])
        return Answer(body, pause=5 if number == 3 and name == "00000.tar" else 0)

    web.behave = misbehave
    fresh = make(web.address, cache={"timeout": 0.4, "folder": str(tmp_path / "second")})
    with loaders(fresh, tokenizer) as ranks:
        for step in range(4):
            assert same(global_step(ranks, rows_of), truth[0][step])
        assert not ranks[0].faults()


def test_a_dead_server_makes_faults_that_keep_their_place(
    web: Web,
    make: Make,
    tokenizer: Tokenizer,
    rows_of: RowsOf,
    same: Same,
    truth: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    secret = web.address.replace("http://", "http://me:hunter2@")
    config = make(secret)
    build_indexes(config, config.data.sources, tokenizer)
    web.behave = lambda name, number, body: None
    dead = make(secret, cache={"folder": str(tmp_path / "second")})
    with caplog.at_level(logging.WARNING), loaders(dead, tokenizer) as ranks:
        faults = 0
        for step in range(6):
            rows = global_step(ranks, rows_of)
            # Positions, documents and masks are those of the whole stream; only the images are silent.
            for row, whole in zip(rows, truth[0][step], strict=True):
                assert all(torch.equal(row[field], whole[field]) for field in (2, 5, 6))
                assert not len(row[7])
            faults += ranks[0].reading.faults
        found = ranks[0].faults()
        assert faults > 20 and {fault.reason.partition(":")[0] for fault in found} == {
            "unreadable shard (download failed"
        }
        assert "http://***@" in ranks[0].complaint() and "download failed" in ranks[0].complaint()
    assert "http://***@127.0.0.1" in caplog.text and "hunter2" not in caplog.text
    assert "hunter2" not in json.dumps([str(fault) for fault in found])
    # Of each shard one line, whatever number of its samples were wanted.
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) <= SHARDS
    web.behave = lambda name, number, body: Answer(body)
    with loaders(dead, tokenizer) as ranks:
        assert same(global_step(ranks, rows_of), truth[0][0])


def test_a_changed_shard_is_a_fault_then_refused_or_indexed_anew(
    folder: Path, make: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    shutil.copytree(folder, served)
    own, named = make(f"file:{served}"), make(f"file:{served}", index=str(tmp_path / "index"))
    for config in (own, named):
        build_indexes(config, config.data.sources, tokenizer)
    for shard in served.glob("*.tar"):
        shard.write_bytes((folder / "00004.tar").read_bytes())
    elsewhere = {"folder": str(tmp_path / "second")}
    for config in (own, named):
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"cache": CacheConfig(**(QUICK | elsewhere))})}
        )
        with loaders(config, tokenizer) as (loader,):
            for _ in range(3):
                loader.next_step()
            reasons = {fault.reason for fault in loader.faults()}
        assert reasons == {"unreadable shard (changed since it was indexed)"}
    with pytest.raises(
        UserError, match=r"stale: the shard has changed since; renew it with `transfusion data"
    ):
        build_indexes(named, named.data.sources, tokenizer)
    with loaders(own, tokenizer) as (loader,):
        for _ in range(3):
            loader.next_step()
        assert not loader.faults()
    words = ["data", "index", f"file:{served}/{{00000..00009}}.tar", "--out", str(tmp_path / "index")]
    result = CliRunner().invoke(main.app, [*words, "--tokenizer", str(tokenizer.path)])
    assert result.exit_code == 0, result.output
    build_indexes(named, named.data.sources, tokenizer)


def test_a_download_that_fails_while_indexing_is_one_line(web: Web, make: Make, tokenizer: Tokenizer) -> None:
    web.behave = lambda name, number, body: Answer(b"", status=404)
    config = make(web.address.replace("http://", "http://me:hunter2@"), cache={"attempts": 2})
    with pytest.raises(UserError, match=r"http://\*\*\*@.*00000.tar cannot be indexed: .*status 22") as error:
        build_indexes(config, config.data.sources, tokenizer)
    assert "hunter2" not in str(error.value) and web.asked["00000.tar"] == 2


def settings_of(folder: Path, size: int, **changes: Any) -> CacheSettings:
    return CacheSettings.of(
        CacheConfig(folder=str(folder), gigabytes=size / 1e9, **(QUICK | changes)), folder
    )


def shard_of(path: Path, settings: CacheSettings) -> tuple[RemoteShard, ShardDigest]:
    data = path.read_bytes()
    checksum = digest(data)
    return RemoteShard(f"pipe:cat {path}", settings), ShardDigest(len(data), checksum)


def test_least_recently_used_goes_first_and_what_is_held_stays(
    folder: Path, tmp_path: Path, shard_bytes: int
) -> None:
    settings = settings_of(tmp_path, 3 * shard_bytes)
    one, other = ShardCache(settings), ShardCache(settings)
    shards = [shard_of(folder / f"{number:05d}.tar", settings) for number in range(6)]
    names = [shard.copy_name(contents._asdict()) for shard, contents in shards]
    for number in range(3):
        assert one.fetch(*shards[number])
        os.utime(tmp_path / names[number], (number, number))
    assert one.fetch(*shards[0])  # used again, so the second is now the oldest
    other.pin("plan", [names[2]])
    assert one.fetch(*shards[3])
    present = lambda: {number for number in range(6) if (tmp_path / names[number]).exists()}  # noqa: E731
    assert present() == {0, 2, 3}
    one.pin("plan", [names[0], names[3]])
    # All are held, by one or the other: what may wait waits, and what must come comes.
    assert not one.fetch(*shards[4], must=False) and present() == {0, 2, 3}
    assert one.fetch(*shards[4]) and present() == {0, 2, 3, 4}
    other.pin("plan", [])
    one.trim()
    assert present() == {0, 3, 4} and one.peak_bytes == 4 * shard_bytes
    # A copy of the wrong size is none.
    (tmp_path / names[0]).write_bytes(b"torn")
    assert one.fetch(*shards[0]) and (tmp_path / names[0]).stat().st_size == shard_bytes


def test_errors_of_a_download(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path, 1 << 30)
    cache = ShardCache(settings)
    shard, contents = shard_of(folder / "00000.tar", settings)
    wrong = contents._replace(checksum="0" * 32)
    with pytest.raises(ShardChanged):
        cache.fetch(shard, wrong)
    with pytest.raises(ShardChanged):
        cache.fetch(shard, wrong)  # remembered
    failing = RemoteShard("pipe:cat /nowhere/00000.tar hunter2 2>/dev/null", settings)
    with pytest.raises(DownloadFailed, match="the command ended with status 1"):
        cache.fetch(failing, contents)
    # More bytes than were indexed are not all downloaded.
    endless = RemoteShard("pipe:yes", settings)
    with pytest.raises(ShardChanged):
        cache.fetch(endless, contents)

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", no_room)
    with pytest.raises(UserError, match=r"the disk is full while pipe:cat \.\.\. .*; free some space, lower"):
        cache.fetch(shard, contents)
    assert cache.used_bytes() == 0


def test_a_full_disk_ends_a_run_in_one_line(
    folder: Path, make: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make(f"file:{folder}", texts=False)
    build_indexes(config, config.data.sources, tokenizer)
    monkeypatch.setattr(download.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    config = make(f"file:{folder}", texts=False, cache={"folder": str(tmp_path / "second")})
    with loaders(config, tokenizer) as (loader,), pytest.raises(UserError, match="the disk is full"):
        loader.next_step()


def test_addresses_that_cannot_be_opened_are_one_line(
    tmp_path: Path, make: Make, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UserError, match=r"nonsense: .* cannot be opened"):
        open_address("nonsense://a/0.tar")
    with pytest.raises(UserError, match="pipe:COMMAND"):
        open_address("ais://a/0.tar" if not shutil.which("ais") else "nonsense://a/0.tar")
    with pytest.raises(UserError, match="cannot be listed"):
        config = make("https://me:hunter2@host/*")
        build_indexes(config, config.data.sources, tokenizer)


@pytest.mark.slow
def test_two_processes_share_a_cache(
    web: Web, make: Make, tokenizer: Tokenizer, shard_bytes: int, tmp_path: Path
) -> None:
    """Started at once over nothing: each shard is downloaded once for both, and both go the same way."""
    config = make(web.address, texts=False, cache={"gigabytes": 11 * shard_bytes / 1e9})
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(config, tokenizer.path, rank, STEPS, results))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=LONGEST_WAIT) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert found[0][0] == found[1][0] and not found[0][1] and not found[1][1]
    assert set(web.asked.values()) == {1} and len(web.asked) == SHARDS
    assert max(peak for *_, peak in found) <= 11 * shard_bytes


@pytest.mark.parametrize("cleared_by", ["one that starts", "one that makes room"])
def test_killed_in_mid_download(cleared_by: str, web: Web, folder: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, 1 << 30)
    _, contents = shard_of(folder / "00000.tar", settings)
    web.behave = lambda name, number, body: Answer(body, pause=60 if number == 1 else 0)
    address = f"{web.address}/00000.tar"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=fetch, args=(address, contents, settings))
    process.start()
    deadline = time.monotonic() + LONGEST_WAIT
    # Once curl asks it holds none of its parent's files, as it does for a moment while it is started.
    while not web.asked["00000.tar"] and time.monotonic() < deadline:
        time.sleep(0.02)
    left = list(tmp_path.glob(".*.tmp-*"))
    assert process.pid is not None
    # A living process's file is not cleared by another.
    alive = ShardCache(settings)
    alive.trim()
    assert list(tmp_path.glob(".*.tmp-*")) == left != []
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(tmp_path.glob("*.tar"))
    if cleared_by == "one that starts":
        cache = ShardCache(settings)
    else:
        cache = alive
        cache.trim()
    assert not list(tmp_path.glob(".*.tmp-*")) and cache.used_bytes() == 0
    assert cache.fetch(RemoteShard(address, settings), contents)
    assert len(list((tmp_path / "leases").iterdir())) == len({alive, cache})
    assert alive.used_bytes() == contents.size


def test_validation_sources_and_documents(
    folder: Path, make: Make, tokenizer: Tokenizer, rows_of: RowsOf, same: Same, shard_bytes: int
) -> None:
    passes = []
    for size in (1, 100 * shard_bytes):
        config = make(f"pipe:cat {folder}", cache={"gigabytes": size / 1e9})
        loader = EvaluationLoader(config, config.data.validation, tokenizer)
        passes.append([rows_of([batch]) for batch in loader])
    assert len(passes[0]) == len(passes[1]) > 5
    assert all(itertools.starmap(same, zip(*passes, strict=True)))
    images = sum(len(row[7]) for rows in passes[0] for row in rows if row[7].numel())
    assert images == SHARDS * SAMPLES
    assert sum(1 for _ in all_documents(config, config.data.validation, tokenizer)) == images


def test_the_commands_take_addresses_and_write_no_credentials(
    web: Web, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = web.address.replace("http://", "http://me:hunter2@")
    shards = f"{base}/{{00000..00009}}.tar?X-Amz-Signature=hunter2"
    config = tmp_path / "some.yaml"
    config.write_text(
        f"data:\n  tokenizer: {tokenizer.path}\n  sequence_length: 128\n  global_batch_size: 4\n"
        f"  cache: {{folder: {tmp_path}/cache}}\n  index: {tmp_path}/index\n"
        f"  sources: [{{name: images, shards: '{shards}'}}]\n"
        "codec: {channels: 1, image_size: 8}\n"
        f"run: {{dir: {tmp_path}/run}}\n"
    )
    runner = CliRunner()
    outputs = []
    for words in (
        ["data", "index", str(config), "--out", str(tmp_path / "index")],
        ["data", "index", str(config), "--out", str(tmp_path / "index")],
        ["data", "stats", str(config)],
        ["data", "plan", str(config), "--steps", "2"],
        ["data", "show", str(config), "--out", str(tmp_path / "rows.html")],
        ["config", str(config)],
    ):
        result = runner.invoke(main.app, words)
        assert result.exit_code == 0, (words, result.output)
        outputs.append(result.output)
    assert "10 shards, 300 samples" in outputs[0] == outputs[1]
    # The index pass has downloaded each once, and nothing else has asked again.
    assert set(web.asked.values()) == {1}
    counted = collections.Counter(json.loads((tmp_path / "index/counters.json").read_text())["shards"].keys())
    assert len(counted) == SHARDS
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != config]
    assert len(written) > 2 * SHARDS
    assert not any(b"hunter2" in path.read_bytes() for path in written)
    assert not any("hunter2" in path.name for path in written)
    assert "hunter2" not in caplog.text + "".join(outputs)


def test_threads_end_with_the_loader(folder: Path, make: Make, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    with loaders(make(f"file:{folder}"), tokenizer) as (loader,):
        loader.next_step()
        assert threading.active_count() > before
    assert threading.active_count() == before
