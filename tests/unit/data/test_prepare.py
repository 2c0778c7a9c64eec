"""Real data to shards: the splits, the bytes, and that nothing is overwritten or half-written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from sklearn.datasets import load_digits

from transfusion.data.images.decode import decode
from transfusion.data.prepare.digits import digit_in_caption
from transfusion.data.prepare.prepare import cut_off_end, prepare, validation_digits
from transfusion.data.shards.scan import RawSample, scan
from transfusion.data.shards.webdataset import expand
from transfusion.errors import UserError


def read(folder: Path) -> list[RawSample]:
    found = [sample for path in expand(f"{folder}/*.tar") for sample in scan(path)]
    assert all(isinstance(sample, RawSample) for sample in found)
    return [sample for sample in found if isinstance(sample, RawSample)]


def test_digits_are_the_scans_with_fitting_captions(data: Path) -> None:
    scans = load_digits()
    train, held = read(data / "digits/train"), read(data / "digits/validation")
    assert (len(train), len(held)) == (1500, 297)
    split = validation_digits(scans.target, 0)
    shards = expand(f"{data}/digits/validation/*.tar")
    assert len(shards) == 1
    stored = shards[0].read_bytes()
    for sample, image, label in zip(held, scans.images[split], scans.target[split], strict=True):
        assert digit_in_caption(sample.text) == label
        (stored_image,) = sample.images
        values = decode(stored[stored_image.offset :][: stored_image.size], channels=1, image_size=8)
        assert np.array_equal(values[0], np.round(image * 255 / 16).astype(np.uint8))


def test_digits_are_split_alike() -> None:
    labels = load_digits().target
    held = validation_digits(labels, 0)
    assert held.sum() == 297
    assert np.abs(np.bincount(labels[held]) - np.bincount(labels) * 297 / 1797).max() < 1
    assert (held != validation_digits(labels, 1)).any()


def test_json_tells_whether_image_and_caption_belong_together(data: Path) -> None:
    import webdataset

    shards = [str(path) for path in expand(f"{data}/digits/validation/*.tar")]
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        facts = json.loads(sample["json"])
        assert facts["sha256"] == hashlib.sha256(sample["png"]).hexdigest()
        assert facts["caption"] == sample["txt"].decode() and facts["label"] in range(10)
        assert (facts["width"], facts["height"]) == (8, 8)


def test_reference_text_is_complete_and_a_tenth_is_validation(data: Path) -> None:
    from pydoc_data.topics import topics

    train = "".join(sample.text for sample in read(data / "docs/train"))
    held = "".join(sample.text for sample in read(data / "docs/validation"))
    assert train + held == "".join(topics[name] for name in sorted(topics))
    assert abs(len(held) / len(train + held) - 0.1) < 0.01


def test_the_end_is_cut_at_paragraphs() -> None:
    texts = ["a" * 50, "one\n\ntwo\n\nthree" * 3]
    before, end = cut_off_end(texts, 0.2)
    assert "".join(before + end) == "".join(texts) and before[-1].endswith("\n\n")
    assert cut_off_end(texts, 0.0) == (texts, [])


def test_a_second_run_changes_nothing_and_a_third_folder_has_the_same_bytes(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "digits"
    first = prepare("digits", out)
    assert not first.reused and (first.train, first.validation) == (1500, 297)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare("digits", out).reused
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for path in out.rglob("*.tar"):
        assert path.read_bytes() == (data / "digits" / path.relative_to(out)).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        prepare("digits", tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        prepare("digits", tmp_path / "out/mine.txt")
    prepare("digits", tmp_path / "digits")
    with pytest.raises(UserError, match="another preparation"):
        prepare("digits", tmp_path / "digits", seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "out"]


def test_a_folder_of_images(tmp_path: Path) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for number in range(40):
        path = source / ("sub" if number % 2 else ".") / f"{number}.png"
        Image.new("RGB", (9, 8), (number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"image {number}\n")
    (source / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    (source / "torn.txt").write_text("torn")
    (source / "alone.webp").write_bytes(b"x")
    (source / "0.txt").write_text("  ")
    result = prepare(str(source), out, validation=0.25)
    assert result.skipped == {"image_truncated": 1, "caption_missing": 1, "caption_empty": 1}
    train, held = read(out / "train"), read(out / "validation")
    assert len(train) + len(held) == 39 == result.train + result.validation and 2 <= len(held) <= 20
    assert {sample.text for sample in train + held} == {f"image {number}" for number in range(1, 40)}
    record = json.loads((out / "prepared.json").read_text())
    assert ["torn.jpg", "image_truncated"] in record["skipped_samples"]


def test_lines_of_text(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(200)) + "{broken\n")
    result = prepare(str(source), tmp_path / "out")
    assert result.train + result.validation == 200 and result.skipped == {"json_invalid": 1}
    assert 0 < result.validation < 15


@pytest.mark.parametrize("source", ["nowhere", "nowhere.jsonl"])
def test_unknown_sources_are_one_line(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; name digits, spoken-digits, python-docs"):
        prepare(str(tmp_path / source), tmp_path / "out")
    with pytest.raises(UserError, match="no images"):
        prepare(str(tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match="fixed split"):
        prepare("digits", tmp_path / "out", validation=0.5)
    assert not list(tmp_path.iterdir())


def captioned(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    (folder / name).with_suffix(".txt").write_text(f"caption of {name}")


def image_bytes(kind: str, shade: int = 100, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 200, 30)).save(stream, kind, **options)
    return stream.getvalue()


def test_what_pillow_reads_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    kinds = {
        "bmp": "BMP",
        "gif": "GIF",
        "tiff": "TIFF",
        "ppm": "PPM",
        "tga": "TGA",
        "jfif": "JPEG",
        "jpe": "JPEG",
    }
    if features.check("avif"):
        kinds["avif"] = "AVIF"
    for extension, kind in kinds.items():
        captioned(tmp_path / "f", f"a.{extension}.{extension}", image_bytes(kind))
    captioned(tmp_path / "f", "a GIF called.jpg", image_bytes("GIF"))
    captioned(tmp_path / "f", "a JPEG called.png", image_bytes("JPEG"))
    result = prepare(str(tmp_path / "f"), tmp_path / "out", validation=0)
    assert result.train == len(kinds) + 2 and result.skipped == {}
    (shard,) = expand(f"{tmp_path}/out/train/*.tar")
    stored = shard.read_bytes()
    for sample in read(tmp_path / "out/train"):
        (place,) = sample.images
        values = decode(stored[place.offset : place.offset + place.size], channels=3, image_size=16)
        assert np.abs(values.reshape(3, -1).mean(1) - (100, 200, 30)).max() < 4, sample.text


def test_what_nobody_reads_is_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for number in range(3):
        captioned(folder, f"{number}.png", image_bytes("PNG"))
    captioned(folder, "phone.heic", b"\0\0\0\x18ftypheic")
    (folder / "film.mp4").write_bytes(b"")
    (folder / "lone.txt").write_text("its image is gone")
    (folder / "no caption.png").write_bytes(image_bytes("PNG"))
    (folder / ".DS_Store").write_bytes(b"")
    result = prepare(str(folder), tmp_path / "out", validation=0)
    assert result.train == 3
    assert result.skipped == {
        "file_not_read": 1,
        "image_missing": 1,
        "format_not_read": 1,
        "caption_missing": 1,
    }
    named = json.loads((tmp_path / "out/prepared.json").read_text())["skipped_samples"]
    assert sorted(named) == [
        ["film.mp4", "file_not_read"],
        ["lone.txt", "image_missing"],
        ["no caption.png", "caption_missing"],
        ["phone.heic", "format_not_read"],
    ]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    captioned(tmp_path / "f", "0.png", image_bytes("PNG"))
    captioned(tmp_path / "elsewhere", "1.png", image_bytes("PNG"))
    (tmp_path / "f/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "f")
    (tmp_path / "f/broken").symlink_to(tmp_path / "nowhere")
    assert prepare(str(tmp_path / "f"), tmp_path / "out", validation=0).train == 2


def test_a_name_that_is_no_utf8_is_carried(tmp_path: Path) -> None:
    captioned(tmp_path / "f", "0.png", image_bytes("PNG"))
    folder = os.fsencode(tmp_path / "f")
    for extension, data in ((b"png", image_bytes("PNG")), (b"txt", b"a coffee house")):
        Path(os.fsdecode(folder + b"/caf\xe9." + extension)).write_bytes(data)
    Path(os.fsdecode(folder + b"/\xff.mp4")).write_bytes(b"")
    result = prepare(str(tmp_path / "f"), tmp_path / "out", validation=0)
    assert result.train == 2 and result.skipped == {"file_not_read": 1}
    assert r'"file": "caf\\xe9.png"' in next((tmp_path / "out/train").glob("*.tar")).read_bytes().decode(
        "latin-1"
    )
    assert prepare(str(tmp_path / "f"), tmp_path / "out", validation=0).reused


@pytest.mark.parametrize(("images", "validation"), [(2, 1), (12, 1), (1, 0)])
def test_a_few_images_keep_one_for_validation(tmp_path: Path, images: int, validation: int) -> None:
    for number in range(images):
        captioned(tmp_path / "f", f"{number}.png", image_bytes("PNG", shade=number))
    result = prepare(str(tmp_path / "f"), tmp_path / "out")
    assert (result.train, result.validation) == (images - validation, validation)


def test_an_image_that_was_changed_is_prepared_anew(tmp_path: Path) -> None:
    captioned(tmp_path / "f", "0.png", image_bytes("PNG", 1))
    prepare(str(tmp_path / "f"), tmp_path / "out")
    file = tmp_path / "f/0.png"
    before = file.stat()
    file.write_bytes(image_bytes("PNG", 2))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(UserError, match="holds another preparation"):
        prepare(str(tmp_path / "f"), tmp_path / "out")


def test_a_file_of_several_captions_is_told_and_read_as_one_or_as_many(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("L", (32, 32), 40 * number).save(folder / f"{number}.png")
        text = "a cat\n\nit sits \nblack" if number else "a dog"
        (folder / f"{number}.txt").write_text(text)
    told = prepare(str(folder), tmp_path / "one", validation=0)
    assert told.notes == (
        "3 captions have several lines, and each was taken as one caption; where every line is a caption of its own,"
        " prepare with --one-caption-a-line",
    )
    many = prepare(str(folder), tmp_path / "many", validation=0, one_caption_a_line=True)
    assert many.notes == ()
    (shard,) = (tmp_path / "many" / "train").glob("*.tar")
    with tarfile.open(shard) as tar:
        members = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
        facts = [json.loads(member.read()) for member in members if member]
    assert [each["captions"] for each in facts] == [["a dog"], *[["a cat", "it sits", "black"]] * 3]
    with pytest.raises(UserError, match="remove --one-caption-a-line"):
        prepare("digits", tmp_path / "digits", one_caption_a_line=True)


def test_sizes_are_proposed_where_a_square_cuts_much_away(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (64, 32) if number % 2 else (33, 32)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a scene")
    (note,) = prepare(str(folder), tmp_path / "out", validation=0).notes
    assert note == (
        "a square takes 27% of the pixels away from these images, codec.image_sizes=[40x40,32x56] 8%, and"
        " codec.resize=pad none"
    )
