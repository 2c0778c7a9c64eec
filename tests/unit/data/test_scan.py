"""What reading a shard finds, and what it leaves out with which reason: shards broken on purpose, byte by byte."""

from __future__ import annotations

import hashlib
import io
import json
import random
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion.config.sections import Verify
from transfusion.data.shards import scan as module
from transfusion.data.shards import tar
from transfusion.data.shards.sample import Fault, RawSample
from transfusion.data.shards.scan import is_shard, scan
from transfusion.data.shards.tar import TarWalk

END = bytes(1024)


def header(
    name: bytes,
    size: int,
    *,
    kind: bytes = b"0",
    link: bytes = b"",
    prefix: bytes = b"",
    size_field: bytes = b"",
) -> bytes:
    """A ustar header; size_field: those twelve bytes as they are."""
    block = bytearray(512)
    block[:100] = name[:100].ljust(100, b"\0")
    block[100:108] = block[108:116] = block[116:124] = b"0000644\0"
    block[124:136] = size_field or b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157:257] = link[:100].ljust(100, b"\0")
    block[257:265] = b"ustar\x0000"
    block[345:500] = prefix[:155].ljust(155, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str | bytes, data: bytes, **fields: bytes) -> bytes:
    """Header and padded data; a name of more than 100 bytes gets a GNU long-name member before it."""
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    before = member(b"././@LongLink", raw + b"\0", kind=b"L") if len(raw) > 100 else b""
    return before + header(raw, len(data), **fields) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: dict[str, str]) -> bytes:
    """A pax header member for the next member."""
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        lines += str(length).encode() + body
    return member(b"PaxHeaders/x", lines, kind=b"x")


def shard(path: Path, members: Sequence[tuple[str, bytes] | bytes], *, end: bytes = END) -> Path:
    """A tar of (name, data), or of bytes as they are."""
    parts = [part if isinstance(part, bytes) else member(*part) for part in members]
    path.write_bytes(b"".join(parts) + end)
    return path


def make_image(shade: int = 7, size: tuple[int, int] = (8, 8), kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, shade).save(stream, kind, **options)
    return stream.getvalue()


def pair(
    key: str, caption: bytes = b"a caption", image: bytes | None = None
) -> list[tuple[str, bytes] | bytes]:
    return [(f"{key}.png", make_image() if image is None else image), (f"{key}.txt", caption)]


def reasons(path: Path, verify: Verify = "none") -> list[str]:
    """Of each sample its key, with the reason if it is left out; the shard's own reasons last."""
    found = scan(path, verify)
    return [f"{one.key}: {one.reason}" if isinstance(one, Fault) else one.key for one in found]


def only(path: Path) -> RawSample:
    (found,) = scan(path)
    assert isinstance(found, RawSample), found
    return found


PAIRS = [part for key in "abc" for part in pair(key)]


def test_pairs_and_texts(tmp_path: Path) -> None:
    members = [
        *pair("a", b" a caption\n"),
        ("b.txt", b"  a text\n"),
        ("sub/c.json", json.dumps({"caption": "in json"}).encode()),
        ("sub/c.JPG", make_image()),
    ]
    path = shard(tmp_path / "s.tar", members)
    one, text, other = scan(path)
    assert isinstance(one, RawSample) and isinstance(other, RawSample)
    assert (one.key, one.text, other.key, other.text) == ("a", "a caption", "sub/c", "in json")
    (stored,) = one.images
    assert path.read_bytes()[stored.offset :][: stored.size] == make_image()
    assert (stored.width, stored.height, stored.latent_channels) == (8, 8, 0)
    # A text document keeps its white space; it is part of it.
    assert text == RawSample("b", ("  a text\n",), offset=2048)


