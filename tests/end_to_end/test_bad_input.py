"""Bad samples are counted and survived; everything else that is wrong is one line and exit code 2."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from transfusion.observe.metrics import read_metrics


def rewrite(shard: Path, changes: dict[str, bytes]) -> None:
    """Replace members of a shard by name."""
    with tarfile.open(shard) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, data in members:
            data = changes.get(member.name, data)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def undecodable(png: bytes) -> bytes:
    """An image with right checksums whose pixels cannot be inflated: only decoding finds that."""
    body = b"IDAT" + b"?" * 20
    return png[:33] + struct.pack(">I", 20) + body + struct.pack(">I", zlib.crc32(body)) + png[-12:]


@pytest.fixture
def shards(workplace: Any, tmp_path: Path) -> Path:
    """A copy of the digits' training shards, to be spoilt."""
    shutil.copytree(workplace.folder / "data/quickstart/digits/train", tmp_path / "train")
    return tmp_path / "train"


def source(folder: Path) -> str:
    return f"data.sources=[{{name: digits, shards: {folder}/*.tar}}]"


def test_a_run_survives_bad_samples_and_names_them(workplace: Any, shards: Path, tmp_path: Path) -> None:
    shard = sorted(shards.glob("*.tar"))[0]
    with tarfile.open(shard) as archive:
        names = [member.name for member in archive if member.name.endswith(".png")]
        bad = undecodable(archive.extractfile(names[3]).read())  # type: ignore[union-attr]
    caption, facts = names[5].replace(".png", ".txt"), names[3].replace(".png", ".json")
    rewrite(shard, {names[3]: bad, facts: b"{}", names[4]: b"not an image", caption: b" \n"})
    workplace.run(
        *workplace.train(
            "runs/bad", source(shards), "train.steps=30", "data.global_batch_size=16", "data.validation=[]"
        )
    )
    run = workplace.folder / "runs/bad"
    found = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    keys = {entry["key"] for entry in found}
    assert {name.removesuffix(".png") for name in names[4:6]} <= keys
    assert all(entry["reason"] and entry["shard"] == shard.name for entry in found)
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["step"] == 30
    assert last["faults"] == len([entry for entry in found if entry["key"] == names[3].removesuffix(".png")])
    assert last["faults"] > 0


def test_too_many_bad_samples_stop_a_run(workplace: Any, shards: Path) -> None:
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as archive:
            names = [member.name for member in archive if member.name.endswith(".png")]
        rewrite(shard, dict.fromkeys(names[::3], b"not an image"))
    said = workplace.run(*workplace.train("runs/too-bad", source(shards), "train.steps=3"), code=2)
    assert "Traceback" not in said and "max_bad_fraction" in said


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["data.sources=[{name: digits, shards: gone/*.tar}]"], "gone/*.tar"),
        (["data.sources=[]"], "data.sources"),
        (["data.global_batch_size=3", "train.zero.stage=4"], "train.zero.stage"),
        (["codec.image_size=7"], "image_size"),
    ],
)
def test_what_cannot_train_says_why(workplace: Any, overrides: list[str], word: str) -> None:
    said = workplace.run(*workplace.train("runs/refused", *overrides), code=2)
    assert word in said and "Traceback" not in said
    assert not (workplace.folder / "runs/refused").exists()


def complaint(said: str) -> str:
    """The one line in which all ranks together say what is wrong."""
    (line,) = [line for line in said.splitlines() if line.startswith("transfusion: ")]
    return line


@pytest.mark.slow
def test_rows_that_the_ranks_cannot_share(workplace: Any) -> None:
    said = workplace.run(*workplace.train("runs/refused", "data.global_batch_size=5"), processes=2, code=1)
    assert "data.global_batch_size" in complaint(said)
    assert not (workplace.folder / "runs/refused").exists()


@pytest.mark.slow
def test_what_only_the_main_process_cannot_write_ends_all(workplace: Any) -> None:
    run = workplace.folder / "runs/unwritable"
    (run / "metrics.jsonl").mkdir(parents=True)
    said = workplace.run(*workplace.train("runs/unwritable"), processes=2, code=1)
    assert "Is a directory" in complaint(said)


@pytest.mark.slow
def test_bad_samples_of_all_ranks_are_judged_together(workplace: Any, shards: Path) -> None:
    """Images that only decoding finds bad pass the index; each rank alone has read too few to judge."""
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as archive:
            images = [member for member in archive if member.name.endswith(".png")]
            bad = {member.name: undecodable(archive.extractfile(member).read()) for member in images[::2]}  # type: ignore[union-attr]
        rewrite(shard, bad | {name.replace(".png", ".json"): b"{}" for name in bad})
    command = workplace.train("runs/too-torn", source(shards), "train.steps=30", "data.validation=[]")
    said = workplace.run(*command, processes=2, code=1)
    assert "data.max_bad_fraction" in complaint(said) and "runs/too-torn/quarantine.jsonl" in complaint(said)
    named = (workplace.folder / "runs/too-torn/quarantine.jsonl").read_text().splitlines()
    assert len(named) > 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_model_folder_with_a_missing_file(workplace: Any, trained: str, name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(workplace.folder / trained / "export", model)
    (model / name).unlink()
    out = tmp_path / "images"
    command = ["sample", str(model), "--prompt", "a", "--out", str(out), "--weights", "raw"]
    said = workplace.run(*command, code=2)
    assert name in said and "Traceback" not in said
    assert not out.exists()


def test_images_and_guidance_that_cannot_be_used(workplace: Any, trained: str, tmp_path: Path) -> None:
    text = tmp_path / "a.png"
    text.write_text("not an image")
    assert "a.png" in workplace.run("caption", f"{trained}/export", str(text), code=2)
    command = ["sample", f"{trained}/export", "--prompt", "a", "--out", str(tmp_path / "x")]
    assert "guidance" in workplace.run(*command, "--cfg", "-1", code=2)
    assert "steps" in workplace.run(*command, "--steps", "1001", code=2)
    assert not (tmp_path / "x").exists()
