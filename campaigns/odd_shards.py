"""Two kinds of odd inputs: shards and folders of which much is lost, and names and texts that are hard to write again.

What is good and what is lost is known here from what was laid down, apart from the functions that count it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import json
import logging
import math
import os
import random
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from odd_base import SILENT, Outcome, judge, kl_folder, stored, tokenizer
from transfusion.cli import main as cli
from transfusion.codec_train.encode import encode_shards
from transfusion.config import CodecConfig, SourceConfig
from transfusion.config.codec_folder import completed
from transfusion.config.sections import SourceKind
from transfusion.data.images.decode import decode
from transfusion.data.images.latents import read_record
from transfusion.data.index.build import IndexJob, IndexReport, write_index
from transfusion.data.index.source_index import SourceIndex, build_index, refuse_too_many
from transfusion.data.prepare.prepare import prepare
from transfusion.data.shards.sample import Fault
from transfusion.data.shards.scan import scan
from transfusion.errors import UserError

# ---- lost ----------------------------------------------------------------------------------------------

# What is laid down, more often what is good.
FORMS = (
    *["pair"] * 8, "pair by json", *["text"] * 3, "document", "document", "no caption", "blank caption", "torn image",
    "two images", "dotted pairs", "dotted texts", "linked image", "same member", "again", "scattered", "unsafe", "junk",
    "a directory called",
)  # fmt: skip
LINES = (*["good"] * 8, "blank", "torn", "empty", "surrogate", "zero", "other field")
HARMS = (
    "no tar", "no bytes", "zeros", "cut", "cut", "no samples", "overwritten", "overwritten", "zeros at the end",
)  # fmt: skip
# Of what is damaged: what makes no sample would hide which is the last.
SIMPLE_FORMS = (
    "pair", "pair", "text", "pair by json", "document", "torn image", "no caption", "dotted pairs",
)  # fmt: skip
BLOCK = tarfile.BLOCKSIZE
TAR_FORMATS: dict[str, Literal[0, 1, 2]]
TAR_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
# Longer than what a writer fills an archive up to.
HOLE = 12_288
PIECE_OF_JSON = '{"text": "ab'
SMALL_SOURCE = 100
OTHERS_TO_WARN_OF = ("stats.json", "00000.parquet")
# Of a folder for `prepare`.
FILES = (
    *["pair"] * 4, "linked image", "no caption", "blank caption", "caption is a folder", "lone caption", "torn image",
    "other file", "hidden", "no suffix", "link to nothing", "link to itself", "pipe", "called an image",
)  # fmt: skip
IMAGE_FILES = {
    "png": "PNG", "jpg": "JPEG", "JPEG": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "Tif": "TIFF",
}  # fmt: skip
# Of 255, for an image of one colour in any of these formats.
TOLERANCE = 6
Members = list[tuple[str, bytes]]


@dataclass
class Laid:
    """What was laid down at one place. good: what it is, or empty. lost: samples that it costs, and what names them."""

    key: str
    members: Members
    good: str = ""
    text: str = ""
    image: bytes = b""
    lost: int = 0
    has_image: bool = False


@dataclass
class Shard:
    """name: of the file. least, most: samples that it costs; they differ where that can only be estimated."""

    name: str
    harm: str = ""
    laid: list[Laid] = field(default_factory=list)
    least: int = 0
    most: int = 0

    @property
    def good(self) -> list[Laid]:
        return [each for each in self.laid if each.good]

    def turn_out(self, which: Callable[[Laid], bool]) -> None:
        """Count good samples as lost."""
        for each in filter(which, self.good):
            each.good, each.lost = "", 1
            self.least, self.most = self.least + 1, self.most + 1


@functools.cache
def square_png(number: int) -> bytes:
    """An image of one colour, which tells its number."""
    return stored(Image.new("RGB", (8, 8), (number % 256, number // 256, 90)), "PNG", b"")


def lost(rng: random.Random, folder: Path) -> Outcome:
    """A source, or a folder for `prepare`, of which it is known what is good and what is lost."""
    return lost_in_folder(rng, folder) if rng.random() < 0.4 else lost_in_shards(rng, folder)


def lost_in_shards(rng: random.Random, folder: Path) -> Outcome:
    """Shards of as many samples each, some of them damaged, and files that nobody reads."""
    samples = rng.choice((3, 5, 8, 12, 40))
    shards = [lay_shard(rng, number, samples) for number in range(rng.randint(1, 4))]
    for shard in shards:
        harm_shard(rng, shard, folder / shard.name)
    # Of what is damaged nobody knows what stood beside it, which may tip the balance.
    sure = all(not shard.harm or abs(balance(shard)) > 1 for shard in shards)
    kinds: list[SourceKind] = ["pairs", "texts", "interleaved", "mixed"]
    kind: SourceKind = rng.choice([*kinds, "auto", "auto"] if sure else kinds)
    for shard in shards:
        judge_kinds(shard, kind)
    cost_whole_shards(shards, samples)
    least, most = sum(shard.least for shard in shards), sum(shard.most for shard in shards)
    good = sum(len(shard.good) for shard in shards)
    exact = least / max(SMALL_SOURCE, least + good)
    share = rng.choice((exact, math.nextafter(exact, -1), exact - 0.02, exact + 0.02, 0.05))
    share = min(1.0, max(0.0, share))
    other = rng.choice(("", "", "", *OTHERS_TO_WARN_OF, "9.tar.gz", "9.jsonl.zst", "9.tar/", "9.tar ->"))
    place_other(other, folder)
    pattern = [f"{folder}/*"] if other else [f"{folder}/{shard.name}" for shard in shards]
    forms = " | ".join(f"{shard.name} {shard.harm} {count_forms(shard)}" for shard in shards)
    what = f"kind {kind}, at most {share}, beside {other or 'nothing'}, {forms}:"
    cannot_be_read = bool(other) and other not in OTHERS_TO_WARN_OF
    too_many = [cost / max(SMALL_SOURCE, cost + good) > share for cost in (least, most)]

    def check() -> str:
        try:
            with heard() as warnings:
                index = opened(pattern, kind)
                report = write_index([IndexJob(pattern, None, kind=kind)], folder / "out", max_share=share)
        except UserError as error:
            if good and not (cannot_be_read and other.strip("/ ->") in str(error)):
                return f"is refused: {error}"
            raise
        if cannot_be_read or not good:
            return SILENT
        if any(other not in line for line in warnings) or len(warnings) != 2 * bool(other):
            return f"warns {warnings}"
        if told := compare_source(index, shards, least, most):
            return told
        if told := compare_report(report, index, folder / "out"):
            return told
        refused = ""
        try:
            refuse_too_many([index], share)
        except UserError as error:
            refused = str(error)
        is_right = bool(refused) in too_many and report.past_limit == bool(refused)
        return "" if is_right else f"is refused as {refused!r} and past the limit: {report.past_limit}"

    return judge(what, check)


def lay_shard(rng: random.Random, number: int, samples: int) -> Shard:
    """A shard of so many samples, good and lost ones."""
    harm = rng.choice(HARMS) if rng.random() < 0.25 else ""
    if rng.random() < 0.15:
        lines = [lay_line(rng, f"line {line}") for line in range(samples)]
        return Shard(f"{number:05d}.jsonl", harm, lines)
    shard, counts = Shard(f"{number:05d}.tar", harm), 0
    forms = rng.choice(
        (FORMS, FORMS, ("pair", "pair", "text"), ("pair",), ("text",), ("pair", "torn image", "text"))
    )
    forms = SIMPLE_FORMS if harm else forms
    while counts < samples:
        form, left, key = rng.choice(forms), samples - counts, f"{number}{len(shard.laid):04d}"
        laid = lay(rng, form, key, left, shard.laid, number * 1000 + len(shard.laid))
        counts += sum(each.lost or bool(each.good) for each in laid)
        shard.laid += laid
    if len(shard.laid) < 4 and harm in ("overwritten", "zeros at the end"):
        shard.harm = ""
    return shard


def lay(rng: random.Random, form: str, key: str, left: int, before: list[Laid], number: int) -> list[Laid]:
    """One form, which costs no more than is left; what is scattered has another sample in its midst."""
    image, text = square_png(number), f"{rng.choice(('a photo', 'an image', 'fox'))} {number}"
    caption = (f"{key}.txt", text.encode())
    pair: Members = [(f"{key}.{rng.choice(('png', 'PNG'))}", image), caption]
    bad = Laid(key, pair, lost=1)
    real = [each.key for each in before if each.key[:1] not in ("", ".")]
    if form == "text":
        return [Laid(key, [caption], "text", text)]
    if form == "a directory called":
        return [Laid(key, [(f"{key}.png/", b""), caption], "text", text)]
    if form == "junk":
        name = rng.choice([*real, key])
        return [Laid("", [(rng.choice((".DS_Store", f"._{key}.png", f"__MACOSX/{key}.png", name)), b"x")])]
    if form == "document":
        elements = [{"type": "text", "text": text}, {"type": "image", "image": "img0.png"}]
        content = json.dumps({"elements": elements}).encode()
        return [Laid(key, [(f"{key}.json", content), (f"{key}.img0.png", image)], "document", text, image)]
    if form == "pair by json":
        content = json.dumps({"caption": text}).encode()
        return [Laid(key, [(f"{key}.json", content), pair[0]], "pair", text, image, has_image=True)]
    # Of others nothing tells that they were pairs.
    bad.has_image = form in ("no caption", "blank caption", "torn image", "two images")
    if form == "no caption":
        bad.members = pair[:1]
    elif form == "blank caption":
        bad.members = [pair[0], (caption[0], b" \n")]
    elif form == "torn image":
        bad.members = [(pair[0][0], image[: rng.randrange(len(image))]), caption]
    elif form == "two images":
        bad.members = [*pair, (f"{key}.jpg", image)]
    elif form in ("dotted pairs", "dotted texts"):
        bad.lost = min(left, rng.randint(1, 4))
        bad.members = [
            (f"{key}.{place}.{end}", data)
            for place in range(bad.lost)
            for end, data in (("png", image), ("txt", b"a"))[form == "dotted texts" :]
        ]
    elif form in ("linked image", "same member"):
        linked = (f"{pair[0][0]} ->", b"")
        bad.members = [linked, caption] if form == "linked image" else [pair[0], *pair]
    elif form == "unsafe":
        bad.key = f"../{key}"
        bad.members = [(f"../{name}", data) for name, data in pair]
    elif form == "scattered" and left > 1:
        middle = lay(rng, "pair", f"{key}m", 1, [], number + 500)
        dotted = rng.random() < 0.3 and left > 2
        if not dotted:
            return [Laid(key, pair[:1], lost=1), *middle, Laid(key, pair[1:])]
        ends = [[(f"{key}.{place}.png", image), (f"{key}.{place}.txt", b"a")] for place in range(2)]
        return [Laid(key, ends[0], lost=1), *middle, Laid(key, ends[1], lost=1)]
    elif form == "again" and (former := [each for each in before if each.good and each.key != real[-1]]):
        again = rng.choice(former)
        return [Laid(again.key, again.members, lost=1)]
    else:
        return [Laid(key, pair, "pair", text, image, has_image=True)]
    return [bad]


def lay_line(rng: random.Random, key: str) -> Laid:
    form = rng.choice(LINES)
    text = f"line of {key}"
    words = {
        "good": json.dumps({"text": text}), "blank": " ", "torn": PIECE_OF_JSON, "empty": '{"text": " "}',
        "surrogate": '{"text": "a\\ud800"}', "zero": '{"text": "\\u0000"}', "other field": '{"words": "a"}',
    }[form]  # fmt: skip
    good = "text" if form == "good" else ""
    return Laid(key, [("", words.encode() + b"\n")], good, text, lost=int(not good))


def harm_shard(rng: random.Random, shard: Shard, path: Path) -> None:
    """Write the shard, whole or not, and count what is lost of it."""
    is_tar = path.suffix == ".tar"
    data, ends = tar_of(rng, shard.laid) if is_tar else lines_of(shard.laid)
    starts = [0, *(-(-end // BLOCK) * BLOCK if is_tar else end for end in ends)]
    least = most = 0
    if shard.harm in ("no samples", "no bytes"):
        data = bytes(10_240) if is_tar and shard.harm == "no samples" else b""
        # A file of lines may hold none.
        shard.harm = shard.harm if is_tar else "no samples"
    elif shard.harm == "zeros":
        data = bytes(len(data) + 10_240)
    elif shard.harm == "no tar":
        data = rng.choice((b"<html>502 Bad Gateway</html>" * 40, zlib.compress(data), rng.randbytes(3000)))
        data = data if is_tar else data.replace(b"\n", b"")
    elif shard.harm == "cut":
        place = rng.randrange(1, len(data) - 1024 * is_tar)
        good = [end for end, each in zip(ends, shard.laid, strict=True) if each.good]
        if not is_tar and good:
            # Inside of a good line, where it can be seen.
            place = rng.choice(good) - 3
        data = data[:place]
        cut_shard(shard, ends, place)
    elif shard.harm == "zeros at the end":
        place = rng.choice(starts[1:-1])
        # As long as no record that is filled up would be.
        data = data[:place] + bytes(HOLE if is_tar else len(data) - place)
        data += bytes(BLOCK if is_tar and len(data) % (2 * BLOCK) == 0 else 0)
        cut_shard(shard, ends, place)
    elif shard.harm == "overwritten":
        first, last = sorted(rng.sample(range(1, len(starts) - 1), 2))
        size = starts[last] - starts[first]
        # Zeros are what was never written. In a tar fewer than those of a record may be its end.
        byte = b"\0" if not is_tar or size > HOLE else b"\1"
        data = data[: starts[first]] + byte * (size - (not is_tar)) + data[starts[last] - (not is_tar) :]
        lose_middle(shard, first, last)
        # By its bytes, and a text beside it may stand for all of it.
        least, most = (last - first) // 4 - 1, 4 * (last - first) + 4 if is_tar else size
    path.write_bytes(data)
    if shard.harm in ("no samples", "no bytes", "zeros", "no tar"):
        shard.laid = []
    cost = sum(each.lost for each in shard.laid)
    shard.least, shard.most = cost + least, cost + most


def cut_shard(shard: Shard, ends: Sequence[int], place: int) -> None:
    """Only what stands before the place is left. A text at the end may be the caption of an image that is gone."""
    kept = sum(end <= place for end in ends)
    is_seen = kept < len(ends) and place - (ends[kept - 1] if kept else 0) >= 2 * BLOCK
    shard.laid = shard.laid[:kept]
    if not is_seen and shard.name.endswith(".tar"):
        lose_text(shard, -1)


def lose_middle(shard: Shard, first: int, last: int) -> None:
    """What stands in between is gone, and texts beside it may be captions. Lines have other numbers then."""
    shard.laid[first:last] = []
    if shard.name.endswith(".tar"):
        lose_text(shard, first - 1)
        lose_text(shard, first)
    else:
        for number, each in enumerate(shard.laid[first:]):
            each.key = f"line {first + 1 + number}"


def lose_text(shard: Shard, place: int) -> None:
    for each in shard.laid[place : place + 1 or None]:
        if each.good == "text":
            each.good, each.lost = "", 1


def cost_whole_shards(shards: Sequence[Shard], samples: int) -> None:
    """What is missing of a shard costs what the others hold, where there is one that is whole."""
    harms = {shard.harm for shard in shards}
    for shard in shards:
        wanted, sure = samples - len(shard.good), "" in harms and not harms & {"no samples", "overwritten"}
        if shard.harm == "no samples":
            shard.least = shard.most = 1
        elif shard.harm not in ("", "overwritten"):
            shard.least = wanted if sure else 1
            sure = sure and shard.harm != "zeros at the end"
            shard.most = max(wanted, shard.most + 1) + 2 if sure else 4 * samples + HOLE // BLOCK


def balance(shard: Shard) -> int:
    """By how many there are more images than texts."""
    return sum(each.has_image - (each.good == "text") for each in shard.laid)


def judge_kinds(shard: Shard, kind: str) -> None:
    """Of a source of this kind other samples are lost; by itself a shard of more images than texts has no texts."""
    if kind == "auto":
        if balance(shard) > 0:
            shard.turn_out(lambda each: each.good == "text")
    elif kind != "mixed":
        shard.turn_out(lambda each: f"{each.good}s" != {"interleaved": "documents"}.get(kind, kind))


def tar_of(rng: random.Random, laid: Sequence[Laid]) -> tuple[bytes, list[int]]:
    """A tar, and where the data of each sample ends."""
    form = rng.choice(list(TAR_FORMATS.values()))
    data, ends = b"", []
    for each in laid:
        end = len(data)
        for name, content in each.members:
            member = tarfile.TarInfo(name.removesuffix(" ->"))
            if name.endswith(" ->"):
                member.type, member.linkname = tarfile.SYMTYPE, "elsewhere"
            member.type = tarfile.DIRTYPE if name.endswith("/") else member.type
            member.size = len(content)
            data += member.tobuf(form)
            end = len(data) + len(content)
            data += content + bytes(-len(content) % BLOCK)
        ends.append(end)
    return data + bytes(1024), ends


def lines_of(laid: Sequence[Laid]) -> tuple[bytes, list[int]]:
    lines = [line for each in laid for _, line in each.members]
    return b"".join(lines), list(itertools.accumulate(map(len, lines)))


def count_forms(shard: Shard) -> dict[str, int]:
    counts = collections.Counter(each.good or ("lost" if each.lost else "nothing") for each in shard.laid)
    return dict(sorted(counts.items()))


def place_other(other: str, folder: Path) -> None:
    """What stands beside the shards: a file, a folder, or a link to nothing."""
    name = other.strip("/ ->")
    if other.endswith("/"):
        (folder / name).mkdir()
    elif other.endswith(">"):
        (folder / name).symlink_to(folder / "gone")
    elif other:
        (folder / name).write_bytes(b"{}")


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What is warned of meanwhile, each of which must be one line."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transfusion")
    logger.addHandler(handler)
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)
    if not all(map(str.isprintable, warnings)):
        raise ValueError(f"warnings of several lines: {warnings}")


def opened(shards: str | list[str], kind: SourceKind = "auto") -> SourceIndex:
    source = SourceConfig(name="s", shards=shards, kind=kind)
    return build_index(source, tokenizer(), patches=1, sequence_length=256)


def compare_source(index: SourceIndex, shards: Sequence[Shard], least: int, most: int) -> str:
    """What differs from what was laid down."""
    wanted = [each for shard in shards for each in shard.good]
    found = texts_of(index)
    if found != [(each.key, each.text) for each in wanted]:
        return f"has {found}, not {[(each.key, each.text) for each in wanted]}"
    for sample, each in enumerate(wanted):
        if each.image and index.read_image(sample) != each.image:
            return f"has another image in {each.key}"
    damage = [fault for fault in index.faults if fault.reason != "member_ignored"]
    cost = sum(fault.lost for fault in damage)
    if not least <= cost <= most:
        return f"loses {cost}, not {least} to {most}: {damage}"
    for shard in shards:
        named = {fault.key for fault in damage if fault.shard == shard.name}
        missing = {each.key for each in shard.laid if each.lost} - named
        if missing or (shard.harm and shard.least and not named):
            return f"does not name {missing} of {shard.name}: {damage}"
    return ""


def compare_report(report: IndexReport, index: SourceIndex, out: Path) -> str:
    """What `data index` tells, and in which files, that differs from what training finds."""
    counters = json.loads((out / "counters.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text("ascii").splitlines()]
    told = collections.Counter((line["shard"], line["key"], line["reason"], line["lost"]) for line in lines)
    wanted = collections.Counter((fault.shard, fault.key, fault.reason, fault.lost) for fault in index.faults)
    if told != wanted:
        return f"has other faults in its index: {told - wanted}, not {wanted - told}"
    if counters["samples"] != len(index) or counters != report.counters:
        return f"counts {counters['samples']} samples, not {len(index)}"
    return ""


def lost_in_folder(rng: random.Random, folder: Path) -> Outcome:
    """A folder for `prepare`: images with captions, and what is in the way of them."""
    source = folder / "source"
    places = [source, source / "deeper", source / "deeper" / "an image.png"]
    places[-1].mkdir(parents=True)
    good: dict[str, int] = {}
    named: set[Path] = set()
    forms = [rng.choice(FILES) for _ in range(rng.randint(1, 12))]
    for number, form in enumerate(forms):
        lay_file(rng, form, rng.choice(places), number, good, named)
    links = rng.sample(("deeper/a", "b", "c", "elsewhere"), rng.randint(1, 4)) if rng.random() < 0.3 else []
    if links:
        (folder / "elsewhere").mkdir()
        lay_file(rng, "pair", folder / "elsewhere", len(forms), good, named)
        (folder / "elsewhere" / "back").symlink_to(source)
    for link in links:
        (source / link).symlink_to(folder / "elsewhere")
    share = rng.choice((0.0, 0.3))

    def check() -> str:
        try:
            result = prepare(str(source), folder / "out", validation=share)
        except UserError as error:
            if good and not (share and f"all {len(good)} are kept for validation" in str(error)):
                return f"is refused: {error}"
            raise
        wanted = {text: shade(number) for text, number in good.items()}
        if told := compare_prepared(folder / "out", wanted, [path.relative_to(source) for path in named]):
            return told
        counts = result.train + result.validation, sum(result.skipped.values())
        return "" if counts == (len(good), len(named)) else f"counts {result}"

    return judge(f"{forms}, links {links}, {share} held out:", check)


def shade(number: int) -> list[int]:
    """The colour of an image, which tells its number."""
    return [number * 37 % 256, number * 91 % 256, 90]


def lay_file(
    rng: random.Random, form: str, place: Path, number: int, good: dict[str, int], named: set[Path]
) -> None:
    """One form in this folder. good: numbers of images by caption. named: what must be told of."""
    extension, text = rng.choice(list(IMAGE_FILES)), f"image {number}"
    image, caption = place / f"{number}.{extension}", place / f"{number}.txt"
    data = stored(Image.new("RGB", (16, 16), tuple(shade(number))), IMAGE_FILES[extension], b"", quality=95)
    if form == "other file":
        image = place / f"{number}.{rng.choice(('mp4', 'json', 'PDF', 'tar'))}"
    elif form == "no suffix":
        image = place / f"{number}"
    elif form == "hidden":
        image = place / f".{number}"
    if form not in ("no caption", "other file", "hidden"):
        caption.write_text(" \n" if form == "blank caption" else text)
    if form == "caption is a folder":
        caption.unlink()
        caption.mkdir()
    if form in ("pair", "linked image"):
        good[text] = number
    elif form != "hidden":
        named |= {caption} if form == "lone caption" else {image}
    named |= {caption} if form == "no suffix" else set()
    if form == "link to nothing":
        image.symlink_to(place / "gone")
    elif form == "link to itself":
        image.symlink_to(image)
    elif form == "linked image":
        (place / f".{number}").write_bytes(data)
        image.symlink_to(place / f".{number}")
    elif form == "pipe":
        os.mkfifo(image)
    elif form == "torn image":
        image.write_bytes(data[: rng.randrange(60)])
    elif form == "called an image":
        image.write_bytes(b"no image at all")
    elif form != "lone caption":
        image.write_bytes(data)


def compare_prepared(out: Path, wanted: Mapping[str, Sequence[int]], named: Iterable[Path]) -> str:
    """What differs from what was laid down in what `prepare` wrote, read by tarfile. wanted: colours by caption."""
    captions: list[str] = []
    for shard in sorted(out.glob("*/*.tar")):
        if told := [found for found in scan(shard, "sha256") if isinstance(found, Fault)]:
            return f"is prepared with faults: {told}"
        with tarfile.open(shard) as tar:
            readers = {each.name: tar.extractfile(each) for each in tar}
            members = {name: reader.read() for name, reader in readers.items() if reader}
        for name, data in members.items():
            key, _, extension = name.partition(".")
            caption = members[f"{key}.txt"].decode()
            if extension == "txt":
                captions.append(caption)
            elif extension != "json" and caption in wanted:
                colour = decode(data, channels=3, image_size=8).mean(axis=(1, 2))
                if np.abs(colour - np.array(wanted[caption])).max() > TOLERANCE:
                    return f"is prepared with the image of another caption as {name}"
    if sorted(captions) != sorted(wanted):
        return f"is prepared as {sorted(captions)}, not {sorted(wanted)}"
    return compare_skipped(out, named)


def compare_skipped(out: Path, named: Iterable[Path]) -> str:
    """What differs in the names of what was left out. Bytes that are no text are spelt."""
    wanted = sorted(os.fsencode(path).decode("utf-8", "backslashreplace") for path in named)
    record = json.loads((out / "prepared.json").read_text("utf-8"))
    names = sorted(name for name, _ in record["skipped_samples"])
    return "" if names == wanted else f"names {names}, not {wanted}"


# ---- narrow --------------------------------------------------------------------------------------------

# Of names of files and members, those that no member may hold among them, and of captions.
NAME_UNITS = (
    *"aZ7 '\"[]{},*?#%~-=:&$!;|<>@`^", "é", "e\u0301", "中", "😀", "\u200b", "\u2028", "\xa0", "\ufeff",
    "{1,3}", "ab" * 20, "word", "word",
)  # fmt: skip
UNSAFE_UNITS = ("\n", "\t", "\r", "\x1b[1m", "\x7f", "\x85", "\\", "\udcff", "\udcc3")
TEXT_UNITS = (
    "a fox", "a fox", "é", "中", "😀", " ", "  ", "\n", "\r\n", "\r", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85",
    "\u2028", "\u3000", "\ufeff", "\x01", "\x1b[1m", "\x7f", "\x9b", "\u200b", '"', "'", "\\", "{}", "\ufffe",
    "\xa0", "\U0010ffff",
)  # fmt: skip
SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
DROPPED = {*range(9), *range(14, 28), *range(127, 160)} - {0x85}
LONGEST_NAME = 255
ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8")
PAIRS = ("image", "image", "former latents", "latents alone", "apart")
HEADERS = (
    "ustar", "gnu", "gnu, large numbers", "pax", "pax, large numbers", "pax, odd records", "pax, size", "v7",
)  # fmt: skip


def narrow(rng: random.Random, folder: Path) -> Outcome:
    """What is read is written: a folder or lines by `prepare`, a tar by `codec encode`, under odd names."""
    return rng.choice((narrow_folder, narrow_lines, narrow_tar, narrow_tar))(rng, folder)


def odd_name(rng: random.Random, longest: int) -> str:
    """A name without a dot or a slash, no longer than this in bytes, sometimes with what no tar may hold."""
    units = (*NAME_UNITS, *(UNSAFE_UNITS if rng.random() < 0.2 else ()))
    name, size = rng.choice((*units, "n")), rng.choice((1, 3, 8, 200, 300))
    while len(os.fsencode(name)) < size:
        name += rng.choice(units)
    while len(os.fsencode(name)) > longest:
        name = name[:-1]
    return name


def odd_text(rng: random.Random, number: int) -> str:
    """A text with this number, which no other has, or none."""
    parts = ["".join(rng.choice(TEXT_UNITS) for _ in range(rng.choice((0, 1, 2, 12)))) for _ in range(2)]
    nothing = rng.choice((" ", "\n\x0b\x85\u3000", "\ufeff", "\x01"))
    return str(number).join(parts) if rng.random() < 0.9 else nothing


def odd_key(rng: random.Random) -> str:
    """A key of a member, in a folder or in none, as long as it may be, or too long."""
    folder = f"{odd_name(rng, 29)}/" if rng.random() < 0.3 else ""
    longest = rng.choice((40, 90, 110, 240, 255, 256, 300))
    # Behind a backslash nothing would be left of the name.
    return folder + (odd_name(rng, longest - len(os.fsencode(folder))).rstrip("\\") or "a")


def is_safe(key: str) -> bool:
    """Whether a member may be called so."""
    is_strange = re.search(r"^[A-Za-z]:|[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]", key)
    return len(os.fsencode(key)) <= LONGEST_NAME and not is_strange


@functools.cache
def codec() -> CodecConfig:
    return CodecConfig.model_validate(
        completed({"kind": "kl", "folder": str(kl_folder()), "image_size": 8}, [])
    )


def mended(text: str, *, is_caption: bool) -> str:
    """What a text or a caption says once it is read, however often; empty: nothing."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(" " if letter in SPACES else letter for letter in text if ord(letter) not in DROPPED)
    while text.startswith("\ufeff") or (is_caption and text[:1].isspace()):
        text = text[1:]
    return text.rstrip() if is_caption else text if text.strip() else ""