@pytest.mark.parametrize(
    ("txt", "facts", "captions"),
    [
        ("a", {"captions": ["b", " a ", "b"]}, ("b", "a", "b")),
        ("a", {"captions": ["b", "", " ", 3, None, "\ud800"]}, ("a", "b")),
        ("a", {"captions": ["b" * 70_000, "c"]}, ("a", "c")),
        ("a", {"captions": "b"}, ("a",)),
        ("a", ["b"], ("a",)),
        (None, {"caption": "a", "captions": ["b"]}, ("a", "b")),
        (None, {"captions": ["b", "c"]}, ("b", "c")),
    ],
)
def test_an_image_may_have_several_captions(
    tmp_path: Path, txt: str | None, facts: object, captions: tuple[str, ...]
) -> None:
    members: list[tuple[str, bytes] | bytes] = [
        ("a.png", make_image()),
        ("a.json", json.dumps(facts).encode()),
    ]
    members += [("a.txt", txt.encode())] if txt else []
    assert only(shard(tmp_path / "s.tar", members)).texts == captions


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", b"not an image"), ("a.txt", b"c")], "image_corrupt"),
        ([("a.png", b""), ("a.txt", b"c")], "image_empty"),
        ([("a.png", make_image()), ("a.txt", b" \n ")], "caption_empty"),
        ([("a.png", make_image()), ("a.txt", b"\xff\xfe")], "text_encoding"),
        ([("a.png", make_image()), ("a.txt", b"x" * 65_537)], "text_oversize"),
        ([("a.png", make_image()), ("a.txt", b"c\0")], "text_control"),
        ([("a.png", make_image())], "caption_missing"),
        ([("a.png", make_image()), ("a.json", b"{}")], "caption_missing"),
        ([("a.png", make_image()), ("a.json", b'{"caption": null}')], "caption_missing"),
        ([("a.png", make_image()), ("a.json", b'{"caption": "\\ud800"}')], "text_encoding"),
        ([("a.png", make_image()), ("a.json", b"{")], "json_invalid"),
        ([("a.png", make_image()), ("a.json", b'["x"]')], "json_invalid"),
        *(
            ([("a.png", make_image()), ("a.json", b'{"caption": "a"}' + behind)], "json_invalid")
            for behind in (b"\x0c", b"\xc2\xa0", b"\x1f", b" {}")
        ),
        ([("a.png", make_image()), ("a.json", b"[" * 100_000)], "json_invalid"),
        ([("a.png", make_image()), ("a.json", b'{"n": ' + b"9" * 100_000 + b"}")], "json_invalid"),
        ([("a.png", make_image()), ("a.json", b" " * 2_000_001)], "text_oversize"),
        ([("a.txt", b"c"), ("a.json", b"{}")], "image_missing"),
        ([("a.txt", b"   ")], "text_empty"),
        ([("a.txt", b"x" * 2_000_001)], "text_oversize"),
        ([("a.cls", b"3")], "image_missing"),
        ([("a.png", make_image()), ("a.jpg", make_image()), ("a.txt", b"c")], "ambiguous_image"),
        ([("a.png", make_image()), ("a.PNG", make_image()), ("a.txt", b"c")], "duplicate_member"),
        ([member("a.png", b"", kind=b"2", link=b"/etc/passwd"), ("a.txt", b"c")], "member_type"),
        ([member("a.png", b"", kind=b"1", link=b"b.png"), ("a.txt", b"c")], "member_type"),
        ([member("a.txt", b"", kind=b"3")], "member_type"),
        ([member("a.txt", b"c", kind=b"S")], "member_type"),
        ([pax({"GNU.sparse.major": "1"}), ("a.txt", b"c")], "member_type"),
    ],
)
def test_a_bad_sample_has_its_reason_and_the_next_is_read(
    tmp_path: Path, members: list[tuple[str, bytes] | bytes], reason: str
) -> None:
    path = shard(tmp_path / "s.tar", [*pair("z"), *members, *pair("b", b"good")])
    offset = len(b"".join(member(*part) for part in pair("z") if not isinstance(part, bytes)))
    assert list(scan(path))[1] == Fault("s.tar", "a", reason, offset)
    assert reasons(path) == ["z", f"a: {reason}", "b"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../../tmp/x.png", "../../tmp/x: name_unsafe"),
        ("ok/../x.png", "ok/../x: name_unsafe"),
        ("/etc/x.png", "/etc/x: name_unsafe"),
        ("..\\x.png", "..\\x: name_unsafe"),
        ("C:x.png", "C:x: name_unsafe"),
        ("x\n[ERROR]\x1b[31m.png", "x\n[ERROR]\x1b[31m: name_unsafe"),
        (b"x\xff.png".decode("utf-8", "surrogateescape"), "x\udcff: name_unsafe"),
        ("n" * 300 + ".png", "n" * 300 + ": name_unsafe"),
        ("README", "README: member_ignored"),
        (".hidden", ".hidden: member_ignored"),
        ("._x.png", "._x: member_ignored"),
        ("__MACOSX/x.png", "__MACOSX/x: member_ignored"),
    ],
)
def test_a_name_that_escapes_or_is_junk_is_told_once(tmp_path: Path, name: str, told: str) -> None:
    other = name[: -len("png")] + "txt" if name.endswith(".png") else name
    # Inside a sample, where archivers of one system put it: the sample stays whole.
    members = [PAIRS[0], (name, b"x"), (other, b"x"), *PAIRS[1:]]
    assert reasons(shard(tmp_path / "s.tar", members)) == [told, "a", "b", "c"]


