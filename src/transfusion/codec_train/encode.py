"""Writes each image's latents (KEY.latent.npy) or tokens (KEY.tokens.npy) beside it, shard by shard.

The record of a shard (`data.images.latents.LatentRecord`) is written last: a shard without it is made again.
I images, C channels of the latents, H/W height and width of images, h/w of latents.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfusion.codec import open_codec
from transfusion.config import CodecConfig
from transfusion.data.images.decode import decode_fitting, decode_to
from transfusion.data.images.latents import (
    LATENTS,
    TOKENS,
    LatentRecord,
    read_record,
    record_path,
    record_sizes,
)
from transfusion.data.shards.sample import SampleError
from transfusion.data.shards.validate import IMAGE_EXTENSIONS, MAX_MEMBER
from transfusion.data.shards.webdataset import expand
from transfusion.errors import UserError
from transfusion.files import atomic_file, atomic_write_text, remove_unfinished
from transfusion.parallel.environment import find_device
from transfusion.sequence.sizes import ImageSizes

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


class _Group(NamedTuple):
    """Adjacent members of one key, in order, without latents or tokens that were there before."""

    key: str
    members: list[tuple[tarfile.TarInfo, bytes]]


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
    sources = [path for path in expand(shards) if path.suffix == ".tar"]
    _refuse(codec, sources, out)
    out.mkdir(parents=True, exist_ok=True)
    records: dict[Path, LatentRecord] = {}
    for source in sources:
        record = read_record(out / source.name)
        if record and record.source_bytes == source.stat().st_size and (out / source.name).is_file():
            records[source] = record
            progress(source.name, record, True)
    jobs = [_Job(codec, source, out / source.name, device) for source in sources if source not in records]
    remove_unfinished(out, {job.target.name for job in jobs})
    for job, record in zip(jobs, _run(jobs, workers), strict=True):
        records[job.source] = record
        progress(job.source.name, record, False)
    return [records[source] for source in sources]


def encoder(codec: CodecConfig, device: str = "cpu") -> Encoder:
    """To float16 latents [I, C, h, w], or tokens [I, h, w] in as few bytes as hold them."""
    opened, stored = open_codec(codec, device), "float16"
    if codec.makes == "tokens":
        stored = "uint16" if codec.codebook_size <= 1 << 16 else "int32"
    return lambda values: opened.encode(values.to(device)).cpu().numpy().astype(stored)


def encode_shard(encode: Encoder, codec: CodecConfig, source: Path, target: Path) -> LatentRecord:
    """One shard, whole or not at all. Raises UserError for one that is no tar."""
    extension = TOKENS if codec.makes == "tokens" else LATENTS
    left_out: collections.Counter[str] = collections.Counter()
    encoded = 0
    try:
        with (
            atomic_file(target) as partial,
            tarfile.open(source) as reader,
            tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as writer,
        ):
            for chunk in _chunks(_groups(reader)):
                values = _encoded([_decoded(group, codec, left_out) for group in chunk], encode)
                encoded += len(values)
                for number, group in enumerate(chunk):
                    for member, data in group.members:
                        writer.addfile(member, io.BytesIO(data))
                    if number in values:
                        _add(writer, f"{group.key}.{extension}", values[number])
    except tarfile.TarError as error:
        raise UserError(f"{source} cannot be read: {error}; `transfusion data index` shows why") from None
    image_size, image_sizes = record_sizes(codec)
    record = LatentRecord(
        codec=codec.fingerprint,
        kind=codec.kind,
        image_size=image_size,
        image_sizes=image_sizes,
        encoded=encoded,
        left_out=dict(left_out),
        source=source.name,
        source_bytes=source.stat().st_size,
    )
    atomic_write_text(record_path(target), json.dumps(record._asdict(), indent=1) + "\n")
    return record


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
        raise UserError(f"{count} shards are called {name}; encode them into folders of their own")
    for source in sources:
        if source.resolve() == (out / source.name).resolve():
            raise UserError(f"{out} is the folder of {source.name}; name another folder")
        record = read_record(out / source.name)
        if record and (record.codec, record.sizes) != (codec.fingerprint, set(codec.sizes)):
            made = ", ".join(sorted(map(str, record.sizes)))
            raise UserError(
                f"{out / source.name} holds latents of codec {record.codec} at {made} pixels, not of"
                f" {codec.fingerprint} at {', '.join(map(str, codec.sizes))}; name another folder, or remove it"
            )


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[LatentRecord]:
    """In order; in this process where one worker is enough."""
    if min(workers, len(jobs)) <= 1:
        encode = encoder(jobs[0].codec, jobs[0].device) if jobs else None
        for job in jobs:
            if encode is not None:
                yield encode_shard(encode, job.codec, job.source, job.target)
        return
    # Forked, a process would inherit locks of torch's threads.
    with ProcessPoolExecutor(
        min(workers, len(jobs)), get_context("spawn"), _start_worker, (jobs[0],)
    ) as pool:
        yield from pool.map(_work, jobs)


_worker: list[Encoder] = []


def _start_worker(first: _Job) -> None:
    torch.set_num_threads(1)
    _worker.append(encoder(first.codec, first.device))


def _work(job: _Job) -> LatentRecord:
    return encode_shard(_worker[0], job.codec, job.source, job.target)


def _groups(reader: tarfile.TarFile) -> Iterator[_Group]:
    group = _Group("", [])
    for member in reader:
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        # What no reader of shards takes is not carried along.
        if not member.isfile() or member.size > MAX_MEMBER or extension.lower() in (LATENTS, TOKENS):
            continue
        if key != group.key:
            if group.members:
                yield group
            group = _Group(key, [])
        data = reader.extractfile(member)
        group.members.append((member, data.read() if data is not None else b""))
    if group.members:
        yield group


def _chunks(groups: Iterator[_Group]) -> Iterator[list[_Group]]:
    while chunk := list(itertools.islice(groups, _AT_ONCE)):
        yield chunk


def _decoded(
    group: _Group, codec: CodecConfig, left_out: collections.Counter[str]
) -> NDArray[np.uint8] | None:
    """The pair's image; None for texts, interleaved documents, and what cannot be decoded."""
    images = [
        data
        for member, data in group.members
        if member.name.rpartition("/")[2].partition(".")[2].lower() in IMAGE_EXTENSIONS
    ]
    if len(images) != 1:
        left_out.update(["ambiguous_image"] * (len(images) > 1))
        return None
    try:
        sizes = ImageSizes(codec.sizes, codec.downscale, 1)
        if not sizes.is_multi_size:
            return decode_to(images[0], sizes.first, channels=codec.channels)
        return decode_fitting(images[0], sizes, channels=codec.channels)
    except SampleError as error:
        left_out[str(error)] += 1
        return None


def _add(writer: tarfile.TarFile, name: str, values: NDArray[Any]) -> None:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    member = tarfile.TarInfo(name)
    member.size = stream.tell()
    stream.seek(0)
    writer.addfile(member, stream)
