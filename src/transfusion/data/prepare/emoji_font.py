"""The colour emoji font of the system, and its glyphs as small images on white. Pillow draws them."""

from __future__ import annotations

import functools
import io
import math
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from transfusion.errors import UserError, shown
from transfusion.files import digest

# Of an image, and what stays white around the glyph on each side.
SIZE, MARGIN = 64, 2
# Debian, Arch and Alpine, Fedora, then a user's own, macOS, and Windows as WSL shows it.
PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji-fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "/mnt/c/Windows/Fonts/seguiemj.ttf",
)
_REMEDY = "install fonts-noto-color-emoji, or name one with --font"
_SFNT = (b"\0\1\0\0", b"OTTO", b"true")
# Of outlines, which any size would do for.
_OUTLINE_SIZE = 128
# No font has a glyph for it.
_NONCHARACTER = "\U0010ffff"
# Some of these are in every emoji font, and fill what room a glyph has.
_FULL_GLYPHS = ("😀", "🌍", "🎈", "❤", "🚗")
# As far from white as a pixel must be to count, of 255. The edge of a shadow is nearer.
_VISIBLE = 16
# A mark that asks for the coloured form, and one that joins: both are nothing to see.
_STYLE, _JOINER = "\ufe0f", "\u200d"
# A sequence wider than so many glyphs was drawn as several.
_WIDEST = 1.5


@dataclass(slots=True)
class EmojiFont:
    """A font with colour glyphs, open at the size at which it is sharpest.

    digest: of its bytes. shapes: whether sequences become one glyph, which takes the library raqm.
    """

    path: Path
    digest: str
    shapes: bool
    _font: ImageFont.FreeTypeFont
    _undefined: bytes | None = None
    _full_side: int = 0
    _width: float = 0.0
    _drawn: dict[str, bytes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        undefined = self._ink(_NONCHARACTER)
        self._undefined = undefined.tobytes() if undefined else None
        full = [(ink, text) for text in _FULL_GLYPHS if (ink := self._ink(text))]
        self._full_side = max((max(ink.size) for ink, _ in full), default=0)
        self._width = max((self._font.getlength(text) for _, text in full), default=0.0)

    def draw(self, text: str) -> bytes | None:
        """The RGB values of a square of SIZE pixels with the glyph in its middle, or None where the font lacks it.

        Glyphs fill the square up to its margin. Those that are drawn small on purpose stay small.
        """
        if text not in self._drawn:
            ink = self._ink(text)
            self._drawn[text] = on_white(ink, self._full_side).tobytes() if ink else None
        return self._drawn[text]

    def is_one_glyph(self, text: str) -> bool:
        """Whether the font knows the sequence. Else it draws several glyphs, or the beginning alone."""
        widest = _WIDEST * max(self._width, self._font.getlength(text[0]))
        if self._font.getlength(text) > widest:
            return False
        drawn = self.draw(text)
        ends = (end for end in range(1, len(text)) if text[end] != _STYLE and text[end - 1] != _JOINER)
        return all(self.draw(text[:end]) != drawn for end in ends)

    def _ink(self, text: str) -> Image.Image | None:
        """The glyph on white, cut to what is seen of it there."""
        try:
            left, top, right, bottom = map(round, self._font.getbbox(text, mode="RGBA"))
            if left >= right or top >= bottom:
                return None
            image = Image.new("RGB", (right - left, bottom - top), "white")
            ImageDraw.Draw(image).text((-left, -top), text, font=self._font, embedded_color=True)
        except OSError:
            # Of this glyph FreeType cannot read the bitmap.
            return None
        darkest = functools.reduce(ImageChops.darker, image.split())
        box = darkest.point(lambda value: 255 * (value <= 255 - _VISIBLE)).getbbox()
        ink = image.crop(box) if box else None
        return None if ink and ink.tobytes() == self._undefined else ink


def on_white(ink: Image.Image, full_side: int) -> Image.Image:
    """A drawn glyph in the middle of a white square, scaled to it. One smaller than `full_side` stays smaller."""
    width, height = ink.size
    side = max(width, height, full_side) * SIZE / (SIZE - 2 * MARGIN)
    left, top = math.ceil((side - width) / 2) + 1, math.ceil((side - height) / 2) + 1
    canvas = Image.new("RGB", (width + 2 * left, height + 2 * top), "white")
    canvas.paste(ink, (left, top))
    x, y = canvas.width / 2 - side / 2, canvas.height / 2 - side / 2
    # One resampling for scale and place, to fractions of a pixel.
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))


