"""Real data to webdataset shards: OUT/train, OUT/validation and OUT/prepared.json, whole or not at all.

The only importer of scikit-learn (handwritten digits) and pydoc_data (the reference text inside CPython).
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import json
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transfusion.data.prepare.digits import captions_for
from transfusion.data.prepare.emoji import EMOJI, collect_emoji
from transfusion.data.prepare.folders import Collection, collect_folder, collect_lines, image_sample
from transfusion.data.prepare.spoken_digits import SPOKEN_DIGITS, collect_spoken_digits
from transfusion.data.shards.sample import reasons
from transfusion.data.shards.webdataset import Sample, sample_key, write_shards
from transfusion.errors import UserError, shown
from transfusion.files import fingerprint, unfinished_path

TRAIN, VALIDATION, RECORD = "train", "validation", "prepared.json"
VALIDATION_DIGITS = 297
_VALIDATION_DOCS = 0.1
_VALIDATION_OTHERS = 0.02
# Raised whenever the same source would give other shards.
_FORMAT = 5


@dataclass(frozen=True, slots=True)
class PrepareResult:
    """What stands in `out`. skipped: samples left out, by reason. reused: it was there already. notes: what to do."""

    out: Path
    train: int
    validation: int
    skipped: dict[str, int]
    reused: bool
    notes: tuple[str, ...] = ()


def prepare(
    source: str,
    out: Path,
    *,
    seed: int = 0,
    validation: float | None = None,
    one_caption_a_line: bool = False,
    font: Path | None = None,
) -> PrepareResult:
    """Write the shards of a source, or find that they are there already.

    source: `digits`, `spoken-digits`, `python-docs`, `emoji`, a folder of images or sounds with .txt captions, or a
    .jsonl file of texts.
    validation: share kept for evaluation (default 0.1 of python-docs' characters, 0.02 of the concepts of emoji, else
    0.02 of the samples; the digits have a fixed split). one_caption_a_line: of a folder, each line of a .txt is a
    caption of its image. font: of the emoji, in place of the system's. Raises UserError for an unknown source, or when
    `out` holds something else.
    """
    collection = _collect(source, seed, validation, one_caption_a_line, font)
    mark = fingerprint({"format": _FORMAT, **collection.identity})
    if existing := _existing(out, mark):
        return existing
    parts = {TRAIN: collection.train, VALIDATION: collection.validation}
    with _unfinished(out) as folder:
        counts = {name: _write(samples, folder / name) for name, samples in parts.items()}
        if not counts[TRAIN]:
            held = counts[VALIDATION]
            remedy = f" for training: all {held} are kept for validation; lower --validation" if held else ""
            raise UserError(f"{shown(source)} has no usable sample{remedy}{reasons(collection.skipped)}")
        skipped = dict(collections.Counter(fault.reason for fault in collection.skipped))
        record = {"fingerprint": mark, "source": source, "seed": seed, **counts, "skipped": skipped}
        record["skipped_samples"] = [[fault.key, fault.reason] for fault in collection.skipped]
        # In ASCII, since the source may have a name that is no UTF-8.
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")
    notes = (*collection.notes, *collection.seen.notes())
    return PrepareResult(out, counts[TRAIN], counts[VALIDATION], skipped, reused=False, notes=notes)


def _collect(
    source: str, seed: int, validation: float | None, one_caption_a_line: bool, font: Path | None
) -> Collection:
    if validation is not None and not 0 <= validation < 1:
        raise UserError(f"validation share must be at least 0 and below 1, got {validation}")
    if one_caption_a_line and not Path(source).is_dir():
        raise UserError(f"{shown(source)} is no folder of images; remove --one-caption-a-line")
    if font and source != EMOJI:
        raise UserError(f"a font is for the source {EMOJI} alone, not for {shown(source)}; remove --font")
    if source == "digits":
        if validation is not None:
            raise UserError(
                f"the digits have a fixed split, {VALIDATION_DIGITS} for validation; remove --validation"
            )
        return collect_digits(seed)
    if source == SPOKEN_DIGITS:
        if validation is not None:
            raise UserError("of the spoken digits one voice is for validation; remove --validation")
        return collect_spoken_digits()
    if source == "python-docs":
        return collect_python_docs(_VALIDATION_DOCS if validation is None else validation)
    path, share = Path(source), _VALIDATION_OTHERS if validation is None else validation
    if source == EMOJI:
        return collect_emoji(font, seed=seed, validation=share)
    if path.is_dir():
        return collect_folder(path, seed=seed, validation=share, one_caption_a_line=one_caption_a_line)
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return collect_lines(path, seed=seed, validation=share)
    what = "is neither a folder nor a .jsonl file" if path.exists() else "does not exist"
    raise UserError(
        f"{shown(source)} {what}; name digits, spoken-digits, python-docs, emoji, a folder of images or sounds, or a"
        " .jsonl file"
    )


def collect_digits(seed: int) -> Collection:
    """Scikit-learn's 1,797 scans of 8 x 8 pixels, bright ink on black, split by digit alike."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn; pip install scikit-learn") from None
    scans = load_digits()
    labels: NDArray[np.int64] = scans.target
    held = validation_digits(labels, seed)
    # Scans have 17 grey levels, 0 to 16.
    images = np.round(scans.images * (255 / 16)).astype(np.uint8)
    identity = {"kind": "digits", "seed": seed, "validation": VALIDATION_DIGITS, "count": len(labels)}
    return Collection(identity, _digits(images[~held], labels[~held]), _digits(images[held], labels[held]))


