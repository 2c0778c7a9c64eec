"""Captioned images that most systems can draw: the emoji of a colour font, with the names that Unicode gives them."""

from __future__ import annotations

import functools
import io
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, features

from transfusion.data.prepare import emoji_font, emoji_names
from transfusion.data.prepare.emoji_font import SIZE, EmojiFont
from transfusion.data.prepare.emoji_names import Emoji
from transfusion.data.prepare.folders import Collection, image_sample, validation_keys
from transfusion.data.shards.sample import Fault
from transfusion.data.shards.webdataset import Sample
from transfusion.errors import UserError, shown
from transfusion.files import digest

EMOJI = "emoji"


@dataclass(slots=True)
class _Drawing:
    """An image, and the emoji that the font draws so. The oldest stands first."""

    values: bytes
    emoji: list[Emoji]
    concept: str
    captions: list[str]


def collect_emoji(font: Path | None, *, seed: int, validation: float) -> Collection:
    """Images of 64 pixels of the emoji that a font draws. font: None looks for that of the system.

    Variants of one concept stand on the same side of the split.
    """
    opened = emoji_font.open_font(font) if font else emoji_font.find_font()
    listing = _text(emoji_names.LIST)
    known = [(path, text) for path in emoji_names.ANNOTATIONS if (text := _text(path))]
    identity = {
        "kind": EMOJI,
        "seed": seed,
        "validation": validation,
        "font": opened.digest,
        "list": digest(listing.encode()),
        "annotations": [digest(text.encode()) for _, text in known],
        "unicodedata": unicodedata.unidata_version,
        "pillow": PIL.__version__,
        **{name: features.version(name) for name in ("freetype2", "raqm", "harfbuzz")},
        "shapes": opened.shapes,
    }
    emoji = emoji_names.read_list(listing) if listing else list(emoji_names.unlisted())
    annotations = emoji_names.read_annotations(known)
    skipped: list[Fault] = []

    @functools.cache
    def drawings() -> list[_Drawing]:
        return _drawings(list(_drawn(emoji, opened, skipped)), annotations, skipped)

    @functools.cache
    def held() -> set[str]:
        return validation_keys({drawing.concept for drawing in drawings()}, seed, validation)

    def part(wanted: bool) -> Iterator[Sample]:
        for drawing in drawings():
            if (drawing.concept in held()) == wanted:
                yield _sample(drawing)

    notes = []
    if not opened.shapes:
        notes.append("this Pillow has no raqm, so there are no emoji of several characters")
    elif not listing:
        notes.append(
            "for flags and other emoji of several characters install unicode-data and prepare into another folder"
        )
    if not known:
        notes.append("for more captions an image install unicode-cldr-core and prepare into another folder")
    return Collection(identity, part(False), part(True), skipped, notes=notes)


def _text(path: Path) -> str:
    """Of a file of Unicode, or nothing where its package is not installed."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except UnicodeDecodeError:
        raise UserError(f"{shown(path)} is no UTF-8; install its package again, or remove it") from None


def _drawn(emoji: list[Emoji], font: EmojiFont, skipped: list[Fault]) -> Iterator[tuple[Emoji, bytes]]:
    """What the font can draw, with the values of its image."""
    for one in emoji:
        if values := _values(one, font):
            yield one, values
            variants = [] if one.listed or one.is_sequence else emoji_names.with_tones(one)
            yield from ((variant, values) for variant in variants if (values := _values(variant, font)))
        elif one.listed:
            skipped.append(_fault(one, _why_not_drawn(one, font)))


def _values(one: Emoji, font: EmojiFont) -> bytes | None:
    if not one.is_sequence:
        return font.draw(one.text if font.shapes else emoji_names.plain(one.text))
    return font.draw(one.text) if font.shapes and font.is_one_glyph(one.text) else None


def _why_not_drawn(one: Emoji, font: EmojiFont) -> str:
    if one.is_sequence and not font.shapes:
        return "raqm_missing"
    return "sequence_not_drawn" if font.draw(one.text) else "glyph_missing"


def _drawings(
    drawn: list[tuple[Emoji, bytes]], annotations: dict[str, list[str]], skipped: list[Fault]
) -> list[_Drawing]:
    """Each image once, with the captions of all emoji that look like it: several countries have the flag of France."""
    emoji = [one for one, _ in drawn]
    concepts = emoji_names.concepts(emoji)
    captions = emoji_names.captions(emoji, concepts, annotations)
    alike: dict[bytes, list[int]] = {}
    for number, (_, values) in enumerate(drawn):
        alike.setdefault(values, []).append(number)
    found = []
    for values, numbers in alike.items():
        numbers.sort(key=lambda number: emoji[number].version)
        skipped += [_fault(emoji[number], "drawn_alike") for number in numbers[1:]]
        said = list(dict.fromkeys(caption for number in numbers for caption in captions[number]))
        found.append(_Drawing(values, [emoji[number] for number in numbers], concepts[numbers[0]], said))
    return found


def _fault(emoji: Emoji, reason: str) -> Fault:
    return Fault(EMOJI, f"{emoji.code_points} {emoji.name}", reason)


def _sample(drawing: _Drawing) -> Sample:
    stream = io.BytesIO()
    Image.frombytes("RGB", (SIZE, SIZE), drawing.values).save(stream, format="PNG")
    first, *others = drawing.emoji
    facts: dict[str, Any] = {"captions": drawing.captions, "code_points": first.code_points}
    facts |= {"group": first.group, "subgroup": first.subgroup} if first.group else {}
    facts |= {"drawn_alike": [other.code_points for other in others]} if others else {}
    facts |= {"concept": drawing.concept, "width": SIZE, "height": SIZE}
    return image_sample(stream.getvalue(), "png", drawing.captions[0], **facts)
