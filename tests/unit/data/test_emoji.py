"""Emoji as captioned images: names, captions, concepts, and what fonts draw. Most use a font made here."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from transfusion.cli.main import main
from transfusion.data.prepare import emoji_font, emoji_names
from transfusion.data.prepare.emoji_names import Emoji
from transfusion.data.prepare.folders import validation_keys
from transfusion.data.prepare.prepare import prepare
from transfusion.errors import UserError

LIST = """\
# emoji-test.txt
# group: People & Body
# subgroup: hand-fingers-open
1F44B ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
1F44B 1F3FF ; fully-qualified     # 👋🏿 E1.0 waving hand: dark skin tone
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                                  ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F                                              ; fully-qualified     # ☺️ E0.6 Smiling Face
263A                                                   ; unqualified         # ☺ E0.6 Smiling Face
1F603 ; fully-qualified     # 😃 E0.6 grinning face with big eyes
1F608 ; fully-qualified     # 😈 E1.0 smiling face with horns
# group: Component
1F3FB ; component           # 🏻 E1.0 light skin tone
# group: Flags
1F1EB 1F1F7 ; fully-qualified # 🇫🇷 E0.6 flag: France
"""
ANNOTATIONS = """\
<ldml><annotations>
<annotation cp="😀">Face | grin | grinning face</annotation>
<annotation cp="😀" type="tts">grinning face</annotation>
<annotation cp="☺">face | outlined | smile</annotation>
<annotation cp="👋">hand | wave</annotation>
<annotation cp="👋🏻">hand | wave | light skin tone</annotation>
<annotation cp="👋🏻" type="tts">waving hand: light skin tone</annotation>
</annotations></ldml>
"""
# Glyphs of the made font: what draws them, in units of 1000, and in which colour.
SQUARE, SMALL, LOW = (100, 0, 900, 800), (400, 300, 600, 500), (100, 0, 900, 300)
RED, GREEN, BLUE = (1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)
GLYPHS = {
    "face": (0x1F600, SQUARE, RED),
    "smile": (0x263A, SMALL, RED),
    "eyes": (0x1F603, SQUARE, RED),
    "wave": (0x1F44B, LOW, GREEN),
    "light": (0x1F3FB, SMALL, GREEN),
    "dark": (0x1F3FF, SMALL, BLUE),
    "wave_light": (None, LOW, BLUE),
    "F": (0x1F1EB, SMALL, BLUE),
    "R": (0x1F1F7, SMALL, BLUE),
}


@pytest.fixture(scope="module")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A font with coloured squares for some emoji. It knows one skin tone of the waving hand, and no flag."""
    builder_module = pytest.importorskip("fontTools.fontBuilder", reason="pip install fonttools")
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def outline(box: tuple[int, int, int, int] | None) -> Any:
        pen = TTGlyphPen(None)
        if box:
            left, bottom, right, top = box
            pen.moveTo((left, bottom))
            for point in ((left, top), (right, top), (right, bottom)):
                pen.lineTo(point)
            pen.closePath()
        return pen.glyph()

    outlines = {".notdef": None, **{name: box for name, (_, box, _) in GLYPHS.items()}}
    builder = builder_module.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([*outlines, "style"])
    builder.setupCharacterMap(
        {0xFE0F: "style", **{point: name for name, (point, *_) in GLYPHS.items() if point}}
    )
    builder.setupGlyf({name: outline(box) for name, box in {**outlines, "style": None}.items()})
    builder.setupHorizontalMetrics(
        {name: (0 if name == "style" else 1000, 0) for name in [*outlines, "style"]}
    )
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.addOpenTypeFeatures("feature ccmp { sub wave light by wave_light; } ccmp;")
    colours = [RED, GREEN, BLUE]
    builder.setupCPAL([colours])
    builder.setupCOLR(
        {name: [(name, colours.index(colour))] for name, (_, _, colour) in GLYPHS.items()}, version=0
    )
    path = tmp_path_factory.mktemp("font") / "squares.ttf"
    builder.save(path)
    return path


