"""A user's own data as samples for shards: a folder of captioned images or sounds, or a .jsonl of texts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transfusion.config.sections import MEL_HOP, SAMPLE_RATE, SOUND
from transfusion.data.images.decode import as_png
from transfusion.data.images.probe import ImageFacts, probe
from transfusion.data.planning import hash_rng
from transfusion.data.shards.sample import Fault, RawSample, SampleError, caption, utf8
from transfusion.data.shards.scan import scan
from transfusion.data.shards.validate import IMAGE_EXTENSIONS, SOUND_EXTENSIONS
from transfusion.data.shards.webdataset import Sample
from transfusion.data.sounds.files import SoundFacts
from transfusion.data.sounds.files import probe as probe_sound
from transfusion.errors import UserError, shown
from transfusion.files import file_state, name_hash, sha256
from transfusion.sequence.sizes import WORTH_TELLING, Size, mean_share_cut, propose_sizes

_SPLIT = name_hash("held out")
# Of sizes that are proposed before a configuration is known: what they are multiples of, and the largest square.
_STEP, _LARGEST_SIDE = 8, 256
# Of shapes of sounds that are proposed, in samples.
_SOUND_STEP = 4096
# Of images besides those of shards: what Pillow reads becomes a PNG, the others are told.
OTHER_EXTENSIONS = (
    "jfif", "jpe", "bmp", "dib", "gif", "tif", "tiff", "avif", "heic", "heif", "jp2", "j2k", "jxl", "ppm", "pgm",
    "pnm", "tga",
)  # fmt: skip
_SOUND_MAGIC = ((b"fLaC", "flac"), (b"R", "wav"))
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"RIFF", "webp"))


@dataclass(slots=True)
class Seen:
    """Of images that were read: height and width of each, and how many captions have several lines.

    samples: of sounds, each at 16 kHz.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    lines: int = 0
    samples: list[int] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """Each as one line with what to do."""
        if self.lines:
            yield (
                f"{self.lines} captions have several lines, and each was taken as one caption; where every line is a"
                " caption of its own, prepare with --one-caption-a-line"
            )
        if self.samples:
            longest = max(self.samples)
            shape = -(-longest // _SOUND_STEP) * _SOUND_STEP
            yield (
                f"the longest sound has {longest / SAMPLE_RATE:.2f} s; modalities=[{{name: {SOUND}, kind: mel, shapes:"
                f" [1x{shape}], patch: 1x{4 * MEL_HOP}}}] holds them all"
            )
        if not self.sizes:
            return
        height_I, width_I = np.array(self.sizes, np.int64).T
        side = _STEP * max(1, round(min(float(np.median(height_I * width_I)) ** 0.5, _LARGEST_SIDE) / _STEP))
        square, others = [Size(side, side)], propose_sizes(height_I, width_I, side=side, step=_STEP)
        lost, kept = (mean_share_cut(sizes, height_I, width_I) for sizes in (square, others))
        if lost >= WORTH_TELLING:
            yield (
                f"a square takes {lost:.0%} of the pixels away from these images, codec.image_sizes="
                f"[{','.join(map(str, others))}] {kept:.0%}, and codec.resize=pad none"
            )


@dataclass(slots=True)
class Collection:
    """Samples of the two splits, read lazily; `skipped` and `seen` fill while they are read.

    identity: plain values that change whenever the prepared shards would. notes: what to do for more of them.
    """

    identity: dict[str, Any]
    train: Iterable[Sample]
    validation: Iterable[Sample]
    skipped: list[Fault] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    notes: list[str] = field(default_factory=list)


def is_validation(key: str, seed: int, share: float) -> bool:
    """Whether the sample with this key is held out: decided by a hash, so it stays when others come or go."""
    return _draw(key, seed) < share


def validation_keys(keys: Set[str], seed: int, share: float) -> set[str]:
    """The keys that are held out, at least one of several where any are to be."""
    held = {key for key in keys if is_validation(key, seed, share)}
    if share and not held and len(keys) > 1:
        held = {min(sorted(keys), key=lambda key: _draw(key, seed))}
    return held


def _draw(key: str, seed: int) -> float:
    return float(hash_rng.uniform(seed, _SPLIT, name_hash(key))[0])


def image_sample(image: bytes, extension: str, caption: str, **facts: Any) -> Sample:
    """Members of a pair: image or sound, caption, and a KEY.json that can tell whether they belong together.

    facts: more for KEY.json; `captions` there lists further wordings.
    """
    facts = {"caption": caption, **facts, "sha256": sha256(image)}
    return {
        extension: image,
        "txt": caption.encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def collect_folder(
    folder: Path, *, seed: int, validation: float, one_caption_a_line: bool = False
) -> Collection:
    """Images and sounds below the folder, each with the caption in a .txt file of the same name beside it.

    Links are followed. A sound beside an image of the same name is not read.
    one_caption_a_line: a file holds several captions of its image.
    """
    files, unreadable = _files(folder)
    images = list(filter(_is_image, files))
    taken = {image.with_suffix("") for image in images}
    images += [path for path in files if _is_sound(path) and path.with_suffix("") not in taken]
    if not images:
        kinds = ", ".join(IMAGE_EXTENSIONS + SOUND_EXTENSIONS)
        raise UserError(f"{shown(folder)} holds no images and no sounds ({kinds}); name another folder")
    # Of links to nothing, too: there the image is missing, and no caption is alone.
    media = (path for path in (*files, *unreadable) if _is_image(path) or _is_sound(path))
    captions = {path.with_suffix(".txt") for path in media}
    read = captions.union(images)
    listing = [_signature(path, folder) for path in files if path in read]
    identity = {"kind": "folder", "files": listing, "seed": seed, "validation": validation}
    identity["one_caption_a_line"] = one_caption_a_line
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
    seen = Seen()

    def part(paths: Iterable[Path]) -> Iterator[Sample]:
        return _images(paths, folder, skipped, seen, one_caption_a_line=one_caption_a_line)

    train, kept = ([path for path in images if (path in held) == side] for side in (False, True))
    return Collection(identity, part(train), part(kept), skipped, seen)


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


def _is_sound(path: Path) -> bool:
    return _extension(path) in SOUND_EXTENSIONS


def _extension(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def _name(path: Path, folder: Path) -> str:
    """As any file can hold it: bytes that are no UTF-8 are spelt."""
    name = path.relative_to(folder).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _images(
    paths: Iterable[Path], folder: Path, skipped: list[Fault], seen: Seen, *, one_caption_a_line: bool
) -> Iterator[Sample]:
    for path in paths:
        name = _name(path, folder)
        try:
            text = caption(utf8(path.with_suffix(".txt").read_bytes()), [])
            lines = list(_lines(text))
            data, extension, facts = _stored(path)
        except FileNotFoundError:
            reason = "caption_missing"
        except OSError:
            reason = "file_unreadable"
        except SampleError as error:
            reason = str(error)
        else:
            several: dict[str, Any] = {}
            if one_caption_a_line:
                text, several = lines[0], {"captions": lines}
            seen.lines += len(lines) > 1 and not one_caption_a_line
            if isinstance(facts, SoundFacts):
                seen.samples.append(facts.samples)
                size: dict[str, Any] = {"seconds": round(facts.samples / SAMPLE_RATE, 3)}
            else:
                seen.sizes.append((facts.height, facts.width))
                size = {"width": facts.width, "height": facts.height}
            yield image_sample(data, extension, text, file=name, **size, **several)
            continue
        skipped.append(Fault(folder.name, name, reason))


def _lines(text: str) -> Iterator[str]:
    """Of a caption each line that says something."""
    for line in text.splitlines():
        with contextlib.suppress(SampleError):
            yield caption(line, [])


def _stored(path: Path) -> tuple[bytes, str, ImageFacts | SoundFacts]:
    """An image or a sound as shards hold it, and its extension there. Raises OSError and SampleError."""
    data = path.read_bytes()
    if _is_sound(path):
        facts = probe_sound(data)
        return data, next(kind for magic, kind in _SOUND_MAGIC if data.startswith(magic)), facts
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
