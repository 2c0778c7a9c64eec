"""What reading a shard finds: samples, faults, and the rules for text. Reasons are short and countable."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from transfusion.sequence.sizes import IMAGE

CAPTION_BYTES = 65_536
DOCUMENT_BYTES = 2_000_000

_BOM = "\ufeff"
_JSON_SPACE = " \t\n\r"
_raw_decode = json.JSONDecoder().raw_decode
# In bytes of UTF-8.
_LONGEST_CHARACTER = 4
# What is mended in this order: a pattern, what takes its place, and the note. Of all controls but tab and line feed
# those that part words come first, and byte order marks last: what is mended once must stay as it is.
_MENDINGS = (
    ("\r\n?", "\n", "newlines_normalised"),
    ("[\x0b\x0c\x1c-\x1f\x85]", " ", "white_space_normalised"),
    ("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", "controls_removed"),
    (f"^{_BOM}+", "", "bom_stripped"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample that is left out, and why; the same reason for all of its kind.

    key: as it stands in the shard, `line N` (from 0) of a text file, or empty where the shard itself is at fault.
    offset: of its first byte in the shard. lost: samples that it costs, as far as that can be told.
    """

    shard: str
    key: str
    reason: str
    offset: int = 0
    lost: int = 1


def reasons(faults: Iterable[Fault]) -> str:
    """The most common reasons and the samples lost, to stand behind a message; empty for no faults."""
    counts = lost_by_reason(faults).most_common(4)
    return f" ({', '.join(f'{reason}: {count}' for reason, count in counts)})" if counts else ""


def lost_by_reason(faults: Iterable[Fault]) -> collections.Counter[str]:
    """Samples that faults cost."""
    counts: collections.Counter[str] = collections.Counter()
    for fault in faults:
        counts[fault.reason] += fault.lost
    return counts


class StoredImage(NamedTuple):
    """Where an image stands in the shard, and its width and height as stored.

    latent_channels: of a precomputed latent, or of an array of another modality; 0: an image.
    """

    offset: int
    size: int
    width: int
    height: int
    latent_channels: int = 0
    modality: str = IMAGE


class RawSample(NamedTuple):
    """A text, an image with captions, or an interleaved document. An image may be an array of another modality.

    texts: the text; the captions, of which one is chosen each epoch (listed twice, chosen twice as often); or the
    texts of an interleaved document. elements: of an interleaved document only, in reading order: t >= 0 is
    texts[t], and -1 - p is images[p]. notes: what was mended or overlooked, to be counted.
    """

    key: str
    texts: tuple[str, ...]
    images: tuple[StoredImage, ...] = ()
    elements: tuple[int, ...] = ()
    offset: int = 0
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text, or the first caption."""
        return self.texts[0]


class SampleError(Exception):
    """The reason why a sample is left out, short enough to count by."""


def utf8(data: bytes) -> str:
    """The text of these bytes; no encoding is guessed. Raises SampleError."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SampleError("text_encoding") from None


def document(text: str, notes: list[str]) -> str:
    """A text document, mended; white space is part of it. Raises SampleError."""
    text = _mended(text, DOCUMENT_BYTES, notes)
    if not text.strip():
        raise SampleError("text_empty")
    return text


def piece(text: str, notes: list[str]) -> str:
    """A text among images, mended; it may be white space alone, or empty. Raises SampleError."""
    return _mended(text, DOCUMENT_BYTES, notes)


def caption(text: str, notes: list[str]) -> str:
    """A caption, mended, without white space at its ends. Raises SampleError."""
    text = _mended(text, CAPTION_BYTES, notes).strip()
    if text.startswith(_BOM):
        text = re.sub(rf"^[\s{_BOM}]+", "", text)
    if not text:
        raise SampleError("caption_empty")
    return text


def _mended(text: str, greatest: int, notes: list[str]) -> str:
    if len(text) * _LONGEST_CHARACTER <= greatest and text.isprintable():
        # So are most captions: no control, no line end, no byte order mark, no lone surrogate.
        return text
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # A lone surrogate, which JSON can spell and UTF-8 cannot.
        raise SampleError("text_encoding") from None
    if size > greatest:
        raise SampleError("text_oversize")
    if "\0" in text:
        # No one writes it: these bytes are not what they were.
        raise SampleError("text_control")
    for pattern, replacement, note in _MENDINGS:
        text, count = re.subn(pattern, replacement, text)
        if count:
            notes.append(note)
    return text


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in these bytes. Raises SampleError."""
    text = utf8(data).removeprefix(_BOM).strip(_JSON_SPACE)
    try:
        # `json.loads` does more around each, a fifth of the time with many small ones.
        value, end = _raw_decode(text)
    except (ValueError, RecursionError):
        raise SampleError("json_invalid") from None
    if end != len(text) or not isinstance(value, dict):
        raise SampleError("json_invalid")
    return value
