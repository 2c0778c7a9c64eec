"""Shards: the same bytes, readable by webdataset, found by globs and ranges."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset

from transfusion.data.shards.webdataset import Sample, expand, expand_all, sample_key, write_shards
from transfusion.errors import UserError


def samples(count: int = 5) -> list[Sample]:
    return [{"txt": b"caption %d" % n, "png": b"image %d" % n, "json": b"{}"} for n in range(count)]


def test_layout_and_keys(tmp_path: Path) -> None:
    written = write_shards(samples(), tmp_path, per_shard=2)
    assert [path.name for path in written] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in written]
    with tarfile.open(written[1]) as archive:
        members = archive.getmembers()
    assert [member.name for member in members[:3]] == ["000010000.json", "000010000.png", "000010000.txt"]
    assert {member.mtime for member in members} == {0}
    assert sample_key(2, 2) == "000010000"


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_shards(samples(), tmp_path / name, per_shard=2) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_webdataset_reads_them(tmp_path: Path) -> None:
    paths = [str(path) for path in write_shards(samples(), tmp_path, per_shard=2)]
    found = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["txt"] for sample in found] == [sample["txt"] for sample in samples()]
    assert found[4]["__key__"] == "000020000"


def test_a_failure_leaves_no_half_shard(tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield from samples(3)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shards(failing(), tmp_path, per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_globs_ranges_and_paths_expand_in_order_and_once(tmp_path: Path) -> None:
    paths = write_shards(samples(), tmp_path, per_shard=2)
    assert expand(f"{tmp_path}/*.tar") == paths
    assert expand(f"{tmp_path}/{{00000..00002}}.tar") == paths
    assert expand([str(paths[2]), f"{tmp_path}/{{00000,00002}}.tar"]) == [paths[2], paths[0]]


def test_a_missing_shard_is_named_with_what_stands_nearby(tmp_path: Path) -> None:
    write_shards(samples(), tmp_path, per_shard=2)
    for spec in (f"{tmp_path}/{{00000..00009}}.tar", f"{tmp_path}/00003.tar"):
        with pytest.raises(UserError, match=r"no shard .*00003\.tar; .* holds 00000\.tar"):
            expand(spec)
    with pytest.raises(UserError, match="no shard"):
        expand(f"{tmp_path}/nowhere/at/all/*.tar")
    with pytest.raises(UserError, match="only files on this machine"):
        expand("https://example.org/00000.tar")
    with pytest.raises(UserError, match="unbalanced brace"):
        expand(f"{tmp_path}/{{00000..00002.tar")
    with pytest.raises(UserError, match="no shards"):
        expand([])


@pytest.mark.parametrize(
    "folder",
    ["set [v1]", "[ab]/deep", "what?", "a*b", "{1,2}", "{open", "back\\slash", "{00..02} [x]", "[!a]"],
)
@pytest.mark.parametrize("file", ["00000.tar", "[0].tar", "{0,1}.tar", "0{.tar"])
def test_what_exists_is_what_it_is_called(tmp_path: Path, folder: str, file: str) -> None:
    place = tmp_path / folder
    place.mkdir(parents=True)
    (place / file).write_bytes(b"")
    (place / "00001.tar").write_bytes(b"")
    assert expand(f"{place}/{file}") == [place / file]
    assert expand(f"{place}/0000*.tar")[-1] == place / "00001.tar"
    assert expand(f"{place}/0000{{1..1}}.tar") == [place / "00001.tar"]
    assert sorted(expand(f"{tmp_path}/**/*.tar")) == sorted([place / file, place / "00001.tar"])


def test_the_home_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.tar").write_bytes(b"")
    assert expand("~/*.tar") == [tmp_path / "a.tar"]


@pytest.mark.parametrize(
    "spec",
    [
        "{0..999999999}.tar",
        "{5..-9999999999999999999999}.tar",
        "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar",
    ],
)
def test_a_range_without_end_is_refused_at_once(tmp_path: Path, spec: str) -> None:
    begin = time.process_time()
    for place in (str(tmp_path), "https://host"):
        with pytest.raises(UserError, match="stands for more than 1,000,000 names"):
            expand_all(f"{place}/{spec}")
    assert time.process_time() - begin < 60


def test_braces_without_end_are_refused(tmp_path: Path) -> None:
    for spec in ("{" * 50_000, "{0..2"):
        with pytest.raises(UserError):
            expand(f"{tmp_path}/{spec}")
