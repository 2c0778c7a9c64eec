"""Latents beside images: complete, resumable, the same by many processes, and refused when another codec's."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfusion.cli.main import main
from transfusion.codec import encoded, open_codec
from transfusion.codec_train import encode as encoding
from transfusion.codec_train.encode import encode_shards
from transfusion.config import CodecConfig, Config, SourceConfig
from transfusion.data.images.decode import decode
from transfusion.data.images.latents import read_record, read_tokens, record_path
from transfusion.data.index.source_index import build_index
from transfusion.data.loading.loader import Loader
from transfusion.data.shards.sample import RawSample, SampleError
from transfusion.data.shards.scan import scan
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.losses.chameleon import ChameleonLoss
from transfusion.parallel.collectives import global_counts
from transfusion.sequence.tokenizer import Tokenizer

from .conftest import members, pair_of, tar_of

Settings = Callable[..., CodecConfig]


def test_latents_stand_beside_their_images(
    shards: Path, kl_folder: Path, settings: Settings, tmp_path: Path
) -> None:
    config = settings(kl_folder)
    records = encode_shards(config, [f"{shards}/*.tar"], tmp_path / "out")
    assert [(record.encoded, record.left_out) for record in records] == [
        (6, {}), (5, {"image_corrupt": 1}), (0, {}),
    ]  # fmt: skip
    before, after = members(shards), members(tmp_path / "out")
    added = {name for name in after if name.endswith(".latent.npy")}
    # The damaged sample is left out with all its members.
    kept = {name: data for name, data in before.items() if not name.startswith("000010005.")}
    assert {name: data for name, data in after.items() if name not in added} == kept and len(added) == 11
    codec = open_codec(config)
    for name in added:
        image = decode(before[name.replace("latent.npy", "png")], channels=3, image_size=16)
        stored = np.load(io.BytesIO(after[name]))
        wanted = codec.encode(torch.from_numpy(image)[None])[0].numpy()
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, wanted, rtol=2e-3, atol=2e-3)


def test_tokens_stand_beside_their_images(
    shards: Path, vq_folder: Path, settings: Settings, tmp_path: Path
) -> None:
    encode_shards(settings(vq_folder), [f"{shards}/00000.tar"], tmp_path / "out")
    after, codec = members(tmp_path / "out"), open_codec(settings(vq_folder))
    image = decode(after["000000003.png"], channels=3, image_size=16)
    stored = np.load(io.BytesIO(after["000000003.tokens.npy"]))
    assert stored.dtype == np.uint16 and stored.shape == (4, 4)
    assert np.array_equal(stored, codec.encode(torch.from_numpy(image)[None])[0].numpy())


def test_a_killed_encoding_goes_on(
    shards: Path,
    kl_folder: Path,
    settings: Settings,
    write_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, told = settings(kl_folder), []

    def killed(job: Any) -> Any:
        if job.target.name == "00001.tar":
            raise KeyboardInterrupt
        return honest(job)

    honest = encoding.encode_shard
    monkeypatch.setattr(encoding, "encode_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(config, [f"{shards}/*.tar"], tmp_path / "out")
    monkeypatch.undo()
    encode_shards(
        config,
        [f"{shards}/*.tar"],
        tmp_path / "out",
        progress=lambda name, record, reused: told.append((name, reused)),
    )
    assert told == [("00000.tar", True), ("00001.tar", False), ("00002.tar", False)]
    encode_shards(config, [f"{shards}/*.tar"], tmp_path / "whole")
    for shard in (tmp_path / "whole").iterdir():
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    # Latents of former shards are replaced, not kept beside the new ones.
    other = settings(write_folder("kl", tmp_path / "other", seed=1))
    encode_shards(other, [f"{tmp_path}/out/*.tar"], tmp_path / "again")
    assert members(tmp_path / "again").keys() == members(tmp_path / "out").keys()
    with pytest.raises(UserError, match=f"holds latents of codec {config.fingerprint} at 16x16 pixels"):
        encode_shards(other, [f"{shards}/*.tar"], tmp_path / "out")


@pytest.mark.slow
def test_processes_write_the_same_shards(
    shards: Path, kl_folder: Path, settings: Settings, tmp_path: Path
) -> None:
    for workers in (1, 2):
        encode_shards(settings(kl_folder), [f"{shards}/*.tar"], tmp_path / str(workers), workers=workers)
    one, two = members(tmp_path / "1"), members(tmp_path / "2")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("npy"):
            # Another number of threads may sum in another order.
            np.testing.assert_allclose(
                np.load(io.BytesIO(one[name])), np.load(io.BytesIO(two[name])), rtol=2e-3, atol=2e-3
            )


def test_what_cannot_be_encoded_is_refused(
    shards: Path, kl_folder: Path, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "00000.tar").write_bytes(b"no tar")
    cases = [
        ([f"{shards}/00000.tar", f"{tmp_path}/00000.tar"], "2 shards are called 00000.tar"),
        ([f"{tmp_path}/00000.tar"], "cannot be read"),
    ]
    for specs, told in cases:
        with pytest.raises(UserError, match=told):
            encode_shards(settings(kl_folder), specs, tmp_path / "out")
    with pytest.raises(UserError, match="device 'gpu' does not exist"):
        encode_shards(settings(kl_folder), [f"{shards}/*.tar"], tmp_path / "out", device="gpu")
    with pytest.raises(UserError, match=r"is the folder of 00000\.tar"):
        encode_shards(settings(kl_folder), [f"{shards}/*.tar"], shards)
    with pytest.raises(UserError, match="has no latents to write"):
        encode_shards(CodecConfig(), [f"{shards}/*.tar"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def loader(codec: CodecConfig, folder: Path, tokenizer: Tokenizer, family: str = "transfusion") -> Loader:
    config = Config.model_validate(
        {
            "model": {"patch_size": 1, "family": family},
            "codec": codec.as_dict(),
            "data": {
                "sources": [{"name": "images", "shards": f"{folder}/0000[01].tar"}],
                "sequence_length": 320 if codec.kind == "pixels" else 96,
                "global_batch_size": 2,
                "max_bad_fraction": 0.5,
            },
        }
    )
    config = config.with_vocabulary(tokenizer.vocabulary)
    return Loader(config, config.data.sources, tokenizer, rank=0, world_size=1)


def test_latents_of_another_codec_are_refused(
    shards: Path, kl_folder: Path, settings: Settings, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config, out = settings(kl_folder), tmp_path / "out"
    encode_shards(config, [f"{shards}/0000[01].tar"], out)
    with loader(config, out, tokenizer) as mine:
        groups = {group.values.dtype: group for batch in mine.next_step() for group in batch.media}
    assert groups[torch.float32].values.shape[1:] == (4, 4, 4)
    rescaled = settings(kl_folder, scale=[2.0])
    for other, told in (
        (rescaled, f"made by codec {config.fingerprint}, not by {rescaled.fingerprint}"),
        (CodecConfig(image_size=16), f"{config.fingerprint}, not by codec.kind=pixels"),
        (settings(kl_folder, image_size=32), "images of 16x16 pixels, and the configuration has 32x32"),
        (
            config.model_copy(update={"resize": "pad"}),
            "brought to size by crop, and the configuration has pad",
        ),
    ):
        with pytest.raises(UserError, match=told):
            loader(other, out, tokenizer)
    assert read_record(out / "00000.tar") is not None
    record_path(out / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"unknown codec \(00000_latents.json is missing\)"):
        loader(config, out, tokenizer)


def test_tokens_stand_in_the_place_of_their_images(
    shards: Path, vq_folder: Path, settings: Settings, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A Chameleon's batches from tokens are those from images, encoded; another codec's are refused."""
    config, out = settings(vq_folder), tmp_path / "out"
    encode_shards(config, [f"{shards}/0000[01].tar"], out)
    codec = open_codec(config)
    found = []
    for folder in (shards, out):
        with loader(config, folder, tokenizer, family="chameleon") as mine:
            batches = mine.next_step()
        groups = [group for batch in batches for group in batch.media]
        found.append(groups)
        counts = global_counts(batches, ChameleonLoss(config, codec))
        assert counts["image"] == 16 * sum(len(group.values) for group in groups)
    images, tokens = found
    assert {group.values.dtype for group in images} == {torch.uint8}
    assert {group.values.dtype for group in tokens} == {torch.int32}
    assert tokens[0].values.shape[1:] == (4, 4)
    for one, other in zip(images, tokens, strict=True):
        assert torch.equal(one.patch_slot_IP, other.patch_slot_IP)
        assert torch.equal(encoded(one, codec), encoded(other, codec))
    fewer = config.model_copy(update={"codebook_size": int(max(group.values.max() for group in tokens))})
    with loader(fewer, out, tokenizer, family="chameleon") as mine:
        assert sum(batch.counts.faults for batch in mine.next_step()) > 0
    with pytest.raises(UserError, match=f"made by codec {config.fingerprint}"):
        loader(config.model_copy(update={"fingerprint": "0" * 12}), out, tokenizer, family="chameleon")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4), np.float32), "latent_dtype"),
        (np.zeros((1, 4, 4), np.uint16), "latent_shape"),
        (np.full((4, 4), 9, np.uint16), "token_range"),
        (np.full((4, 4), -1, np.int32), "token_range"),
    ],
)
def test_bad_tokens_have_their_reason(array: Any, reason: str) -> None:
    stream = io.BytesIO()
    np.save(stream, array)
    with pytest.raises(SampleError, match=reason):
        read_tokens(stream.getvalue(), 9)
    with pytest.raises(SampleError, match="latent_corrupt"):
        np.save(stream := io.BytesIO(), np.zeros((4, 4), np.uint16))
        read_tokens(stream.getvalue()[:-1], 9)


