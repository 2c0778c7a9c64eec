"""The members of one key to a sample, or the reason why they are none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transfusion.config.sections import SOUND, Verify
from transfusion.data.images.latents import HEADER_BYTES, LATENTS, TOKENS, latent_shape, token_shape
from transfusion.data.images.probe import probe
from transfusion.data.shards.sample import (
    CAPTION_BYTES,
    DOCUMENT_BYTES,
    RawSample,
    SampleError,
    StoredImage,
    caption,
    document,
    json_object,
    piece,
    utf8,
)
from transfusion.data.shards.tar import NO_END_MARKER, Member, Window
from transfusion.data.sounds.files import probe as probe_sound
from transfusion.files import sha256
from transfusion.sequence.sizes import IMAGE

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SOUND_EXTENSIONS = ("wav", "flac")
MAX_MEMBER = 1 << 26
MAX_ELEMENTS = 256

# Of the head of a file and its size: [C, h, w] of what is stored there.
ShapeOf = Callable[[bytes, int], tuple[int, int, int]]
# Of a sample: its texts, images and elements.
Contents = tuple[tuple[str, ...], tuple[StoredImage, ...], tuple[int, ...]]

_DOTTED = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Of an array of another modality, with its name: alone beside a caption, and one of several in a document.
_ARRAY = re.compile(r"([a-z][a-z_]{0,30})\.npy")
_ELEMENT_ARRAY = re.compile(r"([a-z][a-z_]{0,30})\d{1,6}\.npy")
_ELEMENT_SOUND = re.compile(rf"{SOUND}\d{{1,6}}\.(?:{'|'.join(SOUND_EXTENSIONS)})")
_ELEMENT_IMAGE = re.compile(rf"img\d{{1,6}}\.(?:{'|'.join(IMAGE_EXTENSIONS)})")


@dataclass(slots=True)
class Group:
    """Adjacent members of one key, by extension in lower case.

    reason: what was found wrong before anything was read. damage: what stands beside it and may have taken
    members away.
    """

    key: str
    offset: int
    members: dict[str, Member] = field(default_factory=dict)
    reason: str = ""
    damage: str = ""

    @property
    def dotted(self) -> int:
        """How many were meant where dots in names, as in cat.0.png and cat.1.png, made one key of them; else 0."""
        if "json" in self.members:
            return 0
        named = [name for name in self.members if "." in name and not _ELEMENT_IMAGE.fullmatch(name)]
        return max(sum(name.endswith(ends) for name in named) for ends in (_DOTTED, ".txt", ".json"))

    @property
    def samples(self) -> int:
        """How many were meant."""
        return max(1, self.dotted)

    def add(self, extension: str, member: Member) -> None:
        """Take a member in, or remember why the sample is none."""
        reason = member.torn
        if extension in self.members:
            reason = "duplicate_member"
        elif not reason and not member.regular:
            reason = "member_type"
        elif not reason and member.size > MAX_MEMBER:
            reason = "member_oversize"
        self.reason = self.reason or reason
        self.members[extension] = member


class SampleValidator:
    """Reads what the groups of one shard name. verify: see `scan`."""

    def __init__(self, descriptor: int, verify: Verify) -> None:
        self._window, self._verify = Window(descriptor), verify != "none"

    def sample(self, group: Group) -> RawSample:
        """The sample of this group. Raises SampleError with the reason why it is none."""
        if group.reason:
            raise SampleError(group.reason)
        notes: list[str] = []
        try:
            texts, images, elements = self._read(group, notes)
        except SampleError as error:
            # Where a shard merely ends early, what is missing tells more than that it ended.
            hidden = group.damage not in ("", NO_END_MARKER)
            raise SampleError(group.damage if hidden else str(error)) from None
        if group.damage and not images:
            # A text alone may be the caption of an image that is gone.
            raise SampleError(group.damage)
        return RawSample(group.key, texts, images, elements, group.offset, tuple(notes))

    def _read(self, group: Group, notes: list[str]) -> Contents:
        members = group.members
        images = [name for name in IMAGE_EXTENSIONS if name in members]
        if len(images) > 1:
            raise SampleError("ambiguous_image")
        if LATENTS in members:
            return self._pair(group, members[LATENTS], notes, shape=latent_shape)
        if TOKENS in members:
            return self._pair(group, members[TOKENS], notes, shape=token_shape)
        if images:
            return self._pair(group, members[images[0]], notes)
        if "npy" in members:
            return self._pair(group, members["npy"], notes, shape=latent_shape)
        arrays = [name for name in members if _ARRAY.fullmatch(name)]
        sounds = [name for name in SOUND_EXTENSIONS if name in members]
        if len(arrays) + len(sounds) > 1:
            raise SampleError("ambiguous_media")
        if sounds:
            return self._pair(group, members[sounds[0]], notes, modality=SOUND)
        if arrays:
            return self._pair(group, members[arrays[0]], notes, shape=latent_shape, modality=arrays[0][:-4])
        if "json" in members:
            facts = json_object(self._bytes(members["json"], DOCUMENT_BYTES))
            if "elements" not in facts:
                raise SampleError("image_missing")
            return self._interleaved(group, facts["elements"], notes)
        if set(members) != {"txt"}:
            raise SampleError("dotted_names" if group.samples > 1 else "image_missing")
        return (document(utf8(self._bytes(members["txt"], DOCUMENT_BYTES)), notes),), (), ()

    def _pair(
        self,
        group: Group,
        member: Member,
        notes: list[str],
        *,
        shape: ShapeOf | None = None,
        modality: str = IMAGE,
    ) -> Contents:
        """shape: of latents, tokens or an array; None: the member is an image."""
        facts: dict[str, Any] = {}
        if "json" in group.members:
            try:
                facts = json_object(self._bytes(group.members["json"], DOCUMENT_BYTES))
            except SampleError as error:
                if "txt" not in group.members:
                    raise
                # With a caption in KEY.txt, what the .json says is not needed.
                notes.append(str(error))
        captions = self._captions(group, facts, notes)
        if shape is not None:
            return captions, (self._array(member, shape, modality),), ()
        data = self._bytes(member)
        image = self._image(member, data, notes) if modality == IMAGE else self._sound(member, data)
        if self._verify:
            stated = facts.get("sha256")
            if not isinstance(stated, str):
                raise SampleError("hash_missing")
            if sha256(data) != stated.lower():
                raise SampleError("image_other")
        return captions, (image,), ()

    def _captions(self, group: Group, facts: dict[str, Any], notes: list[str]) -> tuple[str, ...]:
        """The captions listed in `captions`, with the one of KEY.txt, or else of `caption`, among them."""
        listed = facts.get("captions")
        captions = []
        for text in listed if isinstance(listed, list) else []:
            try:
                captions += [caption(text, notes)] if isinstance(text, str) else []
            except SampleError:
                notes.append("caption_ignored")
        if "txt" in group.members:
            main = caption(utf8(self._bytes(group.members["txt"], CAPTION_BYTES)), notes)
            if self._verify and not _is_caption(main, facts):
                raise SampleError("caption_other")
        elif isinstance(facts.get("caption"), str):
            main = caption(facts["caption"], notes)
        elif captions:
            main = captions[0]
        else:
            raise SampleError("caption_missing")
        return tuple(captions) if main in captions else (main, *captions)

    def _interleaved(self, group: Group, elements: Any, notes: list[str]) -> Contents:
        if not isinstance(elements, list):
            raise SampleError("interleaved_element")
        if not elements:
            raise SampleError("interleaved_empty")
        if len(elements) > MAX_ELEMENTS:
            raise SampleError("interleaved_too_long")
        texts: list[str] = []
        names: dict[str, int] = {}
        order: list[int] = []
        for element in elements:
            kind = element.get("type") if isinstance(element, dict) else None
            value = element.get(kind) if isinstance(kind, str) else None
            if not isinstance(value, str):
                raise SampleError("interleaved_element")
            if kind != "text":
                if _modality_of(value) != kind or value not in group.members:
                    raise SampleError("interleaved_ref")
                order.append(-1 - names.setdefault(value, len(names)))
            elif text := piece(value, notes):
                order.append(len(texts))
                texts.append(text)
        if not names and not any(text.strip() for text in texts):
            raise SampleError("interleaved_empty")
        if sum(map(len, texts)) > DOCUMENT_BYTES:
            raise SampleError("text_oversize")
        if any(_ELEMENT_IMAGE.fullmatch(name) and name not in names for name in group.members):
            notes.append("interleaved_unused_image")
        shown = [group.members[name] for name in names]
        images = tuple(self._element(name, member, notes) for name, member in zip(names, shown, strict=True))
        return tuple(texts), images, tuple(order)

    def _element(self, name: str, member: Member, notes: list[str]) -> StoredImage:
        if _ELEMENT_IMAGE.fullmatch(name):
            return self._image(member, self._bytes(member), notes)
        if _ELEMENT_SOUND.fullmatch(name):
            return self._sound(member, self._bytes(member))
        return self._array(member, latent_shape, _modality_of(name))

    def _sound(self, member: Member, data: bytes) -> StoredImage:
        return StoredImage(member.start, member.size, probe_sound(data).samples, 1, modality=SOUND)

    def _array(self, member: Member, shape: ShapeOf, modality: str) -> StoredImage:
        head = self._window.read(member.start, min(member.size, HEADER_BYTES))
        channels, height, width = shape(head, member.size)
        return StoredImage(member.start, member.size, width, height, channels, modality)

    def _image(self, member: Member, data: bytes, notes: list[str]) -> StoredImage:
        facts = probe(data)
        if facts.animated:
            notes.append("image_animated")
        return StoredImage(member.start, member.size, facts.width, facts.height)

    def _bytes(self, member: Member, maximum: int | None = None) -> bytes:
        """maximum: of a text."""
        if maximum is not None and member.size > maximum:
            raise SampleError("text_oversize")
        return self._window.read(member.start, member.size)


def _modality_of(name: str) -> str:
    """Of a member of an interleaved document. Empty: it can be in none."""
    if _ELEMENT_IMAGE.fullmatch(name):
        return IMAGE
    if _ELEMENT_SOUND.fullmatch(name):
        return SOUND
    found = _ELEMENT_ARRAY.fullmatch(name)
    return found[1] if found else ""


def _is_caption(text: str, facts: dict[str, Any]) -> bool:
    """Whether this text is the `caption` of KEY.json, where that has one."""
    stated = facts.get("caption")
    try:
        return not isinstance(stated, str) or stated == text or caption(stated, []) == text
    except SampleError:
        return True
