"""Real data to webdataset shards: OUT/train, OUT/held_out and OUT/prepared.json, whole or not at all.

The only importer of scikit-learn (handwritten digits) and pydoc_data (the reference text inside CPython).
"""

from __future__ import annotations

import collections
import contextlib
import io
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
from transfusion.data.prepare.folders import Collection, collect_folder, collect_lines, picture_sample
from transfusion.data.shards.webdataset import Sample, sample_key, write_shards
from transfusion.errors import UserError
from transfusion.files import fingerprint, unfinished_path

TRAIN, HELD_OUT, RECORD = "train", "held_out", "prepared.json"
HELD_OUT_DIGITS = 297
_HELD_OUT_DOCS = 0.1
_HELD_OUT_OTHERS = 0.02
# Raised whenever the same source would give other shards.
_FORMAT = 3


@dataclass(frozen=True, slots=True)
class PrepareResult:
    """What stands in `out`. skipped: samples left out, by reason. reused: it was there already."""

    out: Path
    train: int
    held_out: int
    skipped: dict[str, int]
    reused: bool


def prepare(source: str, out: Path, *, seed: int = 0, held_out: float | None = None) -> PrepareResult:
    """Write the shards of a source, or find that they are there already.

    source: `digits`, `python-docs`, a folder of pictures with .txt captions, or a .jsonl file of texts.
    held_out: share kept for evaluation (default 0.1 of python-docs' characters, else 0.02 of the samples; the
    digits have a fixed split). Raises UserError for an unknown source, or when `out` holds something else.
    """
    collection = _collect(source, seed, held_out)
    mark = fingerprint({"format": _FORMAT, **collection.identity})
    if existing := _existing(out, mark):
        return existing
    with _unfinished(out) as folder:
        counts = {
            TRAIN: _write(collection.train, folder / TRAIN),
            HELD_OUT: _write(collection.held_out, folder / HELD_OUT),
        }
        if not counts[TRAIN]:
            raise UserError(f"{source} has no usable sample{_reasons(collection)}")
        skipped = dict(collections.Counter(fault.reason for fault in collection.skipped))
        record = {"fingerprint": mark, "source": source, "seed": seed, **counts, "skipped": skipped}
        record["skipped_samples"] = [[fault.key, fault.reason] for fault in collection.skipped]
        (folder / RECORD).write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return PrepareResult(out, counts[TRAIN], counts[HELD_OUT], skipped, reused=False)


def _collect(source: str, seed: int, held_out: float | None) -> Collection:
    if held_out is not None and not 0 <= held_out < 1:
        raise UserError(f"held-out share must be at least 0 and below 1, got {held_out}")
    if source == "digits":
        if held_out is not None:
            raise UserError(
                f"the digits have a fixed split of {HELD_OUT_DIGITS} held out; leave the share away"
            )
        return collect_digits(seed)
    if source == "python-docs":
        return collect_python_docs(_HELD_OUT_DOCS if held_out is None else held_out)
    path, share = Path(source), _HELD_OUT_OTHERS if held_out is None else held_out
    if path.is_dir():
        return collect_folder(path, seed=seed, held_out=share)
    if path.is_file() and path.suffix == ".jsonl":
        return collect_lines(path, seed=seed, held_out=share)
    what = "is neither a folder nor a .jsonl file" if path.exists() else "does not exist"
    raise UserError(f"{source} {what}; name digits, python-docs, a folder of pictures or a .jsonl file")


def collect_digits(seed: int) -> Collection:
    """Scikit-learn's 1,797 scans of 8 x 8 pixels, bright ink on black, split by digit alike."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn; pip install scikit-learn") from None
    scans = load_digits()
    labels: NDArray[np.int64] = scans.target
    held = held_out_digits(labels, seed)
    # Scans have 17 grey levels, 0 to 16.
    pictures = np.round(scans.images * (255 / 16)).astype(np.uint8)
    identity = {"kind": "digits", "seed": seed, "held_out": HELD_OUT_DIGITS, "count": len(labels)}
    return Collection(
        identity, _digits(pictures[~held], labels[~held]), _digits(pictures[held], labels[held])
    )


def held_out_digits(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which scans are held out: of each digit its share, the first in a seeded permutation."""
    order = np.random.RandomState(seed).permutation(len(labels))
    exact = np.bincount(labels) * (HELD_OUT_DIGITS / len(labels))
    wanted = np.floor(exact).astype(int)
    # What rounding down leaves goes to the digits that lost most by it.
    most_short = np.argsort(wanted - exact, kind="stable")[: HELD_OUT_DIGITS - wanted.sum()]
    wanted[most_short] += 1
    held = np.zeros(len(labels), dtype=bool)
    for digit, count in enumerate(wanted):
        held[order[labels[order] == digit][:count]] = True
    return held


def _digits(pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[Sample]:
    for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        height, width = picture.shape
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, format="PNG")
        captions = captions_for(label, sample_key(number))
        facts = {"captions": captions, "label": label, "width": width, "height": height}
        yield picture_sample(stream.getvalue(), "png", captions[0], **facts)


def collect_python_docs(held_out: float) -> Collection:
    """The reference text inside the running CPython: a document a topic; the last characters are held out."""
    from pydoc_data.topics import topics

    train, held = cut_off_end([topics[name] for name in sorted(topics)], held_out)
    identity = {"kind": "python-docs", "held_out": held_out, "python": platform.python_version()}
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
    count = 0

    def counted() -> Iterator[Sample]:
        nonlocal count
        for sample in samples:
            count += 1
            yield sample

    write_shards(counted(), folder)
    return count


def _existing(out: Path, mark: str) -> PrepareResult | None:
    """The same preparation, if `out` holds it; None if `out` is free. Raises UserError for anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    if not any(out.iterdir()):
        return None
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    if record.get("fingerprint") != mark:
        holds = f"another preparation ({record['source']})" if "source" in record else "other files"
        raise UserError(f"{out} holds {holds}; choose another folder, or remove it first")
    return PrepareResult(out, record[TRAIN], record[HELD_OUT], record["skipped"], reused=True)


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
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reasons(collection: Collection) -> str:
    counts = collections.Counter(fault.reason for fault in collection.skipped)
    return f" ({', '.join(f'{reason}: {count}' for reason, count in counts.items())})" if counts else ""
