"""A user's own data as samples for shards: a folder of captioned images, or a .jsonl of texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfusion.data.images.probe import probe
from transfusion.data.planning import hash_rng
from transfusion.data.shards.sample import Fault, RawSample, SampleError, utf8
from transfusion.data.shards.scan import scan
from transfusion.data.shards.validate import IMAGE_EXTENSIONS
from transfusion.data.shards.webdataset import Sample
from transfusion.errors import UserError
from transfusion.files import name_hash, sha256

_SPLIT = name_hash("held out")


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
    return bool(hash_rng.uniform(seed, _SPLIT, name_hash(key))[0] < share)


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
    """Images below the folder, each with the caption in a .txt file of the same name beside it."""
    images = sorted(
        (path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}); name another folder")
    files = [file for image in images for file in (image, image.with_suffix(".txt"))]
    listing = [_signature(file, folder) for file in files if file.is_file()]
    identity = {"kind": "folder", "files": listing, "seed": seed, "validation": validation}
    skipped: list[Fault] = []
    parts: dict[bool, list[Path]] = {False: [], True: []}
    for path in images:
        key = path.relative_to(folder).with_suffix("").as_posix()
        parts[is_validation(key, seed, validation)].append(path)
    train, held = (_images(paths, folder, skipped) for paths in parts.values())
    return Collection(identity, train, held, skipped)


def _images(paths: Iterable[Path], folder: Path, skipped: list[Fault]) -> Iterator[Sample]:
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            caption = utf8(path.with_suffix(".txt").read_bytes()).strip()
            data = path.read_bytes()
            facts = probe(data)
            if not caption:
                raise SampleError("caption_empty")
        except FileNotFoundError:
            reason = "caption_missing"
        except OSError:
            reason = "file_unreadable"
        except SampleError as error:
            reason = str(error)
        else:
            extension = path.suffix.lower().lstrip(".")
            yield image_sample(data, extension, caption, file=name, width=facts.width, height=facts.height)
            continue
        skipped.append(Fault(folder.name, name, reason))


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
    status = path.stat()
    return [path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns]