def narrow_folder(rng: random.Random, folder: Path) -> Outcome:
    """A folder of images with odd names and captions: prepared, indexed, and the same."""
    source, out = folder / odd_name(rng, 200), folder / f"out {odd_name(rng, 200)}"
    place = source / odd_name(rng, 100) if rng.random() < 0.5 else source
    place.mkdir(parents=True)
    names = {odd_name(rng, LONGEST_NAME - len(".webp")): "" for _ in range(rng.randint(1, 4))}
    wanted: dict[str, list[int]] = {}
    named: list[Path] = []
    for number, name in enumerate(names):
        names[name], extension = odd_text(rng, number), rng.choice(("png", "jpg", "webp"))
        image = place / f"{name}.{extension}"
        colour = Image.new("RGB", (16, 16), tuple(shade(number)))
        image.write_bytes(stored(colour, IMAGE_FILES[extension], b"", quality=95))
        image.with_suffix(".txt").write_text(names[name], encoding="utf-8", newline="")
        if caption := mended(names[name], is_caption=True):
            wanted[caption] = shade(number)
        else:
            named.append(image.relative_to(source))
    encoding = rng.choice(ENCODINGS)

    def check() -> str:
        if not wanted:
            return command(["prepare", str(source), f"--out={out}"], encoding, code=2)
        for _ in range(2):
            if told := command(["prepare", str(source), f"--out={out}", "--validation=0"], encoding):
                return told
        if told := compare_prepared(out, wanted, named):
            return told
        index = opened(f"{out}/train/*.tar")
        found = [text for _, text in texts_of(index)]
        return "" if sorted(found) == sorted(wanted) else f"is indexed as {found}"

    return judge(f"{names}, {encoding}:", check)