def validation_digits(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which scans are held out: of each digit its share, the first in a seeded permutation."""
    order = np.random.RandomState(seed).permutation(len(labels))
    exact = np.bincount(labels) * (VALIDATION_DIGITS / len(labels))
    wanted = np.floor(exact).astype(int)
    # What rounding down leaves goes to the digits that lost most by it.
    most_short = np.argsort(wanted - exact, kind="stable")[: VALIDATION_DIGITS - wanted.sum()]
    wanted[most_short] += 1
    held = np.zeros(len(labels), dtype=bool)
    for digit, count in enumerate(wanted):
        held[order[labels[order] == digit][:count]] = True
    return held


def _digits(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        height, width = image.shape
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format="PNG")
        captions = captions_for(label, sample_key(number))
        facts = {"captions": captions, "label": label, "width": width, "height": height}
        yield image_sample(stream.getvalue(), "png", captions[0], **facts)


def collect_python_docs(validation: float) -> Collection:
    """The reference text inside the running CPython: a document a topic; the last characters are held out."""
    from pydoc_data.topics import topics

    train, held = cut_off_end([topics[name] for name in sorted(topics)], validation)
    identity = {"kind": "python-docs", "validation": validation, "python": platform.python_version()}
    identity["text"] = fingerprint(topics)
    return Collection(
        identity, [{"txt": text.encode()} for text in train], [{"txt": text.encode()} for text in held]
    )


def cut_off_end(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """(beginning, end): about this share of the characters in the end, cut between texts or paragraphs."""
    start = (1 - share) * sum(map(len, texts))
    before: list[str] = []
    for number, text in enumerate(texts):
        if len(text) > start:
            borders = [0, *(match.end() for match in re.finditer(r"\n\n+", text)), len(text)]
            cut = min(borders, key=lambda border: abs(border - start))
            return [*before, *filter(None, [text[:cut]])], [*filter(None, [text[cut:]]), *texts[number + 1 :]]
        before.append(text)
        start -= len(text)
    return before, []


def _write(samples: Iterable[Sample], folder: Path) -> int:
    numbers = itertools.count()
    # Not strict: a number is taken only behind a sample, so the next one is how many there were.
    write_shards((sample for sample, _ in zip(samples, numbers, strict=False)), folder)
    return next(numbers)


def _existing(out: Path, mark: str) -> PrepareResult | None:
    """The same preparation, if `out` holds it; None if `out` is free. Raises UserError for anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{shown(out)} is a file; name a folder")
    if not any(out.iterdir()):
        return None
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    if record.get("fingerprint") != mark:
        holds = f"another preparation ({shown(record['source'])})" if "source" in record else "other files"
        raise UserError(f"{shown(out)} holds {holds}; choose another folder, or remove it first")
    return PrepareResult(out, record[TRAIN], record[VALIDATION], record["skipped"], reused=True)


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well, and vanishes otherwise."""
    folder = unfinished_path(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        # An empty folder gives way; one that filled meanwhile does not.
        folder.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {shown(out)}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