def test_names_that_are_well(tmp_path: Path) -> None:
    long = "m" * 120
    members = [
        *pair("./a"), *pair("фото-写真"), *pair(long),
        pax({"path": "from pax.txt"}), ("short.txt", b"text"),
        header(b"c.txt", 4, prefix=b"folder") + padded(b"text"),
        member("folder", b"", kind=b"5"), ("old/", b""),
    ]  # fmt: skip
    assert reasons(shard(tmp_path / "s.tar", members)) == ["a", "фото-写真", long, "from pax", "folder/c"]


def test_keys_that_come_again(tmp_path: Path) -> None:
    again = shard(tmp_path / "again.tar", [*pair("a", b"first"), *pair("b"), *pair("a", b"second")])
    assert reasons(again) == ["a", "b", "a: duplicate_key"]
    assert next(iter(scan(again))).text == "first"  # type: ignore[union-attr]
    one, two = pair("a"), pair("b")
    mixed = shard(tmp_path / "mixed.tar", [one[1], two[1], one[0], two[0], *pair("c")])
    # Neither is a text, though its .txt stands alone.
    assert reasons(mixed) == ["a: not_adjacent", "b: not_adjacent", "c"]


def test_a_torn_tar_gives_what_is_whole(tmp_path: Path) -> None:
    path = shard(tmp_path / "whole.tar", PAIRS)
    assert reasons(path) == ["a", "b", "c"]
    whole, torn = path.read_bytes(), tmp_path / "torn.tar"
    # Every member is a block of header and a block of data: c.txt is gone, its data, its header, c.png's data.
    for cut, told in (
        (5 * 1024, ["c: caption_missing", ": tar_no_end_marker"]),
        (5 * 1024 + 500, ["c: tar_truncated"]),
        (5 * 1024 + 515, ["c: tar_truncated"]),
        (4 * 1024 + 512, ["c: tar_truncated"]),
        (4 * 1024 + 5, [": tar_truncated"]),
        (6 * 1024, ["c", ": tar_no_end_marker"]),
    ):
        torn.write_bytes(whole[:cut])
        assert reasons(torn) == ["a", "b", *told], cut
    torn.write_bytes(whole[:100])
    assert reasons(torn) == [": tar_unreadable"]


