"""Writes each image's latents (KEY.latent.npy) or tokens (KEY.tokens.npy) beside it, shard by shard.

The record of a shard (`data.images.latents.LatentRecord`) is written last: a shard without it is made again.
I images, C channels of the latents, D those that the decoder reads, H/W height and width of images, h/w of
latents.
"""

from __future__ import annotations

import collections
import functools
import io
import itertools
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfusion.codec import open_autoencoder, open_codec
from transfusion.codec.preview import PreviewMap, read_preview, write_preview
from transfusion.codec_train.preview import MAX_IMAGES, fit_preview
from transfusion.config import CodecConfig
from transfusion.data.images.decode import decode_fitting, decode_to
from transfusion.data.images.latents import (
    LATENTS,
    TOKENS,
    LatentRecord,
    read_latent,
    read_record,
    read_tokens,
    record_path,
    record_sizes,
)
from transfusion.data.shards.sample import Fault, SampleError
from transfusion.data.shards.scan import pick_shards, scan_groups
from transfusion.data.shards.shard import LocalShard
from transfusion.data.shards.tar import EMPTY, UNREADABLE
from transfusion.data.shards.validate import IMAGE_EXTENSIONS, Group
from transfusion.data.shards.webdataset import expand
from transfusion.errors import UserError, describe, shown
from transfusion.files import atomic_file, atomic_write_text, file_digest, remove_unfinished
from transfusion.parallel.environment import find_device
from transfusion.sequence.sizes import MediaSizes

log = logging.getLogger(__name__)

_AT_ONCE = 32

# uint8 images to what is stored of each.
Encoder = Callable[[Tensor], NDArray[Any]]
# Of each shard as it is done: its name, what is told of it, and whether it was there already.
Progress = Callable[[str, LatentRecord, bool], None]


class _Job(NamedTuple):
    codec: CodecConfig
    source: Path
    target: Path
    device: str


def encode_shards(
    codec: CodecConfig,
    shards: Sequence[str],
    out: Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    progress: Progress = lambda name, record, reused: None,
) -> list[LatentRecord]:
    """Encode the images of `shards` into shards of the same names in `out`; their other members are copied.

    Killed and run again it goes on. workers: processes, each with a codec of its own and, beyond one, one CPU thread.
    Raises UserError where shards share a name or cannot be read, where `out` is where they lie, and where it holds
    latents of another codec or image size.
    """
    device = str(find_device(device))
    open_codec(codec)
    sources = pick_shards(expand(shards), "codec encode", (".tar",))
    _refuse(codec, sources, out)
    out.mkdir(parents=True, exist_ok=True)
    records: dict[Path, LatentRecord] = {}
    for source in sources:
        record = read_record(out / source.name)
        if record and not LocalShard(source).has_changed(record.source) and (out / source.name).is_file():
            records[source] = record
            progress(source.name, record, True)
    jobs = [_Job(codec, source, out / source.name, device) for source in sources if source not in records]
    remove_unfinished(out, {job.target.name for job in jobs})
    for job, record in zip(jobs, _run(jobs, workers), strict=True):
        records[job.source] = record
        progress(job.source.name, record, False)
    return [records[source] for source in sources]


@functools.lru_cache(maxsize=1)
def encoder(codec: CodecConfig, device: str) -> Encoder:
    """To float16 latents [I, C, h, w], or tokens [I, h, w] in as few bytes as hold them."""
    opened, stored = open_codec(codec, device), "float16"
    if codec.makes == "tokens":
        stored = "uint16" if codec.codebook_size <= 1 << 16 else "int32"
    return lambda values: opened.encode(values.to(device)).cpu().numpy().astype(stored)


