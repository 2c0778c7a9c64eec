"""The images that an autoencoder is trained on: all that shards hold, with or without a caption."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from transfusion.codec_train.images import ImageSet
from transfusion.errors import UserError


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as writer:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            writer.addfile(member, io.BytesIO(data))
    return path


def test_captions_are_not_needed(tmp_path: Path) -> None:
    members = {"0.png": png(1), "0.cls": b"7", "1.png": png(2), "2.txt": b"a text", "3.png": b"no image"}
    members |= {"cat.4.png": png(3), "cat.5.png": png(4), "6.img0.png": png(5), "6.json": b"{}"}
    images = ImageSet(str(write(tmp_path / "a.tar", members)), channels=3, image_size=8)
    assert len(images) == 5 and images.left_out == 1
    (batch,) = images.in_order(8)
    assert batch[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    images.close()


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no image; name"):
        ImageSet(str(write(tmp_path / "a.tar", {"0.txt": b"a text"})), channels=3, image_size=8)
