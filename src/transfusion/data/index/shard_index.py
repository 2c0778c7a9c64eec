"""The index file of one shard: where its good samples stand, how long they are, and what was left out and why.

Columns in the narrowest type that holds them, in a safetensors file (`columns_file`) that is mapped, not read.
Shape suffixes: N good samples, C their texts and captions, T tokens of these, I stored images, E elements of
interleaved documents, F faults.
"""

from __future__ import annotations

import array
import collections
import contextlib
import errno
import json
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.config.sections import SourceKind, Verify
from transfusion.data.images import probe
from transfusion.data.index.columns_file import DamagedFile, map_file, read_header, write_columns
from transfusion.data.remote.download import ShardChanged
from transfusion.data.shards import sample, scan, validate
from transfusion.data.shards.sample import Fault, RawSample
from transfusion.data.shards.shard import Shard
from transfusion.files import atomic_write_text, fingerprint
from transfusion.sequence.sizes import IMAGE
from transfusion.sequence.tokenizer import Tokenizer

Integers = NDArray[np.int64]

# Raised whenever the same shard would give another file.
_VERSION = 5
# How files of earlier versions began.
_FORMER_MAGIC = b"transfusion\x1aidx\n"
_COLUMNS = (
    "key_bytes_N", "offset_N", "captions_N", "stored_images_N", "elements_N", "tokens_C", "image_offset_I",
    "image_size_I", "image_width_I", "image_height_I", "latent_channels_I", "modality_I", "element_E",
    "fault_key_bytes_F", "fault_offset_F", "fault_reason_F", "fault_lost_F",
)  # fmt: skip
# Letters that are tokenised together, and token ids that are written together.
_LETTERS_AT_ONCE, _IDS_AT_ONCE = 1 << 14, 1 << 16
# Beside the index of a remote shard, once a download has shown that the shard is another.
_CHANGED = ".changed"
# Beside an index: the state that its shard had when its bytes were last compared, as of a copy.
_COMPARED = ".compared"
# Shards of one row; a process may open a few hundred files.
_OPEN_AT_ONCE = 64


# Faults of what has an image or a sound and may have had a caption.
_OF_PAIRS = (
    "ambiguous_image", "caption_missing", "caption_empty", "caption_other", "hash_missing", "image_empty",
    "image_truncated", "image_corrupt", "image_transparency", "image_too_large", "image_too_small", "image_aspect",
    "image_metadata_bomb", "image_other", "ambiguous_media", "sound_empty", "sound_truncated", "sound_corrupt",
    "sound_not_finite", "sound_rate", "sound_length", "sound_too_long",
)  # fmt: skip


class IndexFingerprint(NamedTuple):
    """What an index file depends on beside the shard: fingerprints of the tokenizer and of the rules."""

    tokenizer: str
    policy: str

    @classmethod
    def of(cls, encoder: Tokenizer | None) -> IndexFingerprint:
        """encoder: None where texts are not tokenised."""
        limits = [
            _VERSION, sample.CAPTION_BYTES, sample.DOCUMENT_BYTES, scan.MAX_NAME, validate.MAX_MEMBER,
            validate.MAX_ELEMENTS, probe.MAX_PIXELS, probe.MIN_SIDE, probe.MAX_ASPECT,
            probe.MAX_METADATA,
        ]  # fmt: skip
        tokenizer = encoder.fingerprint if encoder else ""
        return cls(tokenizer, fingerprint(limits))


class StaleIndex(Exception):  # noqa: N818  (no mistake of the program: the file must be made anew)
    """An index file that does not fit; the message says what has changed."""


class FormerIndex(StaleIndex):
    """An index file in a container of earlier versions. It is made anew wherever it stands."""


