"""Index files: whole or absent, refused when they do not fit, made by whoever needs them, the same on every run."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion.config import SourceConfig
from transfusion.data.index import build
from transfusion.data.index.build import IndexJob, IndexLocation, write_index
from transfusion.data.index.shard_index import IndexFingerprint, ShardIndex, StaleIndex, index_shard
from transfusion.data.index.source_index import SourceIndex, build_index
from transfusion.data.shards.sample import Fault
from transfusion.data.shards.shard import LocalShard
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.schema import ImageSegment, TextSegment
from transfusion.sequence.tokenizer import Tokenizer


def make_image(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), shade).save(stream, "PNG")
    return stream.getvalue()


def document(*elements: object) -> bytes:
    return json.dumps({"elements": elements}).encode()


TEXT = {"type": "text", "text": "the digit three"}
FIRST, SECOND = ({"type": "image", "image": f"img{n}.png"} for n in range(2))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A pair with two captions, a text, an interleaved document, a latent, and a fault between them."""
    latent = io.BytesIO()
    np.save(latent, np.zeros((1, 8, 8), np.float16))
    samples = [
        {"png": make_image(1), "json": json.dumps({"captions": ["three", "the digit 3"]}).encode()},
        {"txt": b"a text"},
        {"txt": b" "},
        {
            "img0.png": make_image(2),
            "img1.png": make_image(3),
            "json": document(SECOND, TEXT, FIRST, TEXT, SECOND),
        },
        {"latent.npy": latent.getvalue(), "txt": b"four"},
    ]
    (shard,) = write_shards(samples, tmp_path / "mixed")
    return shard