def test_reading_goes_on_behind_damage(tmp_path: Path) -> None:
    whole = bytearray(shard(tmp_path / "whole.tar", PAIRS).read_bytes())
    path = tmp_path / "torn.tar"
    # The header of b.png: b.txt, which is left, is the caption of an image and no text.
    path.write_bytes(whole[:2048] + b"?" * 512 + whole[2560:])
    assert reasons(path) == ["a", "b: tar_bad_header", "c"]
    # The same by zeros, which look like the end of an archive.
    path.write_bytes(whole[:2048] + bytes(1024) + whole[3072:])
    assert reasons(path) == ["a", "b: tar_trailing_data", "c"]
    # One bit of a name: without the checksum, b's image would be another's.
    path.write_bytes(whole[:2048] + b"c" + whole[2049:])
    assert reasons(path) == ["a", "b: tar_bad_header", "c"]
    # What looks like a member inside a member's data stands at no border of blocks.
    inside = bytes(100) + member("x.txt", b"no text of its own")
    path.write_bytes(whole[:2048] + b"?" * 512 + padded(inside) + whole[3072:])
    assert reasons(path) == ["a", "b: tar_bad_header", "c"]
    # A size that leads far past the end, and one that is no number.
    for size in (b"77777777777\0", b"\x80" + b"\x7f" * 11, b"-0000000001\0", b"0000000x001\0"):
        lie = header(b"x.png", 0, size_field=size)
        path.write_bytes(whole[:4096] + lie + whole[4096:])
        told = reasons(path)
        assert [key for key in told if ":" not in key] == ["a", "b", "c"] and len(told) == 4, (size, told)
        assert told[-1].endswith("tar_bad_header") or "x: tar_bad_header" in told


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_long_name_that_lies_about_its_length(tmp_path: Path, kind: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lie = header(b"././@LongLink", 48 << 20, kind=kind)
    path = shard(tmp_path / "s.tar", [*pair("a"), lie, *pair("b")])
    # The file is as long as it claims, so only a limit helps.
    with path.open("r+b") as stream:
        stream.truncate(64 << 20)
    # So many zeros stand for what was never written.
    assert reasons(path) == ["a", "b", ": tar_bad_header", ": tar_truncated"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


def test_plain_members_are_found_at_once(tmp_path: Path) -> None:
    """As the walk finds them one by one: it would fall back to that in silence."""
    data = shard(tmp_path / "s.tar", [*pair("a"), *pair("b"), ("c.txt", b"x" * 700)]).read_bytes()
    with (tmp_path / "s.tar").open("rb") as stream:
        members = list(TarWalk(stream.fileno()))
    found = tar._plain_members(data, 0, len(data))
    assert [member for member, _ in found.values()] == members and len(members) == 5
    assert list(found) == [member.offset for member in members]


def test_archives_glued_together(tmp_path: Path) -> None:
    one = shard(tmp_path / "one.tar", pair("a"), end=bytes(10240)).read_bytes()
    two = shard(tmp_path / "two.tar", pair("b")).read_bytes()
    path = tmp_path / "glued.tar"
    path.write_bytes(one + two)
    assert reasons(path) == ["a", "b", ": tar_trailing_data"]


def test_what_is_no_tar_is_one_fault(tmp_path: Path) -> None:
    path = tmp_path / "page.tar"
    for content, reason in (
        (b"<html>" * 300, "tar_unreadable"),
        (b"\x1f\x8b\x08" * 300, "tar_unreadable"),
        (b"", "tar_unreadable"),
        # An archive without members, and what a file system kept of a lost one.
        (bytes(10240), "tar_empty"),
        (bytes(20480), "tar_empty tar_truncated"),
    ):
        path.write_bytes(content)
        assert reasons(path) == [f": {each}" for each in reason.split()]


def test_a_hash_that_belongs_to_another_image(tmp_path: Path) -> None:
    """Compared where it is asked for, and nowhere else: a downloader may have stated hashes of the originals."""

    def hashed(key: str, of: bytes) -> list[tuple[str, bytes] | bytes]:
        facts = {"caption": "c", "sha256": hashlib.sha256(of).hexdigest().upper()}
        return [(f"{key}.json", json.dumps(facts).encode()), (f"{key}.png", make_image())]

    members = [*hashed("a", b"other"), *hashed("b", make_image()), *pair("c"), ("d.txt", b"a text")]
    path = shard(tmp_path / "s.tar", members)
    assert reasons(path) == ["a", "b", "c", "d"]
    assert reasons(path, "sha256") == ["a: image_other", "b", "c: hash_missing", "d"]


def test_a_caption_that_belongs_to_another_image(tmp_path: Path) -> None:
    def stated(key: str, text: str, other: str) -> list[tuple[str, bytes] | bytes]:
        facts = {"caption": other, "sha256": hashlib.sha256(make_image()).hexdigest()}
        return [(f"{key}.json", json.dumps(facts).encode()), *pair(key, text.encode())]

    path = shard(
        tmp_path / "s.tar", [*stated("a", "the caption", "the caption "), *stated("b", "new", "old")]
    )
    assert reasons(path) == ["a", "b"]
    assert reasons(path, "sha256") == ["a", "b: caption_other"]


def interleaved(*elements: object) -> bytes:
    return json.dumps({"elements": elements}).encode()


TEXT, IMAGE = {"type": "text", "text": "some text"}, {"type": "image", "image": "img0.png"}


def test_an_interleaved_document(tmp_path: Path) -> None:
    other = {"type": "image", "image": "img1.png"}
    document = interleaved(other, TEXT, IMAGE, {"type": "text", "text": " more"}, other)
    members = [("a.img0.png", make_image()), ("a.json", document), ("a.img1.png", make_image(9, (16, 8)))]
    found = only(shard(tmp_path / "s.tar", members))
    assert found.texts == ("some text", " more") and found.elements == (-1, 0, -2, 1, -1)
    assert [(stored.width, stored.height) for stored in found.images] == [(16, 8), (8, 8)]
    members = [("a.img0.png", make_image()), ("a.json", interleaved(TEXT))]
    assert only(shard(tmp_path / "s.tar", members)).notes == ("interleaved_unused_image",)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (interleaved({"type": "image", "image": "img1.png"}), "interleaved_ref"),
        (interleaved({"type": "image", "image": "../a.img0.png"}), "interleaved_ref"),
        (interleaved({"type": "image", "image": "/etc/passwd"}), "interleaved_ref"),
        (interleaved({"type": "image", "image": "https://example.org/a.png"}), "interleaved_ref"),
        (interleaved({"type": "image", "image": "json"}), "interleaved_ref"),
        (interleaved(), "interleaved_empty"),
        (interleaved({"type": "text", "text": " "}), "interleaved_empty"),
        (interleaved({"type": "sound", "sound": "x"}), "interleaved_ref"),
        (interleaved({"type": "sound", "sound": "sound0.npy"}), "interleaved_ref"),
        (interleaved({"type": "sound"}), "interleaved_element"),
        (interleaved({"type": "text", "text": ["a"]}), "interleaved_element"),
        (interleaved("text"), "interleaved_element"),
        (b'{"elements": {}}', "interleaved_element"),
        (interleaved(*[IMAGE] * 257), "interleaved_too_long"),
        (interleaved(*[{"type": "text", "text": "x" * 20_000}] * 101), "text_oversize"),
        (b"{", "json_invalid"),
    ],
)
def test_interleaved_documents_that_are_none(tmp_path: Path, document: bytes, reason: str) -> None:
    members = [("a.img0.png", make_image()), ("a.json", document), *pair("b")]
    assert reasons(shard(tmp_path / "s.tar", members)) == [f"a: {reason}", "b"]


