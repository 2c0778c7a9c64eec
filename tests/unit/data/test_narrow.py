"""What can be read can be written, and is then read as the same: names and texts of every kind."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from transfusion.config import SourceConfig
from transfusion.data.index.source_index import build_index
from transfusion.data.prepare.prepare import prepare
from transfusion.data.shards.sample import Fault, RawSample, caption, document
from transfusion.data.shards.scan import scan
from transfusion.data.shards.shard import LocalShard
from transfusion.data.shards.webdataset import expand
from transfusion.errors import UserError
from transfusion.sequence.tokenizer import Tokenizer

stream = io.BytesIO()
Image.new("L", (8, 8), 100).save(stream, "PNG")
PNG = stream.getvalue()


def write(path: Path, *members: tuple[str, bytes], pax: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as writer:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), pax or {}
            writer.addfile(member, io.BytesIO(data))
    return path


def captioned(folder: Path, name: str, text: str = "a caption") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(PNG)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")


@pytest.mark.parametrize(
    "text", ["\ufeff\ufeffa", "\x01\ufeffa", "\r\ufeffa", " \ufeff \ufeff a ", "\ufeff\n\x0ba\x85\r\n"]
)
def test_a_text_that_is_mended_stays_as_it_is(text: str) -> None:
    for mend in (caption, document):
        once = mend(text, [])
        notes: list[str] = []
        assert mend(once, notes) == once and not notes


def test_a_caption_is_prepared_and_indexed_as_the_same(tmp_path: Path) -> None:
    captioned(tmp_path / "f", "a", "\ufeff \ufeffa cat\r\n")
    prepare(str(tmp_path / "f"), tmp_path / "out", validation=0)
    (shard,) = expand(f"{tmp_path}/out/train/*.tar")
    for verify in ("none", "sha256"):
        (found,) = scan(shard, verify)  # type: ignore[arg-type]
        assert isinstance(found, RawSample) and found.text == "a cat" and not found.notes


def test_members_of_a_long_key_are_judged_alike(tmp_path: Path) -> None:
    key = "k" * 251
    members = ((f"{key}.png", PNG), (f"{key}.json", b'{"caption": "c", "captions": ["c", "d"]}'))
    (found,) = scan(write(tmp_path / "a.tar", *members, (f"{key}.latent.npy", b"")))
    assert isinstance(found, Fault) and found.reason.startswith("latent_")
    (found,) = scan(write(tmp_path / "a.tar", *members))
    assert isinstance(found, RawSample) and found.key == key and found.texts == ("c", "d")
    found, *_ = scan(write(tmp_path / "a.tar", *((f"kkkkk{name}", data) for name, data in members)))
    assert isinstance(found, Fault) and found.reason == "name_unsafe"


def test_a_record_with_a_long_name_hides_none_behind_it(tmp_path: Path) -> None:
    key = "folder/" + "k" * 120
    path = write(tmp_path / "a.tar", (f"{key}.txt", b"text"), pax={f"SCHILY.xattr.user.{'x' * 250}": "1"})
    (found,) = scan(path)
    assert isinstance(found, RawSample) and found.key == key
    # Of a record that lies nobody knows what it says.
    path.write_bytes(path.read_bytes().replace(b" SCHILY", b"?SCHILY"))
    assert "tar_bad_header" in {found.reason for found in scan(path) if isinstance(found, Fault)}


def test_a_shard_with_a_long_name_has_an_index(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for last in "ab":
        write(tmp_path / f"{'é' * 120}{last}.tar", ("a.txt", last.encode()))
    source = SourceConfig(name="s", shards=f"{tmp_path}/*.tar")
    for _ in range(2):
        index = build_index(source, tokenizer, patches=1, sequence_length=64)
        assert [tokenizer.decode(index.text_ids(n).tolist()) for n in range(2)] == ["a", "b"]
    assert len(list(tmp_path.glob("*.index"))) == 2


def test_a_folder_with_a_name_that_is_no_utf8_is_prepared(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n"))
    captioned(folder, "a")
    for _ in range(2):
        assert prepare(str(folder), tmp_path / "out", validation=0).train == 1
    assert json.loads((tmp_path / "out" / "prepared.json").read_text("ascii"))["source"] == str(folder)


def test_messages_are_one_line_whatever_a_file_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "a\nb\x1b[1m"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no images") as told:
        prepare(str(folder), tmp_path / "out")
    assert str(told.value).isprintable() and str(LocalShard(folder / "é.tar")).isprintable()


def test_what_is_no_file_is_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for name in ("a", "link", "itself", "pipe"):
        captioned(folder, name)
    for name, target in (("link", "gone"), ("itself", "itself.png")):
        (folder / f"{name}.png").unlink()
        (folder / f"{name}.png").symlink_to(folder / target)
    (folder / "pipe.png").unlink()
    os.mkfifo(folder / "pipe.png")
    result = prepare(str(folder), tmp_path / "out", validation=0)
    assert result.train == 1 and result.skipped == {"file_unreadable": 3}
    named = json.loads((tmp_path / "out/prepared.json").read_text())["skipped_samples"]
    assert sorted(name for name, _ in named) == ["itself.png", "link.png", "pipe.png"]


def test_a_folder_that_two_links_lead_to_is_read_once(tmp_path: Path) -> None:
    captioned(tmp_path / "elsewhere", "a")
    (tmp_path / "f").mkdir()
    for link in ("one", "two"):
        (tmp_path / "f" / link).symlink_to(tmp_path / "elsewhere")
    assert prepare(str(tmp_path / "f"), tmp_path / "out", validation=0).train == 1


def test_a_folder_of_which_all_is_held_out_is_told_so(tmp_path: Path) -> None:
    captioned(tmp_path / "f", "a")
    (tmp_path / "f/b.png").write_bytes(PNG)
    with pytest.raises(
        UserError, match=r"all 1 are kept for validation; lower --validation \(caption_missing: 1\)"
    ):
        prepare(str(tmp_path / "f"), tmp_path / "out", validation=0.99)


def test_lines_in_a_file_with_capitals_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "T.JSONL").write_text('{"text": "a"}\n')
    assert prepare(str(tmp_path / "T.JSONL"), tmp_path / "out", validation=0).train == 1


def test_white_space_between_images_is_mended_too(tmp_path: Path) -> None:
    words = ["\r\n", "\x01", "\x85", "end"]
    elements = [
        part
        for word in words
        for part in ({"type": "text", "text": word}, {"type": "image", "image": "img0.png"})
    ]
    content = json.dumps({"elements": elements}).encode()
    (found,) = scan(write(tmp_path / "a.tar", ("a.json", content), ("a.img0.png", PNG)))
    assert isinstance(found, RawSample) and found.texts == ("\n", " ", "end")
    assert found.elements == (0, -1, -1, 1, -1, 2, -1)


def test_a_line_that_says_nothing_costs_no_image(tmp_path: Path) -> None:
    captioned(tmp_path / "f", "a", "a cat\n\ufeff\n\x01\nand a dog")
    result = prepare(str(tmp_path / "f"), tmp_path / "out", validation=0)
    assert result.train == 1 and not result.skipped
