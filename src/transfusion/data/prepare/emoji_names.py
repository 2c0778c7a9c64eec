"""What Unicode says of emoji: which there are, what they are called, and which are variants of one concept."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from transfusion.errors import UserError, shown

# Where Debian's unicode-data and unicode-cldr-core put them, and packages of other distributions.
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
_CLDR = Path("/usr/share/unicode/cldr/common")
ANNOTATIONS = (_CLDR / "annotations/en.xml", _CLDR / "annotationsDerived/en.xml")

SKIN_TONES = {
    "\U0001f3fb": "light skin tone",
    "\U0001f3fc": "medium-light skin tone",
    "\U0001f3fd": "medium skin tone",
    "\U0001f3fe": "medium-dark skin tone",
    "\U0001f3ff": "dark skin tone",
}
EMOJI_STYLE, JOINER, KEYCAP = "\ufe0f", "\u200d", "\u20e3"
_LINE = re.compile(r"((?:(?:10|[0-9A-F])?[0-9A-F]{4} *)+); *([a-z-]+) *# \S+ E(\d+)\.(\d+) (.+)")
_GROUP = re.compile(r"# (group|subgroup): (.+)")
# Behind a person: which sex, and which way they go.
_SIGNS = re.compile(f"{JOINER}[\u2640\u2642\u27a1]|[{''.join(SKIN_TONES)}{EMOJI_STYLE}]")
# Whoever does it, and however many, the drawing is nearly the same.
_WHO = re.compile("(?:wo)?m[ae]n|persons?|people|adult|boy|girl|child|two|mother|father|and|with")
# Without a list: symbols and punctuation that a font of emoji may have. Letters of flags and tones mean nothing alone.
_SYMBOLS = frozenset(("So", "Sm", "Po", "Pd", "Ll"))
_FIRST_SYMBOL, _LAST_SYMBOL = 0xA9, 0x1FBFF
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_HAIR = range(0x1F9B0, 0x1F9B4)


@dataclass(frozen=True, slots=True)
class Emoji:
    """One emoji. name: in lower case. version: of the emoji list that brought it.

    listed: Unicode names it as an emoji. Else the font decides whether it is one.
    """

    text: str
    name: str
    group: str = ""
    subgroup: str = ""
    version: tuple[int, ...] = ()
    listed: bool = True

    @property
    def code_points(self) -> str:
        return " ".join(f"{ord(letter):04X}" for letter in self.text)

    @property
    def is_sequence(self) -> bool:
        return len(self.text.replace(EMOJI_STYLE, "")) > 1

    @property
    def has_tone(self) -> bool:
        return any(letter in SKIN_TONES for letter in self.text)


def read_list(text: str, path: Path = LIST) -> list[Emoji]:
    """The emoji of an emoji-test.txt in its order: those fully qualified, without loose skin tones and hair."""
    found, place = list[Emoji](), dict[str, str]()
    for line in text.splitlines():
        if match := _GROUP.fullmatch(line.strip()):
            place[match[1]] = match[2]
        elif (match := _LINE.fullmatch(line.strip())) and match[2] == "fully-qualified":
            letters = "".join(chr(int(point, 16)) for point in match[1].split())
            groups = place.get("group", ""), place.get("subgroup", "")
            found.append(Emoji(letters, match[5].lower(), *groups, (int(match[3]), int(match[4]))))
    if not found:
        raise UserError(f"{shown(path)} lists no emoji; install the package unicode-data again, or remove it")
    return found


def unlisted() -> Iterator[Emoji]:
    """What may be emoji, by the names that Python knows: symbols, punctuation and keycaps."""
    for point in range(_FIRST_SYMBOL, _LAST_SYMBOL + 1):
        letter = chr(point)
        if unicodedata.category(letter) not in _SYMBOLS or point in _FLAG_LETTERS or point in _HAIR:
            continue
        if name := unicodedata.name(letter, "").lower():
            yield Emoji(letter, name, listed=False)
    for letter in "#*0123456789":
        yield Emoji(letter + EMOJI_STYLE + KEYCAP, f"keycap: {letter}", listed=False)


def with_tones(one: Emoji) -> Iterator[Emoji]:
    """The emoji in each colour of skin, whether or not it has any."""
    for tone, words in SKIN_TONES.items():
        yield Emoji(one.text + tone, f"{one.name}: {words}", listed=one.listed)


def read_annotations(texts: Iterable[tuple[Path, str]]) -> dict[str, list[str]]:
    """Of each emoji, spelt without style, its name in CLDR's files, or "", and behind it further words for it."""
    names, keywords = dict[str, str](), defaultdict[str, list[str]](list)
    for path, text in texts:
        try:
            elements = ElementTree.fromstring(text).iter("annotation")
        except ElementTree.ParseError as error:
            raise UserError(
                f"{shown(path)} is no XML ({error}); install the package unicode-cldr-core again, or remove it"
            ) from None
        for element in elements:
            letters = plain(element.get("cp", ""))
            words = [word.strip().lower() for word in (element.text or "").split("|")]
            if element.get("type") == "tts":
                names[letters] = words[0]
            else:
                keywords[letters] += words
    found = {}
    for letters in {**names, **keywords}:
        name = names.get(letters, "")
        found[letters] = [name, *dict.fromkeys(word for word in keywords[letters] if word not in ("", name))]
    return found


def plain(text: str) -> str:
    """Without the marks that ask for the coloured form."""
    return text.replace(EMOJI_STYLE, "")


def concepts(emoji: Sequence[Emoji]) -> list[str]:
    """Of each emoji what it shows, without who does it: variants of skin, sex, number and direction have one."""
    names = {plain(one.text): one.name for one in emoji}
    return [_concept(names.get(_SIGNS.sub("", one.text), one.name)) for one in emoji]


def _concept(name: str) -> str:
    head, _, rest = name.partition(": ")
    details = [part for part in rest.split(", ") if part not in SKIN_TONES.values()]
    words = [word for part in (head, *details) for word in part.split() if not _WHO.fullmatch(word)]
    return " ".join(words) or "person"


def captions(
    emoji: Sequence[Emoji], concept: Sequence[str], annotations: Mapping[str, list[str]]
) -> list[list[str]]:
    """Of each emoji its captions, each once: its names, words of CLDR that only it is known by, and name with words."""
    known = [annotations.get(plain(one.text), [""]) for one in emoji]
    meant: dict[str, set[str]] = defaultdict(set)
    for words, shows in zip(known, concept, strict=True):
        for word in words:
            meant[word].add(shows)
    found = []
    for one, (name, *words) in zip(emoji, known, strict=True):
        own = [] if one.has_tone else [word for word in words if len(meant[word]) == 1]
        more = [word for word in (name, *words) if not _words(word) <= _words(one.name)]
        together = ", ".join([one.name, *more])
        found.append(list(dict.fromkeys([one.name, name or one.name, *_formal_name(one), *own, together])))
    return found


def _words(text: str) -> set[str]:
    return {word.strip(":,") for word in text.split()}


def _formal_name(one: Emoji) -> Iterator[str]:
    letters = plain(one.text)
    if len(letters) == 1 and (name := unicodedata.name(letters, "")):
        yield name.lower()