@pytest.fixture
def unicode_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a short list and short annotations, which are taken for those of the system."""
    folder = tmp_path / "unicode"
    folder.mkdir()
    (folder / "emoji-test.txt").write_text(LIST)
    (folder / "en.xml").write_text(ANNOTATIONS)
    monkeypatch.setattr(emoji_names, "LIST", folder / "emoji-test.txt")
    monkeypatch.setattr(emoji_names, "ANNOTATIONS", (folder / "en.xml", folder / "absent.xml"))
    return folder


@pytest.fixture
def no_unicode_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emoji_names, "LIST", tmp_path / "absent.txt")
    monkeypatch.setattr(emoji_names, "ANNOTATIONS", (tmp_path / "absent.xml",))


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_font, "PLACES", ())
    monkeypatch.setattr(emoji_font.shutil, "which", lambda name: None)


def stored(folder: Path) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    for shard in sorted(folder.rglob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member) for member in tar}
            contents = {name: file.read() for name, file in members.items() if file}
        for name in contents:
            if name.endswith(".json"):
                image = Image.open(io.BytesIO(contents[name.replace(".json", ".png")]))
                yield json.loads(contents[name]), image


def test_the_list_is_read_in_its_order_without_loose_parts() -> None:
    emoji = emoji_names.read_list(LIST)
    assert [one.name for one in emoji] == [
        "waving hand",
        "waving hand: light skin tone",
        "waving hand: dark skin tone",
        "grinning face",
        "smiling face",
        "grinning face with big eyes",
        "smiling face with horns",
        "flag: france",
    ]
    assert emoji[3] == Emoji("😀", "grinning face", "Smileys & Emotion", "face-smiling", (1, 0))
    assert (emoji[4].text, emoji[4].code_points, emoji[4].is_sequence) == ("☺\ufe0f", "263A FE0F", False)
    assert emoji[1].has_tone and emoji[1].is_sequence and not emoji[0].has_tone and emoji[-1].is_sequence
    with pytest.raises(UserError, match="lists no emoji; install the package unicode-data again"):
        emoji_names.read_list("# nothing\n")


@pytest.mark.parametrize(
    ("concept", "variants"),
    [
        ("waving hand", ["👋 waving hand", "👋🏻 waving hand: light skin tone"]),
        (
            "running",
            [
                "🏃 person running",
                "🏃🏽 person running: medium skin tone",
                "🏃‍♀️ woman running",
                "🏃🏿‍♂️ man running: dark skin tone",
                "🏃🏿‍♂️‍➡️ man running facing right: dark skin tone",
            ],
        ),
        (
            "holding hands",
            [
                "👫 woman and man holding hands",
                "👬🏽 men holding hands: medium skin tone",
                "🧑🏻‍🤝‍🧑🏿 people holding hands: light skin tone, dark skin tone",
            ],
        ),
        ("kiss", ["💏 kiss", "👩🏻‍❤️‍💋‍👨🏽 kiss: woman, man, light skin tone, medium skin tone"]),
        ("merperson", ["🧜 merperson", "🧜‍♀️ mermaid", "🧜🏻‍♂️ merman: light skin tone"]),
        ("red hair", ["👨‍🦰 man: red hair", "👩🏻‍🦰 woman: light skin tone, red hair"]),
        ("flag japan", ["🇯🇵 flag: japan"]),
        ("keycap 1", ["1️⃣ keycap: 1"]),
        ("person", ["👨 man", "👩🏽 woman: medium skin tone", "🧒 child"]),
    ],
)
def test_variants_show_one_concept(concept: str, variants: list[str]) -> None:
    emoji = [Emoji(*variant.split(" ", 1)) for variant in variants]
    assert set(emoji_names.concepts(emoji)) == {concept}


def test_captions_are_names_and_words_that_mean_one_concept() -> None:
    emoji = emoji_names.read_list(LIST)[:5]
    annotations = emoji_names.read_annotations([(Path("en.xml"), ANNOTATIONS)])
    assert annotations["😀"] == ["grinning face", "face", "grin"]
    said = emoji_names.captions(emoji, emoji_names.concepts(emoji), annotations)
    assert said == [
        ["waving hand", "waving hand sign", "hand", "wave", "waving hand, wave"],
        ["waving hand: light skin tone", "waving hand: light skin tone, wave"],
        ["waving hand: dark skin tone"],
        ["grinning face", "grin", "grinning face, grin"],
        ["smiling face", "white smiling face", "outlined", "smile", "smiling face, outlined, smile"],
    ]
    with pytest.raises(UserError, match=r"en.xml is no XML .* install the package unicode-cldr-core again"):
        emoji_names.read_annotations([(Path("en.xml"), "<a>")])


def test_a_share_of_the_concepts_is_held_out_and_at_least_one() -> None:
    keys = {f"concept {number}" for number in range(1000)}
    held = validation_keys(keys, 0, 0.1)
    assert 60 < len(held) < 140 and held == validation_keys(keys, 0, 0.1) != validation_keys(keys, 1, 0.1)
    assert len(validation_keys({"a", "b", "c"}, 0, 0.001)) == 1
    assert validation_keys({"a"}, 0, 0.001) == validation_keys(keys, 0, 0.0) == set()


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no raqm: pip install pillow")
def test_a_font_becomes_captioned_images(font: Path, unicode_data: Path, tmp_path: Path) -> None:
    result = prepare("emoji", tmp_path / "out", font=font, validation=0.4)
    assert result.train + result.validation == 4 and result.validation
    assert result.skipped == {"sequence_not_drawn": 2, "glyph_missing": 1, "drawn_alike": 1}
    record = json.loads((tmp_path / "out/prepared.json").read_text())
    assert record["skipped_samples"] == [
        ["1F44B 1F3FF waving hand: dark skin tone", "sequence_not_drawn"],
        ["1F608 smiling face with horns", "glyph_missing"],
        ["1F1EB 1F1F7 flag: france", "sequence_not_drawn"],
        ["1F600 grinning face", "drawn_alike"],
    ]
    sides = [
        {facts["concept"] for facts, _ in stored(tmp_path / "out" / side)} for side in ("train", "validation")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    images = {facts["code_points"]: (facts, image) for facts, image in stored(tmp_path / "out")}
    assert set(images) == {"1F603", "263A FE0F", "1F44B", "1F44B 1F3FB"}
    facts, image = images["1F603"]
    # The older of two that look alike gives its name, and both give captions.
    assert facts["caption"] == "grinning face with big eyes" and "grin" in facts["captions"]
    assert facts["drawn_alike"] == ["1F600"] and facts["group"] == "Smileys & Emotion"
    assert (facts["width"], facts["height"], facts["subgroup"]) == (64, 64, "face-smiling")
    values = np.asarray(image).astype(int)
    assert values.shape == (64, 64, 3) and values[:2].min() > 250 and values[:, -2:].min() > 250
    assert np.abs(values[4:-4, 4:-4] - (255, 0, 0)).max() < 8
    # Small on purpose, and flat ones: their size is kept, and their middle is that of the image.
    assert inked(images["263A FE0F"][1]) == pytest.approx((24.5, 24.5, 39.5, 39.5), abs=1)
    left, top, right, bottom = inked(images["1F44B"][1])
    assert (left, right) == pytest.approx((2, 62), abs=1) and top + bottom == pytest.approx(64, abs=1)
    assert np.asarray(images["1F44B 1F3FB"][1])[32, 32].tolist() == [0, 0, 255]


def inked(image: Image.Image) -> tuple[int, int, int, int]:
    """The box of what is far from white."""
    dark = Image.fromarray(np.uint8(255 * (np.asarray(image).min(axis=2) < 128)))
    box = dark.getbbox()
    assert box
    return box


def test_the_same_font_and_data_give_the_same_shards_and_others_do_not(
    font: Path, unicode_data: Path, tmp_path: Path
) -> None:
    first = prepare("emoji", tmp_path / "a", font=font)
    assert prepare("emoji", tmp_path / "a", font=font).reused
    copied = tmp_path / "copy.ttf"
    copied.write_bytes(font.read_bytes())
    second = prepare("emoji", tmp_path / "b", font=copied)
    assert (first.train, first.validation) == (second.train, second.validation)
    for path in (tmp_path / "a").rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    (unicode_data / "en.xml").write_text(ANNOTATIONS.replace("outlined", "drawn"))
    with pytest.raises(UserError, match=r"holds another preparation \(emoji\)"):
        prepare("emoji", tmp_path / "a", font=font)


def test_without_unicode_data_the_font_decides(font: Path, no_unicode_data: None, tmp_path: Path) -> None:
    result = prepare("emoji", tmp_path / "out", font=font, validation=0)
    captions = {facts["code_points"]: facts["captions"] for facts, _ in stored(tmp_path / "out")}
    waving = {"1F44B": ["waving hand sign"], "1F44B 1F3FB": ["waving hand sign: light skin tone"]}
    if not features.check("raqm"):
        del waving["1F44B 1F3FB"]
    assert captions == {
        "263A": ["white smiling face"],
        "1F600": ["grinning face", "smiling face with open mouth"],
        **waving,
    }
    assert result.skipped == {"drawn_alike": 1}
    assert "install unicode-cldr-core" in result.notes[-1]


def test_without_raqm_single_characters_are_left(
    font: Path, unicode_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji_font.features, "check", lambda name: False)
    result = prepare("emoji", tmp_path / "out", font=font)
    assert result.train + result.validation == 3
    assert result.skipped == {"raqm_missing": 3, "glyph_missing": 1, "drawn_alike": 1}
    assert result.notes == ("this Pillow has no raqm, so there are no emoji of several characters",)


def made_font(**tables: bytes) -> bytes:
    """The frame of a font file around some tables."""
    start = 12 + 16 * len(tables)
    entries, bodies = b"", b""
    for name, body in tables.items():
        entries += struct.pack(">4s3I", name.ljust(4).encode(), 0, start + len(bodies), len(body))
        bodies += body
    return struct.pack(">4s4H", b"\0\1\0\0", len(tables), 0, 0, 0) + entries + bodies


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no .ttf, .otf or .ttc font; install fonts-noto-color-emoji, or name one with --font"),
        (b"\x89PNG\r\n\x1a\n", "is no .ttf, .otf or .ttc font"),
        (b"\0\1\0\0", "is cut short"),
        (b"ttcf\0\0", "is cut short"),
        (made_font(CBDT=b"1234", CBLC=b"1234")[:-1], "is cut short"),
        (made_font(CBDT=b"1234", CBLC=b"1234"), "is damaged"),
        (made_font(sbix=struct.pack(">HHII", 1, 0, 1, 99)), "is damaged"),
        (made_font(glyf=b"1234"), "has no colour glyphs; install fonts-noto-color-emoji"),
        (made_font(COLR=struct.pack(">2H", 1, 0)), "has its colours as COLRv1, which Pillow cannot draw"),
        (made_font(SVG=b"1234"), "has its colours as SVG, which Pillow cannot draw"),
        (made_font(COLR=struct.pack(">2H", 0, 1)), "cannot be opened as a font"),
    ],
)
def test_what_is_no_colour_font_is_refused_in_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.ttf"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        prepare("emoji", tmp_path / "out", font=path)
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.ttf"]


def test_fonts_that_are_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file; name a font file with --font"):
        prepare("emoji", tmp_path / "out", font=tmp_path)
    with pytest.raises(UserError, match="does not exist; name a font file"):
        prepare("emoji", tmp_path / "out", font=tmp_path / "absent.ttf")
    with pytest.raises(UserError, match="for the source emoji alone, not for digits; remove --font"):
        prepare("digits", tmp_path / "out", font=tmp_path)


def test_a_system_font_that_cannot_be_drawn_is_passed_over(
    font: Path, no_fonts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.ttf"
    bad.write_bytes(made_font(COLR=struct.pack(">2H", 1, 0)))
    monkeypatch.setattr(emoji_font, "PLACES", (str(bad), str(font)))
    assert emoji_font.find_font().path == font
    monkeypatch.setattr(emoji_font, "PLACES", (str(bad),))
    with pytest.raises(UserError, match="COLRv1"):
        emoji_font.find_font()


@pytest.mark.parametrize(("answer", "found"), [("True {font}", True), ("False {font}", False), ("", False)])
def test_fontconfig_is_asked_where_it_is_installed(
    answer: str, found: bool, font: Path, no_fonts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "fc-match"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{answer.format(font=font)}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(emoji_font.shutil, "which", lambda name: str(program))
    if found:
        assert emoji_font.find_font().path == font
    else:
        with pytest.raises(UserError, match="no colour emoji font was found"):
            emoji_font.find_font()


def test_the_command_without_a_font_ends_with_the_remedy(
    no_fonts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["transfusion", "prepare", "emoji", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert said.err.strip().endswith(
        "no colour emoji font was found; install fonts-noto-color-emoji, or name one with --font"
    )
    assert len(said.err.strip().splitlines()) == 1


def test_the_font_of_the_system(tmp_path: Path) -> None:
    try:
        font = emoji_font.find_font()
    except UserError as error:
        pytest.skip(str(error))
    result = prepare("emoji", tmp_path / "out")
    assert result.train + result.validation > 1000 and 0 < result.validation < 0.1 * result.train
    samples = list(stored(tmp_path / "out"))
    assert all(image.size == (64, 64) and image.mode == "RGB" for _, image in samples)
    said = {facts["code_points"]: facts["captions"] for facts, _ in samples}
    assert said["1F600"][0] == "grinning face" and all(captions for captions in said.values())
    assert not font.is_one_glyph("😀🏽") and font.draw("\U0010fffe") is None
    for facts, image in samples:
        left, top, right, bottom = inked(image.point(lambda value: 0 if value < 240 else 255))
        assert min(left, top) >= 1 and max(right, bottom) <= 63, facts
        # The faintest edges are not seen here, so this is the middle of the image only about.
        assert abs(left + right - 64) <= 6 and abs(top + bottom - 64) <= 6, facts