def narrow_lines(rng: random.Random, folder: Path) -> Outcome:
    """Lines of odd texts, indexed as they are and as `prepare` writes them: the same."""
    path, out = folder / f"{odd_name(rng, 180)}.jsonl", folder / "out"
    texts = [odd_text(rng, number) for number in range(rng.randint(1, 4))]
    texts += ["a lone \ud800"] * (rng.random() < 0.3)
    # A lone surrogate has no spelling but that of JSON.
    lines = [
        json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5 or "\ud800" in text) for text in texts
    ]
    path.write_bytes("\n".join(lines).encode())
    wanted = ["" if "\ud800" in text else mended(text, is_caption=False) for text in texts]
    good, encoding = list(filter(None, wanted)), rng.choice(ENCODINGS)
    named = [Path(f"line {number}") for number, text in enumerate(wanted) if not text]

    def check() -> str:
        if not good:
            return command(["prepare", str(path), f"--out={out}"], encoding, code=2)
        index = opened(str(path))
        if (found := [text for _, text in texts_of(index)]) != good:
            return f"is indexed as {found}, not {good}"
        if told := command(["prepare", str(path), f"--out={out}", "--validation=0"], encoding):
            return told
        index = opened(f"{out}/train/*.tar")
        if (found := [text for _, text in texts_of(index)]) != good:
            return f"is indexed as {found} once it is prepared, not {good}"
        return compare_skipped(out, named) or compare_index(path, folder / "index", encoding)

    return judge(f"{path.name!r}: {lines}, {encoding}:", check)