def encode_shard(job: _Job) -> LatentRecord:
    """One shard, whole or not at all, with the samples that an index of it would see. Raises UserError."""
    codec, source, target, device = job
    encode = encoder(codec, device)
    extension = TOKENS if codec.makes == "tokens" else LATENTS
    left_out: collections.Counter[str] = collections.Counter()
    encoded = 0
    try:
        with (
            LocalShard(source).whole() as (_, facts),
            source.open("rb") as stream,
            atomic_file(target) as partial,
            tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as writer,
        ):
            found = _samples(source.name, stream.fileno(), left_out)
            while chunk := list(itertools.islice(found, _AT_ONCE)):
                read = [_read(stream, group) for group in chunk]
                values = _encoded([_decoded(members, codec, left_out) for members in read], encode)
                encoded += len(values)
                for number, (group, members) in enumerate(zip(chunk, read, strict=True)):
                    for name, data in members.items():
                        _add(writer, f"{group.key}.{name}", data)
                    if number in values:
                        _add(writer, f"{group.key}.{extension}", _array_file(values[number]))
            if left_out.keys() & {UNREADABLE, EMPTY}:
                raise UserError(
                    f"{shown(source)} cannot be read: it is no tar; `transfusion data index` shows why"
                )
        image_size, image_sizes = record_sizes(codec)
        record = LatentRecord(
            codec=codec.fingerprint,
            kind=codec.kind,
            image_size=image_size,
            image_sizes=image_sizes,
            resize=codec.resize,
            encoded=encoded,
            left_out=dict(left_out),
            digest=file_digest(target),
            source={"shard": source.name, **facts},
        )
        atomic_write_text(record_path(target), json.dumps(record._asdict(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{shown(source)} cannot be encoded: {describe(error)}") from None
    return record


def add_preview(codec: CodecConfig, out: Path, records: Sequence[LatentRecord]) -> PreviewMap | None:
    """Fit the preview map to what `encode_shards` wrote, and store it in the codec's folder.

    Args:
        codec: The settings that the shards were encoded with.
        out: Folder of the encoded shards.
        records: Of these shards.

    Returns:
        The map. None where the folder has one, where it cannot be written, and where there are no images.
    """
    folder = Path(codec.folder)
    if read_preview(folder) is not None:
        return None
    shards = [out / str(record.source["shard"]) for record in records]
    try:
        found = fit_preview(itertools.islice(_stored(codec, shards), MAX_IMAGES))
        if found is not None:
            write_preview(folder, found)
    except OSError as error:
        # The latents are there. Previews alone are missing, and the folder may be for reading only.
        log.warning("%s gets no preview map: %s", shown(folder), describe(error))
        return None
    return found


def _stored(codec: CodecConfig, shards: Sequence[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images that were encoded: what the decoder reads of each, [1, D, h, w], and its pixels, [1, C, H, W]."""
    opened, left_out = open_autoencoder(codec), collections.Counter[str]()
    extension = TOKENS if codec.codebook_size else LATENTS
    for shard in shards:
        with shard.open("rb") as stream:
            for group in _samples(shard.name, stream.fileno(), left_out):
                image = _decoded(_read(stream, group), codec, left_out)
                if image is None or extension not in group.members:
                    continue
                member = group.members[extension]
                stream.seek(member.start)
                data, size = stream.read(member.size), codec.codebook_size
                try:
                    stored = torch.from_numpy(read_tokens(data, size) if size else read_latent(data))
                except SampleError:
                    continue
                yield opened.decoder_input(stored[None]), torch.from_numpy(image)[None]


def _encoded(images: Sequence[NDArray[np.uint8] | None], encode: Encoder) -> dict[int, NDArray[Any]]:
    """What is stored of each image, by its number; those of one shape are encoded together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        if image is not None:
            by_shape.setdefault(image.shape, []).append(number)
    values: dict[int, NDArray[Any]] = {}
    for numbers in by_shape.values():
        stacked = np.stack([image for number in numbers if (image := images[number]) is not None])
        values |= zip(numbers, encode(torch.from_numpy(stacked)), strict=True)
    return values


def _refuse(codec: CodecConfig, sources: Sequence[Path], out: Path) -> None:
    if not sources:
        raise UserError("no .tar shard is named; name shards with images, such as data/train/*.tar")
    if codec.kind == "pixels":
        raise UserError("codec.kind=pixels has no latents to write: images are read as they are")
    names = collections.Counter(source.name for source in sources)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} shards are called {shown(name)}; encode them into folders of their own")
    for source in sources:
        if source.resolve() == (out / source.name).resolve():
            raise UserError(f"{shown(out)} is the folder of {shown(source.name)}; name another folder")
        record = read_record(out / source.name)
        mine = (codec.fingerprint, set(codec.sizes), codec.resize)
        if record and (record.codec, record.sizes, record.resize) != mine:
            made = ", ".join(sorted(map(str, record.sizes)))
            asked = ", ".join(map(str, codec.sizes))
            raise UserError(
                f"{shown(out / source.name)} holds latents of codec {record.codec} at {made} pixels ({record.resize}),"
                f" not of {codec.fingerprint} at {asked} ({codec.resize}); name another folder, or remove it"
            )


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[LatentRecord]:
    """In order; in this process where one worker is enough."""
    processes = min(workers, len(jobs))
    if processes <= 1:
        yield from map(encode_shard, jobs)
        return
    # Forked, a process would inherit locks of torch's threads.
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(encode_shard, jobs)


def _samples(shard: str, descriptor: int, left_out: collections.Counter[str]) -> Iterator[Group]:
    """What an index takes as samples. Whatever it leaves out is counted and not carried along.

    So are latents without their image: nothing here can make them anew, and their caption alone is no text.
    """
    for group, found in scan_groups(shard, descriptor):
        if isinstance(found, Fault):
            left_out[found.reason] += found.lost
        elif group and found.images and not found.elements and not group.members.keys() & {*IMAGE_EXTENSIONS}:
            left_out["image_missing"] += 1
        elif group:
            yield group


def _read(stream: BinaryIO, group: Group) -> dict[str, bytes]:
    """Members of a sample by extension, without latents or tokens that were there before."""
    members = {}
    for name, member in group.members.items():
        if name not in (LATENTS, TOKENS):
            stream.seek(member.start)
            members[name] = stream.read(member.size)
    return members


def _decoded(
    members: dict[str, bytes], codec: CodecConfig, left_out: collections.Counter[str]
) -> NDArray[np.uint8] | None:
    """The pair's image; None for texts, interleaved documents, and what cannot be decoded."""
    images = [data for name, data in members.items() if name in IMAGE_EXTENSIONS]
    if len(images) != 1:
        left_out.update(["ambiguous_image"] * (len(images) > 1))
        return None
    try:
        sizes = MediaSizes(codec.sizes, codec.downscale, 1, resize=codec.resize)
        if not sizes.is_multi_size:
            return decode_to(images[0], sizes.first, channels=codec.channels, resize=codec.resize)
        return decode_fitting(images[0], sizes, channels=codec.channels)
    except SampleError as error:
        left_out[str(error)] += 1
        return None


def _array_file(values: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()


def _add(writer: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    writer.addfile(member, io.BytesIO(data))
