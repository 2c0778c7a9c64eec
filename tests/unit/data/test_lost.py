"""Faults count as what they cost: samples, whole shards of them, and captions whose image is gone."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transfusion.config import Config, SourceConfig
from transfusion.data.index.build import QUARANTINE, IndexJob, too_many_faults, write_index
from transfusion.data.index.source_index import SourceIndex, build_index, refuse_too_many
from transfusion.data.shards import scan
from transfusion.data.shards.sample import lost_by_reason
from transfusion.errors import UserError
from transfusion.sequence.tokenizer import Tokenizer

stream = io.BytesIO()
Image.new("L", (8, 8), 100).save(stream, "PNG")
PNG = stream.getvalue()


def pair(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", PNG), (f"{key}.txt", b"a picture")]


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as writer:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            writer.addfile(member, io.BytesIO(data))
    return path


def shards(folder: Path, count: int, samples: int = 50) -> list[Path]:
    return [
        write(folder / f"{shard:05d}.tar", [m for k in range(samples) for m in pair(f"{shard:05d}{k:04d}")])
        for shard in range(count)
    ]


def opened(folder: Path, tokenizer: Tokenizer, pattern: str = "*.tar", **fields: Any) -> SourceIndex:
    source = SourceConfig(name="s", shards=f"{folder}/{pattern}", **fields)
    return build_index(source, tokenizer, patches=16, sequence_length=128)


def lost(index: SourceIndex) -> dict[str, int]:
    return dict(lost_by_reason(index.faults))


def test_names_with_dots_cost_all_samples_that_they_hide(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards(tmp_path, 4)
    write(tmp_path / "00009.tar", [m for k in range(200) for m in pair(f"cat.{k}")])
    index = opened(tmp_path, tokenizer)
    assert lost(index) == {"dotted_names": 200}
    with pytest.raises(UserError, match=r"200 of 400 samples are bad \(dotted_names: 200\)"):
        refuse_too_many([index], 0.05)
    report = write_index([IndexJob([f"{tmp_path}/*.tar"], tokenizer.path)], tmp_path / "out", max_share=0.05)
    assert report.past_limit and report.counters["faults"] == {"dotted_names": 200}
    assert report.bad_shards == ["00009.tar"]


def test_an_image_missing_from_one_sample_costs_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards(tmp_path, 2)
    write(tmp_path / "00009.tar", [*pair("a"), ("b.txt", b"text"), ("b.cls", b"7"), *pair("c")])
    assert lost(opened(tmp_path, tokenizer)) == {"image_missing": 1}


@pytest.mark.parametrize("harm", ["no tar", "cut short", "cut short between members", "middle overwritten"])
def test_a_shard_costs_what_it_held(tmp_path: Path, tokenizer: Tokenizer, harm: str) -> None:
    *_, last = shards(tmp_path, 4)
    data = last.read_bytes()
    if harm == "no tar":
        last.write_bytes(b"<html>502 Bad Gateway</html>" * 40)
        reason, wanted = "tar_unreadable", 50
    elif harm == "cut short":
        last.write_bytes(data[: len(data) // 2 + 100])
        reason, wanted = "tar_truncated", 25
    elif harm == "cut short between members":
        # Of each pair two headers and two blocks; tarfile fills up with zeros.
        last.write_bytes(data[: 4 * 512 * 30])
        reason, wanted = "tar_no_end_marker", 20
    else:
        third = len(data) // 3 // 512 * 512
        last.write_bytes(data[:third] + bytes([1]) * third + data[2 * third :])
        reason, wanted = "tar_bad_header", 17
    index = opened(tmp_path, tokenizer)
    assert lost(index)[reason] == pytest.approx(wanted, abs=4)
    assert 200 - len(index) == pytest.approx(sum(lost(index).values()), abs=4)
    with pytest.raises(UserError, match=f"of [0-9]+ samples are bad .*{reason}"):
        refuse_too_many([index], 0.05)


def test_a_lone_caption_among_pairs_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(
        tmp_path / "a.tar",
        [*pair("a"), ("b.txt", b"the image of this one is gone"), *pair("c"), ("d.txt", b"so")],
    )
    index = opened(tmp_path, tokenizer, kind="pairs")
    assert len(index) == 2 and [(fault.key, fault.reason) for fault in index.faults] == [
        ("b", "image_missing"),
        ("d", "image_missing"),
    ]
    # As many pairs as texts: by itself nothing says that the texts are none.
    assert len(opened(tmp_path, tokenizer)) == 4
    write(tmp_path / "a.tar", [*pair("a"), ("b.txt", b"the image of this one is gone"), *pair("c")])
    assert len(opened(tmp_path, tokenizer)) == 2 and lost(opened(tmp_path, tokenizer)) == {"image_missing": 1}
    assert len(opened(tmp_path, tokenizer, kind="mixed")) == 3
    texts = opened(tmp_path, tokenizer, kind="texts")
    assert len(texts) == 1 and lost(texts) == {"other_kind": 2}


def test_texts_of_a_folder_stay_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.tar", [(f"{k}.txt", b"a text") for k in range(9)])
    assert len(opened(tmp_path, tokenizer)) == len(opened(tmp_path, tokenizer, kind="texts")) == 9
    with pytest.raises(UserError, match=r"no usable sample in 1 shards \(image_missing: 9\)"):
        opened(tmp_path, tokenizer, kind="pairs")


def test_files_that_nobody_reads_are_named(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shards(tmp_path, 1)
    (tmp_path / "00001.parquet").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text("{}")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            opened(tmp_path, tokenizer, "0*")
        (line,) = caplog.messages
        assert "2 of " in line and "are no .tar or .jsonl and are not read, such as" in line
    (tmp_path / "00001.tar.gz").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"1 of \d files are compressed and cannot be read, such as .*00001\.tar\.gz"
    ):
        opened(tmp_path, tokenizer, "0*")


def test_texts_with_dots_in_their_names_cost_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.tar", [*pair("a"), *[(f"page.{k}.txt", b"a text") for k in range(7)]])
    assert lost(opened(tmp_path, tokenizer)) == {"dotted_names": 7}
    # Two names in turn are no two samples that are merely scattered.
    both = [m for k in range(2) for name in ("cat", "dog") for m in pair(f"{name}.{k}")]
    write(tmp_path / "a.tar", [*pair("a"), *both])
    assert lost(opened(tmp_path, tokenizer)) == {"not_adjacent": 4}


def test_a_shard_costs_what_others_held_good_or_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    half = [m for k in range(20) for m in (pair(f"{k}") if k % 2 else [(f"{k}.png", PNG)])]
    for shard in ("a", "b"):
        write(tmp_path / f"{shard}.tar", half)
    # Of all zeros is what a file system kept of a lost file.
    (tmp_path / "c.tar").write_bytes(bytes(1 << 15))
    found = lost(opened(tmp_path, tokenizer))
    assert found.pop("tar_empty") + found.pop("tar_truncated") == 20 and found == {"caption_missing": 20}


def test_lines_that_are_cut_short_cost_what_others_hold(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = '{"text": "an é"}\n'
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(line * 30, encoding="utf-8")
    for bytes_less in (3, 6):
        (tmp_path / "c.jsonl").write_bytes((line * 10).encode()[:-bytes_less])
        index = opened(tmp_path, tokenizer, "*.jsonl")
        assert len(index) == 69 and lost(index) == {"lines_truncated": 21}


@pytest.mark.parametrize(("faults", "is_too_many"), [(29, False), (30, True)])
def test_a_share_in_decimals_is_what_it_says(faults: int, is_too_many: bool) -> None:
    assert too_many_faults(faults, 100, 0.29) is is_too_many


def test_damage_of_a_shard_with_many_members_costs_the_same(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_MEMBERS_KEPT", 8)
    (path,) = shards(tmp_path, 1)
    data = path.read_bytes()
    third = len(data) // 3 // 512 * 512
    path.write_bytes(data[:third] + bytes([1]) * third + data[2 * third :])
    assert lost(opened(tmp_path, tokenizer))["tar_bad_header"] == pytest.approx(17, abs=4)


def test_a_file_that_is_called_as_a_key_costs_no_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.tar", [("a", b""), *pair("a"), *pair("b"), *pair("a")])
    index = opened(tmp_path, tokenizer)
    assert [index.key(sample) for sample in range(len(index))] == ["a", "b"]
    assert lost(index) == {"member_ignored": 1, "duplicate_key": 1}


def test_damaged_pairs_are_pairs_all_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    torn = [m for k in range(3) for m in ((f"t{k}.png", PNG[:40]), (f"t{k}.txt", b"a picture"))]
    members = [*pair("a"), *torn, *[(f"{k}.txt", b"its image is gone") for k in range(3)]]
    write(tmp_path / "a.tar", members)
    assert lost(opened(tmp_path, tokenizer)) == {"image_truncated": 3, "image_missing": 3}


def test_an_index_run_counts_by_the_kind_of_the_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tar", [*pair("a"), ("b.txt", b"its image is gone"), *pair("c")])
    for kind, faults, texts in (("auto", {"image_missing": 1}, 0), ("texts", {"other_kind": 2}, 1)):
        config = Config.model_validate(
            {"data": {"sources": [{"name": "s", "shards": str(path), "kind": kind}], "validation": []}}
        )
        (job,) = IndexJob.of(config)
        counters = write_index([job._replace(tokenizer=None)], tmp_path / kind, max_share=1).counters
        assert counters["faults"] == faults and counters["texts"] == texts
        assert counters["samples"] == 3 - sum(faults.values())
        lines = (tmp_path / kind / QUARANTINE).read_text().splitlines()
        assert len(lines) == sum(faults.values())


def test_what_is_called_a_shard_and_is_none_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards(tmp_path, 1)
    (tmp_path / "1.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"1\.tar is a link to nothing"):
        opened(tmp_path, tokenizer)
    (tmp_path / "1.tar").unlink()
    (tmp_path / "1.tar").mkdir()
    with pytest.raises(UserError, match=r"1\.tar is a folder"):
        write_index([IndexJob([f"{tmp_path}/*.tar"], None)], tmp_path / "out", max_share=1)


def test_compressed_shards_are_refused_everywhere(tmp_path: Path) -> None:
    shards(tmp_path, 1)
    (tmp_path / "00001.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 2 files are compressed"):
        write_index([IndexJob([f"{tmp_path}/0*"], None)], tmp_path / "out", max_share=1)
    with pytest.raises(UserError, match="1 of 2 files are compressed"):
        scan.Texts(sorted(tmp_path.glob("0*")))


@pytest.mark.parametrize(
    ("first", "last", "reason"), [(20, 50, "tar_truncated"), (15, 35, "tar_trailing_data")]
)
def test_zeros_stand_for_what_was_never_written(
    tmp_path: Path, tokenizer: Tokenizer, first: int, last: int, reason: str
) -> None:
    (path,) = shards(tmp_path, 1)
    data, size = path.read_bytes(), 4 * 512
    path.write_bytes(data[: first * size] + bytes((last - first) * size) + data[last * size :])
    index = opened(tmp_path, tokenizer)
    assert len(index) == 50 - (last - first)
    assert lost(index) == {reason: pytest.approx(last - first, abs=6)}
    line = '{"text": "a text"}\n'
    lines = line * first + "\0" * len(line) * (last - first) + line * (50 - last)
    (tmp_path / "a.jsonl").write_text(lines)
    assert sum(lost(opened(tmp_path, tokenizer, "*.jsonl")).values()) == pytest.approx(last - first, abs=2)