def narrow_tar(rng: random.Random, folder: Path) -> Outcome:
    """A tar with odd headers, names and captions: indexed, encoded, and indexed again."""
    path = folder / odd_name(rng, 60) / f"{odd_name(rng, 240)}.{rng.choice(('tar', 'tar', 'TAR'))}"
    path.parent.mkdir()
    texts = {odd_key(rng): "" for _ in range(rng.randint(1, 4))}
    data, last, said = b"", b"", list[str]()
    good: dict[str, Expected] = {}
    bad: list[str] = []
    for number, key in enumerate(texts):
        texts[key], form = odd_text(rng, number), rng.choice(PAIRS)
        if form == "apart" and not (is_safe(key) and any(map(is_safe, list(texts)[number + 1 :]))):
            # Nothing would stand between.
            form = "image"
        image, text = square_png(number), mended(texts[key], is_caption=True)
        members = {"txt": texts[key].encode()}
        if rng.random() < 0.3:
            members = {"json": json.dumps({"caption": texts[key]}, ensure_ascii=rng.random() < 0.5).encode()}
        if form != "latents alone":
            members["png"] = image
        if form in ("former latents", "latents alone"):
            stream = io.BytesIO()
            np.save(stream, np.zeros((2, 8, 8), np.float16))
            members["latent.npy"] = stream.getvalue()
        said.append(form)
        for extension, content in members.items():
            said.append(rng.choice(HEADERS))
            name = rng.choice((b"", b"./")) + os.fsencode(f"{key}.{extension}")
            written = member(rng, said[-1], name, content)
            # The image of one stands behind all others.
            is_last = form == "apart" and extension == "png"
            data, last = (data, last + written) if is_last else (data + written, last)
        if text and is_safe(key) and form != "apart":
            good[key] = Expected(text, image if form != "latents alone" else b"", form.count("latents") > 0)
        else:
            bad.append(key)
    path.write_bytes(data + last + bytes(1024))
    encoding = rng.choice(ENCODINGS)

    def check() -> str:
        if told := compare_tar(path, good, bad) or compare_index(path, folder / "index", encoding):
            return told
        try:
            encode_shards(codec(), [str(path)], out := folder / "out")
        except UserError as error:
            # What is written beside a shard needs some letters more.
            if len(os.fsencode(path.name)) > 220 and "File name too long" in str(error):
                raise
            return f"is refused: {error}"
        if (record := read_record(out / path.name)) is None:
            return "has no record of its latents"
        # Latents alone cannot be made anew.
        kept = {key: each._replace(has_latents=True) for key, each in good.items() if each.image}
        if record.encoded != len(kept) or sum(record.left_out.values()) != len(texts) - len(kept):
            return f"is encoded as {record.encoded}, without {record.left_out}"
        return compare_tar(out / path.name, kept, [])

    return judge(f"{path.name!r}: {texts}, {said}, {encoding}:", check)