class ShardIndex:
    """One index file; its arrays are mapped when they are first asked for."""

    def __init__(self, path: Path, shard: Shard) -> None:
        """Raises StaleIndex when the file is damaged, cut short, or of another version; OSError when it is missing."""
        self.path, self.shard = path, shard
        self._arrays: dict[str, NDArray[Any]] = {}
        try:
            with path.open("rb") as stream:
                self._facts, self._columns = read_header(stream)
        except DamagedFile:
            former = is_former(path)
            raise (
                FormerIndex("it is of an earlier version") if former else StaleIndex("it is damaged")
            ) from None
        self._header = self._facts, self._columns
        with contextlib.suppress(OSError, ValueError, KeyError):
            compared = json.loads(self._compared.read_text(encoding="utf-8"))
            if compared["digest"] == self._facts["digest"]:
                self._facts = self._facts | compared

    def __len__(self) -> int:
        return self._facts["samples"]

    @property
    def notes(self) -> dict[str, int]:
        """What was mended or overlooked in good samples, counted."""
        return dict(self._facts["notes"])

    def check(self, prints: IndexFingerprint) -> None:
        """Raises StaleIndex when the shard, the tokenizer or the rules are no longer those of this file."""
        stated = self._facts
        if stated["tokenizer"] != prints.tokenizer:
            made = "with another tokenizer" if stated["tokenizer"] else "without a tokenizer"
            raise StaleIndex(f"it was made {made}")
        if stated["policy"] != prints.policy:
            raise StaleIndex("it was made with other rules for images and texts")
        if (self.shard.is_remote and self._changed.exists()) or self.shard.has_changed(stated):
            raise StaleIndex("the shard has changed since")

    @property
    def is_doubtful(self) -> bool:
        """Whether the shard may have changed, which reading all of it would tell."""
        return any(self._facts.get(name) != value for name, value in self.shard.state().items())

    def compare(self, *, always: bool = False) -> None:
        """Read all of a shard that may have changed, or `always`. Where its bytes are the same the next start knows.

        Raises StaleIndex.
        """
        state, doubtful = self.shard.state(), self.is_doubtful
        if (always or doubtful) and self.shard.has_changed(self._facts, read=always):
            raise StaleIndex("the shard has changed since")
        if doubtful:
            self._facts = self._facts | state
            with contextlib.suppress(OSError):
                atomic_write_text(self._compared, json.dumps({**state, "digest": self._facts["digest"]}))

    def verify(self) -> None:
        """Raises StaleIndex when the checksum of any array is wrong."""
        for name, column in self._columns.items():
            if zlib.crc32(self[name].data) != column.checksum:
                raise StaleIndex("it is damaged")

    def modality_I(self, declared: Sequence[str]) -> NDArray[np.int8]:
        """Of each stored image or array the number of its modality among these. -1: it is none of them."""
        numbers = [declared.index(name) if name in declared else -1 for name in self._facts["modalities"]]
        return np.array(numbers, np.int8)[self["modality_I"]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        array = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = self._columns[name].values(self._map)
        return array

    @cached_property
    def _map(self) -> Any:
        # One for all columns: a process may have 65,530 of them.
        with self.path.open("rb") as stream:
            if read_header(stream) != self._header:
                raise OSError(
                    errno.ESTALE, "replaced while it was read; start the command again", str(self.path)
                )
            return map_file(stream)

    @cached_property
    def caption_start_N(self) -> Integers:
        return _borders(self["captions_N"])

    @cached_property
    def token_start_C(self) -> Integers:
        return _borders(self["tokens_C"])

    @cached_property
    def image_start_N(self) -> Integers:
        return _borders(self["stored_images_N"])

    @cached_property
    def element_start_N(self) -> Integers:
        return _borders(self["elements_N"])

    @cached_property
    def _key_start_N(self) -> Integers:
        return _borders(self["key_bytes_N"])

    @property
    def images_N(self) -> Integers:
        """Images in each sample's document: the same image may stand in it several times."""
        if not self["element_E"].size:
            return self["stored_images_N"].astype(np.int64)
        negative = np.concatenate([[0], np.cumsum(self["element_E"] < 0)])
        in_elements_N = negative[self.element_start_N[1:]] - negative[self.element_start_N[:-1]]
        return np.where(self["elements_N"] > 0, in_elements_N, self["stored_images_N"]).astype(np.int64)

    def key(self, sample: int) -> str:
        """Key of a good sample."""
        return _text(self["keys"], self._key_start_N, sample)

    def elements(self, sample: int) -> list[int]:
        """In reading order t >= 0: the next t tokens of the text; -1 - p: image p. Empty for pairs and texts."""
        return self["element_E"][slice(*self.element_start_N[sample : sample + 2])].tolist()

    def read_image(self, sample: int, image_number: int = 0, shards: OpenShards | None = None) -> bytes:
        """Bytes of an image or latent, as they are now in the shard; a remote one is fetched. Raises OSError.

        shards: open ones, where several are read.
        """
        if shards is None:
            with OpenShards() as alone:
                return self.read_image(sample, image_number, alone)
        place = self.image_start_N.item(sample) + image_number
        size, offset = self["image_size_I"].item(place), self["image_offset_I"].item(place)
        return os.pread(shards.descriptor(self), size, offset)

    def open(self) -> int:
        """A descriptor of the shard, or of the copy of a remote one. Raises OSError."""
        with self._noting_changes():
            return self.shard.open(self._facts)

    def fetch(self, *, must: bool = True, stop: threading.Event | None = None) -> bool:
        """See that the shard can be opened. False says that there is no room now. See `Shard.fetch`."""
        with self._noting_changes():
            return self.shard.fetch(self._facts, must=must, stop=stop)

    @property
    def copy_name(self) -> str:
        """What the copy of a remote shard is called in the cache."""
        return self.shard.copy_name(self._facts)

    @property
    def digest(self) -> str:
        """Hash of all bytes of a local shard."""
        return self._facts["digest"]

    @property
    def shard_bytes(self) -> int:
        """Size of the shard when it was indexed."""
        return self._facts["size"]

    @contextlib.contextmanager
    def _noting_changes(self) -> Iterator[None]:
        try:
            yield
        except ShardChanged:
            # So the next start refuses this index, or makes it anew; it may be a folder that only others write.
            with contextlib.suppress(OSError):
                self._changed.touch()
            raise

    @property
    def _compared(self) -> Path:
        return self.path.with_name(self.path.name + _COMPARED)

    @property
    def _changed(self) -> Path:
        return self.path.with_name(self.path.name + _CHANGED)

    @property
    def has_latents(self) -> bool:
        """Whether some images are stored as latents or tokens."""
        return bool((self["latent_channels_I"][self["modality_I"] == 0] > 0).any())

    def is_latent(self, sample: int, image_number: int = 0) -> bool:
        """Whether this is a latent, not an image."""
        return bool(self["latent_channels_I"].item(self.image_start_N.item(sample) + image_number))

    def fault(self, sample: int, reason: str) -> Fault:
        """A fault of a good sample, found later."""
        return Fault(self.shard.name, self.key(sample), reason, int(self["offset_N"][sample]))

    def stray_N(self, kind: SourceKind) -> NDArray[np.bool_]:
        """Which good samples a source of this kind should not hold.

        By itself a shard of more pairs than texts, damaged pairs among them, holds no texts.
        """
        is_document_N, has_images_N = self["elements_N"] > 0, self["stored_images_N"] > 0
        is_pair_N, is_text_N = has_images_N & ~is_document_N, ~has_images_N & ~is_document_N
        if kind == "auto":
            damaged = sum(fault.lost for fault in self.faults() if fault.reason in _OF_PAIRS)
            kind = "pairs" if is_pair_N.sum() + damaged > is_text_N.sum() else "mixed"
            is_pair_N = is_pair_N | is_document_N
        wanted = {"texts": is_text_N, "pairs": is_pair_N, "interleaved": is_document_N}
        stray_N: NDArray[np.bool_] = ~wanted[kind] if kind in wanted else np.zeros(len(self), np.bool_)
        return stray_N

    def stray_faults(self, kind: SourceKind) -> Iterator[Fault]:
        """Those samples as faults."""
        for number in np.flatnonzero(self.stray_N(kind)).tolist():
            yield self.fault(number, "other_kind" if self["stored_images_N"][number] else "image_missing")

    def faults(self) -> Iterator[Fault]:
        """What was left out when the shard was read."""
        starts = _borders(self["fault_key_bytes_F"])
        columns = (self[name].tolist() for name in ("fault_reason_F", "fault_offset_F", "fault_lost_F"))
        for number, (reason, offset, lost) in enumerate(zip(*columns, strict=True)):
            key = _text(self["fault_keys"], starts, number)
            yield Fault(self.shard.name, key, self._facts["reasons"][reason], offset, lost)

    def __getstate__(self) -> dict[str, Any]:
        # Other processes map the file themselves.
        return {
            "path": self.path,
            "shard": self.shard,
            "_facts": self._facts,
            "_header": self._header,
            "_columns": self._columns,
            "_arrays": {},
        }


class OpenShards(contextlib.ExitStack):
    """Shards opened once for several images, and closed together."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[int, int] = {}

    def descriptor(self, index: ShardIndex) -> int:
        """Of the shard of this index. Raises OSError."""
        descriptor = self._descriptors.get(id(index))
        if descriptor is None:
            if len(self._descriptors) == _OPEN_AT_ONCE:
                self.close()
                self._descriptors.clear()
            descriptor = self._descriptors[id(index)] = index.open()
            self.callback(os.close, descriptor)
        return descriptor


def index_shard(shard: Shard, path: Path, encoder: Tokenizer | None, verify: Verify = "none") -> None:
    """Read the shard once, a remote one through its cache, and write its index file, whole or not at all.

    encoder: None: texts have no tokens. verify: see `scan`. Raises OSError, and UserError where a download ends in one.
    """
    # Token ids wait on the disk: a shard of texts has more of them than of all else.
    with shard.whole() as (file, facts), tempfile.TemporaryFile(dir=path.parent) as spool:
        collector = _Collector(spool, encoder)
        for found in scan.scan(file, verify):
            if isinstance(found, Fault):
                collector.add_fault(found)
            else:
                collector.add(found)
        columns, counted = collector.finish()
        prints = IndexFingerprint.of(encoder)._asdict()
        write_columns(path, columns, {"shard": shard.name, **facts, **prints, "verify": verify, **counted})
    for mark in (_CHANGED, _COMPARED):
        path.with_name(path.name + mark).unlink(missing_ok=True)


class _Collector:
    """Collects columns in memory, a few bytes a sample, and token ids in a file."""

    def __init__(self, spool: BinaryIO, encoder: Tokenizer | None) -> None:
        self._spool, self._encoder = spool, encoder
        self._id_type = np.dtype("<u2" if encoder is None or encoder.vocabulary <= 1 << 16 else "<i4")
        self._columns = {name: array.array("q") for name in _COLUMNS}
        self._keys, self._fault_keys = bytearray(), bytearray()
        self._reasons: dict[str, int] = {}
        self._modalities = {IMAGE: 0}
        self._notes: collections.Counter[str] = collections.Counter()
        self._untokenised: list[RawSample] = []
        self._letters = 0
        self._waiting: list[int] = []
        self._tokens = 0

    def add(self, found: RawSample) -> None:
        self._untokenised.append(found)
        self._letters += sum(map(len, found.texts))
        if self._letters >= _LETTERS_AT_ONCE:
            self._tokenise()

    def _tokenise(self) -> None:
        """Put the samples that wait for it into the columns."""
        texts = [text for found in self._untokenised for text in found.texts]
        ids = iter(self._encoder.encode_all(texts) if self._encoder else [[] for _ in texts])
        for found in self._untokenised:
            self._put(found, [next(ids) for _ in found.texts])
        self._untokenised.clear()
        self._letters = 0

    def _put(self, found: RawSample, ids: list[list[int]]) -> None:
        put = self._columns
        if found.elements:
            put["element_E"].extend([len(ids[t]) if t >= 0 else t for t in found.elements])
            # In reading order they are one text, which its elements cut.
            ids = [[token for t in found.elements if t >= 0 for token in ids[t]]]
        key = found.key.encode()
        self._keys += key
        put["key_bytes_N"].append(len(key))
        put["offset_N"].append(found.offset)
        put["captions_N"].append(len(ids))
        put["stored_images_N"].append(len(found.images))
        put["elements_N"].append(len(found.elements))
        for stored in found.images:
            put["image_offset_I"].append(stored.offset)
            put["image_size_I"].append(stored.size)
            put["image_width_I"].append(stored.width)
            put["image_height_I"].append(stored.height)
            put["latent_channels_I"].append(stored.latent_channels)
            put["modality_I"].append(self._modalities.setdefault(stored.modality, len(self._modalities)))
        for text in ids:
            put["tokens_C"].append(len(text))
            self._waiting += text
        if len(self._waiting) >= _IDS_AT_ONCE:
            self._write_ids()
        if found.notes:
            self._notes.update(found.notes)

    def add_fault(self, fault: Fault) -> None:
        key = fault.key.encode("utf-8", "surrogateescape")
        self._fault_keys += key
        reason = self._reasons.setdefault(fault.reason, len(self._reasons))
        self._columns["fault_key_bytes_F"].append(len(key))
        self._columns["fault_offset_F"].append(fault.offset)
        self._columns["fault_reason_F"].append(reason)
        self._columns["fault_lost_F"].append(fault.lost)

    def finish(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """All columns, and what was counted."""
        self._tokenise()
        self._write_ids()
        self._spool.flush()
        columns: dict[str, NDArray[Any]] = {
            name: _narrowed(np.frombuffer(values, np.int64)) for name, values in self._columns.items()
        }
        columns["keys"] = np.frombuffer(self._keys, np.uint8)
        columns["fault_keys"] = np.frombuffer(self._fault_keys, np.uint8)
        columns["token_ids_T"] = np.empty(0, self._id_type)
        if self._tokens:
            columns["token_ids_T"] = np.memmap(self._spool, self._id_type, "r", shape=(self._tokens,))
        counted = {
            "samples": len(self._columns["offset_N"]),
            "notes": dict(sorted(self._notes.items())),
            "reasons": list(self._reasons),
            "modalities": list(self._modalities),
        }
        return columns, counted

    def _write_ids(self) -> None:
        self._spool.write(np.array(self._waiting, self._id_type).tobytes())
        self._tokens += len(self._waiting)
        self._waiting.clear()


def is_former(path: Path) -> bool:
    """Whether an index file of an earlier version stands there."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        return stream.read(len(_FORMER_MAGIC)) == _FORMER_MAGIC
    return False


def _narrowed(values: Integers) -> NDArray[Any]:
    """The same numbers in the smallest little-endian integers that hold them."""
    if not values.size:
        return values.astype(np.uint8)
    kind = np.promote_types(np.min_scalar_type(values.min()), np.min_scalar_type(values.max()))
    return values.astype(kind.newbyteorder("<"))


def _borders(counts: NDArray[Any]) -> Integers:
    """Where each begins when they follow one another, and where the last ends."""
    borders = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=borders[1:])
    return borders


def _text(characters: NDArray[np.uint8], starts: Integers, number: int) -> str:
    return characters[slice(*starts[number : number + 2])].tobytes().decode("utf-8", "surrogateescape")