def test_one_broken_image_takes_its_document_along(tmp_path: Path) -> None:
    members = [("a.json", interleaved(TEXT, IMAGE)), ("a.img0.png", make_image()[:-20])]
    assert reasons(shard(tmp_path / "s.tar", members)) == ["a: image_truncated"]


def latent(values: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def test_latents(tmp_path: Path) -> None:
    values = np.ones((4, 2, 3), np.float16)
    members = [("a.latent.npy", latent(values)), ("a.txt", b"c"), ("b.npy", latent(values)), ("b.txt", b"c")]
    # Beside an image, an array that does not call itself a latent may be anything.
    members += [("c.jpg", make_image()), ("c.npy", b"an embedding"), ("c.txt", b"c")]
    path = shard(tmp_path / "s.tar", members)
    assert [found.images[0].latent_channels for found in scan(path)] == [4, 4, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (latent(np.ones((4, 2, 3))), "latent_dtype"),
        (latent(np.array([[[{}]]], dtype=object), allow_pickle=True), "latent_dtype"),
        (latent(np.ones((2, 3), np.float32)), "latent_shape"),
        (latent(np.ones((4, 0, 3), np.float32)), "latent_shape"),
        (latent(np.ones((4, 2, 3), np.float32))[:-1], "latent_corrupt"),
        (latent(np.ones((4, 2, 3), np.float32))[:20], "latent_corrupt"),
        (b"\x80\x04K\x01.", "latent_corrupt"),
        (b"", "latent_corrupt"),
    ],
)
def test_latents_that_are_none(tmp_path: Path, data: bytes, reason: str) -> None:
    path = shard(tmp_path / "s.tar", [("a.latent.npy", data), ("a.txt", b"c")])
    assert reasons(path) == [f"a: {reason}"]