class Expected(NamedTuple):
    """Of a pair its caption and image, if it has one, and whether latents stand beside it."""

    text: str
    image: bytes
    has_latents: bool


def texts_of(index: SourceIndex) -> list[tuple[str, str]]:
    """Key and text of each sample."""
    return [
        (index.key(sample), tokenizer().decode(index.text_ids(sample).tolist()))
        for sample in range(len(index))
    ]


def compare_tar(path: Path, good: Mapping[str, Expected], bad: Sequence[str]) -> str:
    """What of a shard of pairs differs in its index from what was laid down."""
    try:
        index = opened(str(path))
    except UserError:
        if not good:
            return ""
        raise
    if (found := texts_of(index)) != [(key, each.text) for key, each in good.items()]:
        return f"has {found} in {path.parent.name!r}, not {good}"
    if (faults := {fault.key for fault in index.faults}) != set(bad):
        return f"names {faults}, not {bad}"
    for sample, (key, each) in enumerate(good.items()):
        if each.has_latents != index.is_latent(sample):
            return f"has{' no' * each.has_latents} latents in {key!r}"
        if not each.has_latents and index.read_image(sample) != each.image:
            return f"has another image in {key!r}"
    return ""


def compare_index(path: Path, out: Path, encoding: str) -> str:
    """What `data index` writes of a shard must be what an index of it holds, read again."""
    if told := command(["data", "index", str(path), f"--out={out}", "--max-bad-fraction=1"], encoding):
        return told
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text("ascii").splitlines()]
    wanted = [asdict(fault) for fault in scan(path) if isinstance(fault, Fault)]
    if lines != wanted:
        return f"is told of as {lines}, not {wanted}"
    (shard,) = json.loads((out / "counters.json").read_text("utf-8"))["shards"]
    return "" if shard == path.name else f"is counted as {shard!r}"


