"""A user's own data as samples for shards: a folder of captioned images, or a .jsonl of texts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfusion.data.images.decode import as_png
from transfusion.data.images.probe import ImageFacts, probe
from transfusion.data.planning import hash_rng
from transfusion.data.shards.sample import Fault, RawSample, SampleError, caption, utf8
from transfusion.data.shards.scan import scan
from transfusion.data.shards.validate import IMAGE_EXTENSIONS
from transfusion.data.shards.webdataset import Sample
from transfusion.errors import UserError, shown
from transfusion.files import file_state, name_hash, sha256

_SPLIT = name_hash("held out")
# Of images besides those of shards: what Pillow reads becomes a PNG, the others are told.
OTHER_EXTENSIONS = (
    "jfif", "jpe", "bmp", "dib", "gif", "tif", "tiff", "avif", "heic", "heif", "jp2", "j2k", "jxl", "ppm", "pgm",
    "pnm", "tga",
)  # fmt: skip
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"RIFF", "webp"))


@dataclass(slots=True)
class Collection:
    """Samples of the two splits, read lazily; `skipped` fills while they are read.

    identity: plain values that change whenever the prepared shards would.
    """

    identity: dict[str, Any]
    train: Iterable[Sample]
    validation: Iterable[Sample]
    skipped: list[Fault] = field(default_factory=list)


def is_validation(key: str, seed: int, share: float) -> bool:
    """Whether the sample with this key is held out: decided by a hash, so it stays when others come or go."""
    return _draw(key, seed) < share


def _draw(key: str, seed: int) -> float:
    return float(hash_rng.uniform(seed, _SPLIT, name_hash(key))[0])


def image_sample(image: bytes, extension: str, caption: str, **facts: Any) -> Sample:
    """Members of a pair: image, caption, and a KEY.json that can tell whether they belong together.

    facts: more for KEY.json; `captions` there lists further wordings.
    """
    facts = {"caption": caption, **facts, "sha256": sha256(image)}
    return {
        extension: image,
        "txt": caption.encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def collect_folder(folder: Path, *, seed: int, validation: float) -> Collection:
    """Images below the folder, each with the caption in a .txt file of the same name beside it. Links are followed."""
    files, unreadable = _files(folder)
    images = list(filter(_is_image, files))
    if not images:
        raise UserError(
            f"{shown(folder)} holds no images ({', '.join(IMAGE_EXTENSIONS)}); name another folder"
        )
    # Of links to nothing, too: there the image is missing, and no caption is alone.
    captions = {image.with_suffix(".txt") for image in filter(_is_image, (*files, *unreadable))}
    read = captions.union(images)
    listing = [_signature(path, folder) for path in files if path in read]
    identity = {"kind": "folder", "files": listing, "seed": seed, "validation": validation}
    told = [(path, "image_missing" if _extension(path) == "txt" else "file_not_read") for path in files]
    told += [(path, "file_unreadable") for path in unreadable]
    skipped = [
        Fault(folder.name, _name(path, folder), reason)
        for path, reason in told
        if path not in read and not path.name.startswith(".")
    ]
    keys = {path: path.relative_to(folder).with_suffix("").as_posix() for path in images}
    held = {path for path in images if is_validation(keys[path], seed, validation)}
    if validation and not held and len(images) > 1:
        # Of a small folder the one that a larger share would keep first.
        held = {min(images, key=lambda path: _draw(keys[path], seed))}
    return Collection(
        identity,
        _images([path for path in images if path not in held], folder, skipped),
        _images([path for path in images if path in held], folder, skipped),
        skipped,
    )


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below, in the order of their names, and what cannot be read: folders, links to nothing, pipes.

    A folder that several links lead to is read once.
    """
    found, unreadable, seen = list[Path](), list[Path](), set[str]()

    def refuse(error: OSError) -> None:
        unreadable.append(Path(error.filename))

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for path in (Path(place, name) for name in names):
            (found if path.is_file() else unreadable).append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix()), sorted(unreadable)


def _is_image(path: Path) -> bool:
    return _extension(path) in (*IMAGE_EXTENSIONS, *OTHER_EXTENSIONS)


def _extension(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def _name(path: Path, folder: Path) -> str:
    """As any file can hold it: bytes that are no UTF-8 are spelt."""
    name = path.relative_to(folder).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _images(paths: Iterable[Path], folder: Path, skipped: list[Fault]) -> Iterator[Sample]:
    for path in paths:
        name = _name(path, folder)
        try:
            text = caption(utf8(path.with_suffix(".txt").read_bytes()), [])
            data, extension, facts = _stored(path)
        except FileNotFoundError:
            reason = "caption_missing"
        except OSError:
            reason = "file_unreadable"
        except SampleError as error:
            reason = str(error)
        else:
            yield image_sample(data, extension, text, file=name, width=facts.width, height=facts.height)
            continue
        skipped.append(Fault(folder.name, name, reason))


def _stored(path: Path) -> tuple[bytes, str, ImageFacts]:
    """An image as shards hold it, and its extension there. Raises OSError and SampleError."""
    data = path.read_bytes()
    kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), "")
    if data and not kind:
        data, kind = as_png(data), "png"
    return data, kind, probe(data)


def collect_lines(path: Path, *, seed: int, validation: float) -> Collection:
    """Texts in the `text` field of the lines of a .jsonl file."""
    identity = {
        "kind": "jsonl",
        "files": [_signature(path, path.parent)],
        "seed": seed,
        "validation": validation,
    }
    skipped: list[Fault] = []

    def split(wanted: bool) -> Iterator[Sample]:
        for found in scan(path):
            if is_validation(found.key, seed, validation) != wanted:
                continue
            if isinstance(found, RawSample):
                yield {"txt": found.text.encode()}
            else:
                skipped.append(found)

    return Collection(identity, split(False), split(True), skipped)


def _signature(path: Path, folder: Path) -> list[Any]:
    return [_name(path, folder), *file_state(path).values()]