def test_all_that_was_found_comes_back(mixed: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    index_shard(LocalShard(mixed), tmp_path / "a.index", tokenizer)
    index = ShardIndex(tmp_path / "a.index", LocalShard(mixed))
    index.check(IndexFingerprint.of(tokenizer))
    index.verify()
    assert [index.key(sample) for sample in range(4)] == ["000000000", "000000001", "000000003", "000000004"]
    assert index["captions_N"].tolist() == [2, 1, 1, 1] and index.images_N.tolist() == [1, 0, 3, 1]
    assert index.read_image(0) == make_image(1) and index.read_image(2, 0) == make_image(3)
    assert [index.is_latent(sample) for sample in (0, 2, 3)] == [False, False, True]
    tokens = len(tokenizer.encode("the digit three"))
    assert index.elements(2) == [-1, tokens, -2, tokens, -1] and index.elements(0) == []
    offset = mixed.read_bytes().index(b"000000002.txt")
    assert list(index.faults()) == [Fault("00000.tar", "000000002", "text_empty", offset)]
    again = tmp_path / "b.index"
    index_shard(LocalShard(mixed), again, tokenizer)
    assert again.read_bytes() == (tmp_path / "a.index").read_bytes()
    # Another process maps the file; it is not sent there.
    assert len(pickle.dumps(index)) < 4096
    assert pickle.loads(pickle.dumps(index)).key(3) == "000000004"


def test_a_source_of_everything(mixed: Path, tokenizer: Tokenizer) -> None:
    source = SourceConfig(name="s", shards=str(mixed), kind="mixed")
    index = build_index(source, tokenizer, patches=16, sequence_length=128, latent_channels=1)
    assert index.is_pair_N.tolist() == [True, False, False, True] and index.lengths.images_N.tolist() == [
        1,
        0,
        3,
        1,
    ]
    segments, images = index.segments(2)
    assert images == [0, 1, 0]
    assert [type(segment) for segment in segments] == [ImageSegment, TextSegment] * 2 + [ImageSegment]
    texts = [segment.token_ids for segment in segments if isinstance(segment, TextSegment)]
    assert [tokenizer.decode(ids) for ids in texts] == ["the digit three"] * 2
    assert index.lengths.text_tokens_C[index.lengths.caption_start_N[2]] == sum(map(len, texts))
    copy = pickle.loads(pickle.dumps(index))
    assert copy.segments(2) == index.segments(2) and copy.text_ids(3).tolist() == tokenizer.encode("four")


def test_what_does_not_fit_a_row_is_left_out(mixed: Path, tokenizer: Tokenizer) -> None:
    def opened(sequence_length: int, channels: int = 1) -> SourceIndex:
        source = SourceConfig(name="s", shards=str(mixed), kind="mixed")
        return build_index(
            source, tokenizer, patches=16, sequence_length=sequence_length, latent_channels=channels
        )

    tokens = 2 * len(tokenizer.encode("the digit three"))
    whole = tokens + 3 * (16 + 2) + 2
    assert len(opened(whole)) == 4
    short = opened(whole - 1)
    assert [fault.reason for fault in short.faults] == ["text_empty", "longer_than_row"]
    assert [short.key(sample) for sample in range(3)] == ["000000000", "000000001", "000000004"]
    assert tokenizer.decode(short.text_ids(2).tolist()) == "four"
    assert [fault.reason for fault in opened(whole, 3).faults] == ["text_empty", "latent_shape"]


@pytest.mark.parametrize("where", [0, 20, 70, -1])
def test_damage_is_found(where: int, mixed: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.index"
    index_shard(LocalShard(mixed), path, tokenizer)
    data = bytearray(path.read_bytes())
    data[where] ^= 255
    path.write_bytes(data)
    with pytest.raises(StaleIndex):
        ShardIndex(path, LocalShard(mixed)).verify()
    path.write_bytes(data[:-10])
    with pytest.raises(StaleIndex):
        ShardIndex(path, LocalShard(mixed))


def test_a_stale_index_is_refused_with_the_command_that_renews_it(
    mixed: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    job, source = (
        IndexJob([str(mixed)], tokenizer.path),
        SourceConfig(name="s", shards=str(mixed), kind="mixed"),
    )

    def opened() -> SourceIndex:
        return build_index(
            source, tokenizer, patches=16, sequence_length=128, place=IndexLocation(folder=out)
        )

    def refused(why: str) -> None:
        with pytest.raises(
            UserError, match=rf"stale: .*{why}.*renew it with `transfusion data index .*--out {out}"
        ):
            opened()
        write_index([job], out, max_share=1)
        opened()

    write_index([job._replace(tokenizer=None)], out, max_share=1)
    refused("without a tokenizer")
    # A copy with another time is the same shard; another byte is not.
    os.utime(mixed, (1, 1))
    opened()
    with mixed.open("r+b") as stream:
        stream.seek(600)
        stream.write(b"?")
    os.utime(mixed, (2, 2))
    refused("the shard has changed")
    with mixed.open("ab") as stream:
        stream.write(bytes(512))
    os.utime(mixed, (2, 2))
    refused("the shard has changed")
    monkeypatch.setattr("transfusion.data.images.probe.MIN_SIDE", 4)
    refused("other rules")


def test_training_makes_what_is_missing_and_renews_its_own(
    mixed: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceConfig(name="s", shards=str(mixed), kind="mixed")

    def opened(**place: Path) -> SourceIndex:
        return build_index(source, tokenizer, patches=16, sequence_length=128, place=IndexLocation(**place))

    opened()
    beside = mixed.with_name(f"00000.tar.{tokenizer.fingerprint[:8]}.index")
    assert beside.is_file()
    beside.write_bytes(b"damaged")
    assert len(opened()) == 4
    # Read in another way it is another file.
    strict = source.model_copy(update={"verify": "sha256"})
    assert len(build_index(strict, tokenizer, patches=16, sequence_length=128, place=IndexLocation())) < 4
    assert mixed.with_name(f"00000.tar.{tokenizer.fingerprint[:8]}.sha256.index").is_file()
    beside.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"data\.index=DIR"):
        opened()
    assert len(opened(fallback=tmp_path / "run" / "index")) == 4 and not beside.exists()
    monkeypatch.setattr(build, "index_shard", None)
    assert len(opened(fallback=tmp_path / "run" / "index")) == 4


@pytest.mark.parametrize("given", [True, False])
def test_a_file_of_an_earlier_version_is_made_anew_with_one_line(
    mixed: Path, tokenizer: Tokenizer, tmp_path: Path, given: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in a folder that was named, where what is stale is otherwise refused."""
    place = IndexLocation(folder=tmp_path / "index" if given else None)
    path = place.path(LocalShard(mixed), "none", tokenizer.fingerprint)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"transfusion\x1aidx\n" + bytes(200))
    source = SourceConfig(name="s", shards=str(mixed), kind="mixed")
    with caplog.at_level("WARNING"):
        assert len(build_index(source, tokenizer, patches=16, sequence_length=128, place=place)) == 4
    (line,) = caplog.messages
    assert line == f"index files of an earlier version are made again: 1, such as {path}"


def transfusion(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transfusion", "data", "index", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path, data: Path) -> None:
    write_shards([{"txt": b"good"}] * 30 + [{"txt": b" "}] * 2, tmp_path / "shards", per_shard=16)
    (tmp_path / "shards" / "00000_stats.json").write_text("{}")
    out, spec = tmp_path / "out", tmp_path / "shards" / "*"
    first = transfusion(spec, "--out", out, "--tokenizer", data / "tokenizer.model", "--workers", 2)
    assert first.returncode == 0, first.stderr
    counters = json.loads((out / "counters.json").read_text())
    assert counters["faults"] == {"text_empty": 2} and counters["samples"] == 30 and counters["tokens"] > 0
    assert counters["files_skipped"] == {".json": 1} and counters["bad_shards"] == ["00001.tar"]
    assert "00001.tar" in first.stderr
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines] == [["key", "lost", "offset", "reason", "shard"]] * 2
    assert [line["key"] for line in lines] == ["000010014", "000010015"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    limited = transfusion(
        spec, "--out", out, "--tokenizer", data / "tokenizer.model", "--max-bad-fraction", 0.01
    )
    assert limited.returncode == 3
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".index"}
    assert kept.items() <= before.items()
    nothing = transfusion(tmp_path / "shards" / "*.json", "--out", out)
    assert nothing.returncode == 2 and "none of 1 files is a .tar or .jsonl shard" in nothing.stderr


def test_killed_and_run_again_it_goes_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards([{"txt": b"word " * 1000}] * 160, tmp_path / "shards", per_shard=20)
    out, job = tmp_path / "out", IndexJob([str(tmp_path / "shards" / "*.tar")], tokenizer.path)
    whole = tmp_path / "whole"
    write_index([job], whole, max_share=1)
    command = [sys.executable, "-m", "transfusion", "data", "index", job.specs[0], "--out", str(out)]
    process = subprocess.Popen([*command, "--tokenizer", str(tokenizer.path), "--workers", "1"])
    while not list(out.glob("*.index")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.index")}
    write_index([job], out, max_share=1, processes=2)
    assert made and all(path.stat().st_mtime_ns == when for path, when in made.items())
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in out.iterdir()} == names and len(names) == 8 + 3
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