def find_font() -> EmojiFont:
    """The colour emoji font of this system. Raises UserError where there is none that can be drawn."""
    refused: UserError | None = None
    for path in [*(Path(place).expanduser() for place in PLACES), *_fontconfig()]:
        if path.is_file():
            try:
                return open_font(path)
            except UserError as error:
                refused = error
    raise refused or UserError(f"no colour emoji font was found; {_REMEDY}")


def _fontconfig() -> list[Path]:
    """What fontconfig would draw emoji with, unless that has no colour."""
    program = shutil.which("fc-match")
    if not program:
        return []
    command = [program, "--format=%{color} %{file}", "emoji"]
    try:
        answer = subprocess.run(command, capture_output=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    colour, _, file = os.fsdecode(answer).partition(" ")
    return [Path(file)] if colour == "True" and file else []


def open_font(path: Path) -> EmojiFont:
    """A font file. Raises UserError for what is no font, or has no colour glyphs that Pillow draws."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{shown(path)} {what}; name a font file with --font")
    data = path.read_bytes()
    size = _best_size(_tables(data, path), path)
    shapes = bool(features.check("raqm"))
    layout = ImageFont.Layout.RAQM if shapes else ImageFont.Layout.BASIC
    try:
        font = ImageFont.truetype(io.BytesIO(data), size, layout_engine=layout)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be opened as a font ({error}); {_REMEDY}") from None
    return EmojiFont(path, digest(data), shapes, font)


def _tables(data: bytes, path: Path) -> dict[bytes, bytes]:
    """The tables of a font, of a collection those of its first. Raises UserError."""
    try:
        start = struct.unpack_from(">I", data, 12)[0] if data[:4] == b"ttcf" else 0
        if data[start : start + 4] not in _SFNT:
            raise UserError(f"{shown(path)} is no .ttf, .otf or .ttc font; {_REMEDY}")
        (count,) = struct.unpack_from(">H", data, start + 4)
        found = {}
        for number in range(count):
            tag, _, offset, length = struct.unpack_from(">4s3I", data, start + 12 + 16 * number)
            found[tag] = data[offset : offset + length]
            if len(found[tag]) < length:
                raise UserError(f"{shown(path)} is cut short; copy it again, or {_REMEDY}")
    except struct.error:
        raise UserError(f"{shown(path)} is cut short; copy it again, or {_REMEDY}") from None
    return found


def _best_size(tables: dict[bytes, bytes], path: Path) -> int:
    """The size of the largest bitmaps, or one for coloured outlines."""
    try:
        sizes = [*_bitmap_sizes(tables)]
        if sizes:
            return max(sizes)
        outlines = b"COLR" in tables and struct.unpack_from(">2H", tables[b"COLR"])[1] > 0
    except struct.error:
        raise UserError(f"{shown(path)} is damaged; copy it again, or {_REMEDY}") from None
    if outlines:
        return _OUTLINE_SIZE
    if b"COLR" in tables or b"SVG " in tables:
        kind = "COLRv1" if b"COLR" in tables else "SVG"
        raise UserError(
            f"{shown(path)} has its colours as {kind}, which Pillow cannot draw; name a font of bitmaps with --font,"
            " as that of Debian's fonts-noto-color-emoji"
        )
    raise UserError(f"{shown(path)} has no colour glyphs; {_REMEDY}")


def _bitmap_sizes(tables: dict[bytes, bytes]) -> list[int]:
    if b"CBDT" in tables and b"CBLC" in tables:
        index = tables[b"CBLC"]
        (count,) = struct.unpack_from(">I", index, 4)
        return [struct.unpack_from(">B", index, 8 + 48 * number + 45)[0] for number in range(count)]
    if b"sbix" in tables:
        strikes = tables[b"sbix"]
        (count,) = struct.unpack_from(">I", strikes, 4)
        offsets = struct.unpack_from(f">{count}I", strikes, 8)
        return [struct.unpack_from(">H", strikes, offset)[0] for offset in offsets]
    return []
