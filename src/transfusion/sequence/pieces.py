"""What the pieces of tokenizers stand for: bytes, as each kind of file spells them."""

from __future__ import annotations

import re
from collections.abc import Sequence

# sentencepiece writes a space as this character inside its pieces, and would read the character as a space.
SPACE_MARK = "\u2581"


def bytes_of_pieces(pieces: Sequence[str]) -> list[bytes]:
    """What sentencepiece's pieces stand for: <0xNN> a byte, its mark a space, all else its letters."""
    spelt = []
    for piece in pieces:
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        spelt.append(bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode())
    return spelt


def bytes_of_letters(pieces: Sequence[str]) -> list[bytes]:
    """What byte-level pieces stand for, which write each byte as a letter. Others are taken as they are."""
    byte_of = _byte_of_letter()
    return [
        bytes(byte_of[letter] for letter in piece) if set(piece) <= byte_of.keys() else piece.encode()
        for piece in pieces
    ]


def shown(spelt: bytes) -> str:
    """The bytes of a piece as text, for eyes: parts of a letter are shown as <0xNN>."""
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else f"<0x{byte:02X}>" for byte in spelt)


def _byte_of_letter() -> dict[str, int]:
    """How byte-level pieces write bytes as letters (GPT-2): printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}