def command(words: list[str], encoding: str, *, code: int = 0) -> str:
    """What is wrong with a command's exit code, or with what it prints at a terminal of this encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    former, sys.argv = sys.argv, ["transfusion", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = cli._run()
    finally:
        sys.argv = former
    told = "".join(stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    if found != code:
        return f"ends with {found} in {words[0]}, not {code}: {told}"
    if code and not told.removesuffix("\n").isprintable():
        return f"is refused in several lines: {told!r}"
    return ""


def member(rng: random.Random, form: str, name: bytes, content: bytes) -> bytes:
    """A member with a header of this form."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.size = len(content)
    if "numbers" in form:
        info.uid, info.gid, info.mtime = (rng.choice((1 << 20, 1 << 40, 1 << 54)) for _ in range(3))
    if form == "pax, odd records":
        long = f"SCHILY.xattr.user.{'x' * 250}"
        records = (("comment", "a=b\nc"), (long, "1"), ("mtime", "1.5"), ("LIBARCHIVE.é", "😀"))
        info.pax_headers = dict(rng.sample(records, rng.randint(1, len(records))))
    elif form == "pax, size":
        info.pax_headers = {"size": str(info.size)}
    family = form.split(",")[0]
    try:
        header = info.tobuf(TAR_FORMATS.get(family, tarfile.USTAR_FORMAT), "utf-8", "surrogateescape")
    except ValueError:
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    if form == "v7" and len(header) == BLOCK and not header[345]:
        # Of old writers: no magic, and bytes count as signed.
        fields = header[:148] + b" " * 8 + header[156:257] + bytes(BLOCK - 257)
        total = sum(byte - 256 * (byte > 127) for byte in fields)
        header = fields[:148] + b"%06o\0 " % total + fields[156:]
    return header + content + bytes(-len(content) % BLOCK)