def test_latents_of_several_sizes(
    kl_folder: Path, settings: Settings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Each image at the size that it takes; trained on as such, in one batch; refused where sizes are others."""
    shapes = {"wide": (30, 15), "tall": (17, 34), "even": (20, 20)}
    samples = []
    for number, (name, shape) in enumerate(list(shapes.items()) * 4):
        stream = io.BytesIO()
        Image.new("RGB", shape, (20 * number, 100, 50)).save(stream, "PNG")
        samples.append({"png": stream.getvalue(), "txt": name.encode()})
    write_shards(samples, tmp_path / "images")
    config = settings(kl_folder, image_sizes=["16x16", "16x32", "32x16"])
    (record,) = encode_shards(config, [f"{tmp_path}/images/*.tar"], tmp_path / "out")
    assert record.encoded == 12 and read_record(next((tmp_path / "out").glob("*.tar"))) == record
    stored = {
        name: np.load(io.BytesIO(data))
        for name, data in members(tmp_path / "out").items()
        if "latent" in name
    }
    codec, latent_shapes = open_codec(config), [(4, 4, 8), (4, 8, 4), (4, 4, 4)]
    for number, (name, latent) in enumerate(sorted(stored.items())):
        assert latent.shape == latent_shapes[number % 3], name
        _, height, width = latent.shape
        image = np.broadcast_to(
            np.array([20 * number, 100, 50], np.uint8)[:, None, None], (3, 4 * height, 4 * width)
        )
        alone = codec.encode(torch.from_numpy(image.copy())[None])[0].numpy()
        np.testing.assert_allclose(latent, alone, rtol=5e-3, atol=5e-3)
    with loader(config, tmp_path / "out", tokenizer) as opened:
        (batch,) = opened.next_step()
        assert sorted(tuple(group.values.shape[1:]) for group in batch.media) == sorted(latent_shapes)
    for others in (["16x16"], ["16x16", "16x32", "32x32"]):
        other = settings(kl_folder, image_sizes=others)
        with pytest.raises(
            UserError, match="are of images of 16x16, 16x32, 32x16 pixels, and the configuration has"
        ):
            loader(other, tmp_path / "out", tokenizer)
        with pytest.raises(UserError, match=r"at 16x16, 16x32, 32x16 pixels \(crop\), not of"):
            encode_shards(other, [f"{tmp_path}/images/*.tar"], tmp_path / "out")


def keys_of(path: Path) -> list[str]:
    return [found.key for found in scan(path) if isinstance(found, RawSample)]


def test_it_sees_the_samples_that_the_index_sees(kl_folder: Path, settings: Settings, tmp_path: Path) -> None:
    """Archives glued together, damage between them, odd owners, long names, names in capitals."""
    long = "a" * 180
    first = tar_of(
        tmp_path / "a.tar", pair_of("000", 1) + pair_of("001", 2), uid=1 << 40, gid=1 << 33, mtime=1 << 40
    )
    second = tar_of(tmp_path / "b.tar", pair_of(f"folder/{long}", 3) + pair_of("Cafe\u0301", 4))
    damaged = tar_of(tmp_path / "c.tar", pair_of("004", 5)).replace(b"004.png", b"004.pnG", 1)
    third = tar_of(
        tmp_path / "d.tar",
        [("005.PNG", pair_of("x", 6)[0][1]), ("005.txt", b"six"), ("006.txt", b"a"), ("006.txt", b"b")],
    )
    shard = tmp_path / "s" / "00000.tar"
    shard.parent.mkdir()
    shard.write_bytes(first + second + damaged + third)
    (record,) = encode_shards(settings(kl_folder), [str(shard)], tmp_path / "out")
    target = tmp_path / "out" / "00000.tar"
    assert keys_of(target) == keys_of(shard) == ["000", "001", f"folder/{long}", "Cafe\u0301", "005"]
    assert record.encoded == 5 and record.left_out["duplicate_member"] == 1
    assert all(found.images[0].latent_channels for found in scan(target) if isinstance(found, RawSample))


def test_a_source_that_was_written_anew_is_encoded_again(
    kl_folder: Path, settings: Settings, tmp_path: Path
) -> None:
    shard, out, seen = tmp_path / "s" / "00000.tar", tmp_path / "out", list[bool]()

    def encode() -> str:
        encode_shards(settings(kl_folder), [str(shard)], out, progress=lambda *told: seen.append(told[2]))
        return next(found.text for found in scan(out / "00000.tar") if isinstance(found, RawSample))

    tar_of(shard, pair_of("000", 10))
    before = shard.stat()
    assert encode() == "shade 10" == encode()
    tar_of(shard, pair_of("000", 20))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == before.st_size
    assert encode() == "shade 20" and seen == [False, True, False]
    # Another time alone is another state of the same bytes.
    os.utime(shard, (5, 5))
    assert encode() == "shade 20" and seen[-1]


def test_latents_beside_the_record_of_others_are_refused(
    kl_folder: Path, settings: Settings, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    codec = settings(kl_folder)
    for name, shade in (("one", 10), ("two", 20)):
        tar_of(tmp_path / name / "00000.tar", pair_of("000", shade))
        encode_shards(codec, [str(tmp_path / name / "00000.tar")], tmp_path / f"{name}-out")
    shutil.copy(tmp_path / "two-out" / "00000.tar", tmp_path / "one-out")
    source = SourceConfig(name="s", shards=str(tmp_path / "one-out" / "*.tar"))
    with pytest.raises(UserError, match=r"are not those that 00000_latents\.json tells of"):
        build_index(source, tokenizer, patches=16, sequence_length=128, codec=codec)


def test_what_an_index_leaves_out_is_not_encoded(kl_folder: Path, settings: Settings, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(stream, "PNG")
    image, caption, long = stream.getvalue(), b"a picture", "k" * 250
    stream = io.BytesIO()
    np.save(stream, np.zeros((4, 4, 4), np.float16))
    shard = tmp_path / "s" / "A.TAR"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as writer:
        for name, data in (
            ("a.png", image), ("a.txt", caption), (f"{long}.png", image), (f"{long}.txt", caption), ("b.txt", caption),
            ("c.latent.npy", stream.getvalue()), ("c.txt", caption), ("b.png", image),
        ):  # fmt: skip
            encoding._add(writer, name, data)
    (record,) = encode_shards(settings(kl_folder), [str(shard)], tmp_path / "out")
    # Scattered members are no text, nor is the caption of latents that cannot be made again.
    assert record.encoded == 2 and record.left_out == {"not_adjacent": 1, "image_missing": 1}
    found = list(scan(tmp_path / "out" / "A.TAR"))
    assert [(each.key, len(each.images)) for each in found if isinstance(each, RawSample)] == [
        ("a", 1),
        (long, 1),
    ]
    assert len(found) == 2


def test_files_that_are_not_encoded_are_told(
    shards: Path, kl_folder: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(shards, tmp_path / "s")
    (tmp_path / "s" / "texts.jsonl").write_text('{"text": "a"}\n')
    encode_shards(settings(kl_folder), [f"{tmp_path}/s/*"], tmp_path / "out")
    assert [line for line in caplog.messages if "are no .tar and are not read, such as" in line]
    (tmp_path / "s" / "9.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="compressed and cannot be read"):
        encode_shards(settings(kl_folder), [f"{tmp_path}/s/*"], tmp_path / "out")


def test_shards_without_an_image_of_their_own_are_refused(
    kl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "PNG")
    elements = b'{"elements": [{"type": "image", "image": "img0.png"}, {"type": "text", "text": "mirrored"}]}'
    write_shards([{"img0.png": stream.getvalue(), "json": elements}], tmp_path / "documents", per_shard=1)
    words = ["codec", "encode", str(kl_folder), f"{tmp_path}/documents/*.tar", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["transfusion", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no image was found to encode; those of interleaved documents" in capsys.readouterr().err


def test_images_that_are_all_broken_are_not_taken_for_those_of_documents(
    kl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [{"png": b"no image", "txt": b"a"}, {"png": b"nor this", "txt": b"b"}]
    write_shards(broken, tmp_path / "pairs", per_shard=2)
    words = ["codec", "encode", str(kl_folder), f"{tmp_path}/pairs/*.tar", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["transfusion", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr().err
    assert "no image could be encoded (" in told and ": 2)" in told and "interleaved" not in told