def test_what_is_mended_is_noted(tmp_path: Path) -> None:
    members = [
        *pair("a", b"\xef\xbb\xbfa\r\ncat\r\n"),
        *pair("b", b"a\x07\x1b cat"),
        *pair("e", "two\x0bfelt\x0ccats\x1cin\x1fone\x85row".encode()),
        *pair("c"), ("c.json", b"{"),
        ("d.png", make_image()), ("d.json", b' \t{"caption": "NaN is read", "score": NaN}\r\n'),
    ]  # fmt: skip
    found = list(scan(shard(tmp_path / "s.tar", members)))
    assert [(one.text, one.notes) for one in found if isinstance(one, RawSample)] == [
        ("a\ncat", ("newlines_normalised", "bom_stripped")),
        ("a cat", ("controls_removed",)),
        ("two felt cats in one row", ("white_space_normalised",)),
        ("a caption", ("json_invalid",)),
        ("NaN is read", ()),
    ]


def test_lines_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_LINE", 100)
    path = tmp_path / "t.jsonl"
    lines = {
        b'\xef\xbb\xbf{"text": "one"}\r': "",
        b"{": "json_invalid",
        b"": "line_blank",
        b'{"other": 1}': "text_missing",
        b'{"text": 3}': "text_missing",
        b'{"text": " "}': "text_empty",
        b'{"text": "\\ud800"}': "text_encoding",
        b'{"text": "\xff"}': "text_encoding",
        b'["text"]': "json_invalid",
        b'{"text": "a"} {"text": "b"}': "json_invalid",
        b"[" * 90: "json_invalid",
        b'{"text": "' + b"x" * 350 + b'"}': "text_oversize",
        '{"text": "a\u2028b"}'.encode(): "",
    }
    path.write_bytes(b"\n".join(lines))
    found = list(scan(path))
    assert [one.reason if isinstance(one, Fault) else "" for one in found] == list(lines.values())
    assert [one.key for one in found] == [f"line {number}" for number in range(len(lines))]
    content = path.read_bytes()
    assert [content[one.offset :].split(b"\n")[0] for one in found] == list(lines)
    path.write_bytes(b"")
    assert reasons(path) == [": shard_empty"]


def test_what_a_shard_is_called() -> None:
    names = ("a.tar", "a.TAR", "a.jsonl", "a_stats.json", "a.tar.gz", "a.parquet", "README")
    assert [is_shard(Path(name)) for name in names] == [True, True, True, False, False, False, False]


def test_random_damage_never_ends_a_run_nor_mixes_samples(tmp_path: Path) -> None:
    rng = random.Random(5)
    members: list[tuple[str, bytes] | bytes] = []
    for number in range(12):
        image = make_image(10 * number, (8 + number, 9))
        facts = {"caption": f"number {number}", "sha256": hashlib.sha256(image).hexdigest()}
        members += [(f"{number}.json", json.dumps(facts).encode()), (f"{number}.png", image)]
    good = shard(tmp_path / "good.tar", members).read_bytes()
    path = tmp_path / "bad.tar"
    for _ in range(300):
        data, first = bytearray(good), rng.randrange(len(good))
        last = min(len(good), first + rng.choice((1, 100, 512, 1024, 5000)))
        damage = rng.randrange(4)
        if damage == 0:
            data[first:last] = rng.randbytes(last - first)
        elif damage == 1:
            del data[first:last]
        elif damage == 2:
            data[first:first] = data[first:last]
        else:
            del data[first:]
        path.write_bytes(data)
        found = list(scan(path, "sha256"))
        assert found == list(scan(path, "sha256"))
        for one in found:
            if isinstance(one, RawSample) and one.images:
                number = one.images[0].width - 8
                assert one.images[0].height == 9
                # Random bytes may have fallen into a caption, but it is never that of another image.
                assert one.text == f"number {number}" or one.text not in [f"number {n}" for n in range(12)]
