"""What one pass over a shard finds, and what it leaves out with which reason."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from transfusion.data.scan import Fault, RawSample, scan


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), 7).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def reasons(path: Path) -> list[str]:
    return [found.reason if isinstance(found, Fault) else "good" for found in scan(path)]


def test_pairs_and_texts(tmp_path: Path) -> None:
    members = [
        ("a.png", picture()),
        ("a.txt", b" a caption\n"),
        ("b.txt", b"  a text\n"),
        ("sub/c.json", json.dumps({"caption": "in json"}).encode()),
        ("sub/c.JPG", picture()),
    ]
    path = tar(tmp_path / "s.tar", members)
    pair, text, other = scan(path)
    assert isinstance(pair, RawSample) and isinstance(other, RawSample)
    assert (pair.key, pair.text) == ("a", "a caption")
    assert path.read_bytes()[pair.picture_offset :][: pair.picture_size] == picture()
    # A text document keeps its white space; it is part of it.
    assert text == RawSample("b", "  a text\n")
    assert (other.key, other.text) == ("sub/c", "in json")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", b"not a picture"), ("a.txt", b"c")], "unreadable picture"),
        ([("a.png", picture()), ("a.txt", b" \n ")], "empty caption"),
        ([("a.png", picture()), ("a.txt", b"\xff\xfe")], "not UTF-8"),
        ([("a.png", picture())], "missing caption"),
        ([("a.png", picture()), ("a.json", b"{}")], "missing caption"),
        ([("a.png", picture()), ("a.json", b"{")], "not JSON"),
        ([("a.txt", b"c"), ("a.json", b"{}")], "missing picture"),
        ([("a.txt", b"   ")], "empty text"),
        ([("a.cls", b"3")], "missing member"),
    ],
)
def test_a_bad_sample_has_its_reason_and_the_next_is_read(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    path = tar(tmp_path / "s.tar", [*members, ("b.png", picture()), ("b.txt", b"good")])
    assert next(iter(scan(path))) == Fault("s.tar", "a", reason)
    assert reasons(path) == [reason, "good"]


def test_a_torn_tar_gives_what_is_whole(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", data) for n in range(4) for kind, data in (("png", picture()), ("txt", b"c"))]
    path = tar(tmp_path / "whole.tar", members)
    assert reasons(path) == ["good"] * 4
    whole = path.read_bytes()
    torn = tmp_path / "torn.tar"
    # Every member is a block of header and a block of data: cut in a header, in data, and between two.
    for cut, good in ((5 * 1024 - 700, 2), (5 * 1024 - 500, 2), (5 * 1024, 2), (6 * 1024 + 100, 3), (100, 0)):
        torn.write_bytes(whole[:cut])
        found = reasons(torn)
        assert found in (["good"] * good + ["truncated tar"], ["not a tar"]), (cut, found)
    damaged = bytearray(whole)
    damaged[4096 : 4096 + 512] = b"?" * 512
    torn.write_bytes(damaged)
    assert reasons(torn) == ["good", "good", "truncated tar"]


def test_what_is_no_tar_is_one_fault(tmp_path: Path) -> None:
    path = tmp_path / "page.tar"
    path.write_bytes(b"<html>" * 300)
    assert reasons(path) == ["not a tar"]


def test_links_and_folders_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("dir", tarfile.DIRTYPE), ("a.png", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    assert list(scan(path)) == []


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        b'{"text": "one"}',
        b"{",
        b'{"other": 1}',
        b'{"text": " "}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert reasons(path) == ["good", "not JSON", "missing text", "empty text", "not UTF-8", "not UTF-8"]
    assert [found.key for found in scan(path)] == [f"line {number}" for number in range(6)]
