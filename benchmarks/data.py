"""The data engine against the bars of its issue, each limit measured in the same run.

    .venv/bin/python benchmarks/data.py --data DIR [--only planning,beyond,reading,larger] [--out FILE]

DIR holds `emoji-captions/train/*.tar` (images with captions) and `text/train/*.jsonl`. A tokenizer of 8,000 pieces
is trained on them first. All times are processor time of one core, the median of several rounds, with one
thread of torch and of OpenCV.

planning    speed, padding, cuts, shares of batches and of the whole, size of the state, time to resume: half the
            tokens text, half pairs of 64 patches, rows of 4,096, global batches of 8 rows
reading     one pass over the images from shards to batches, index and plan included, against the sum of what its
            steps take alone with the fastest library that is installed, and against webdataset, Hugging Face datasets
            (streaming) and Megatron-Energon doing the same work in one process; those not installed are left out.
            Energon's index (`prepare`) is charged as ours is; what both take once indexed is told beside it. Ours also
            compares the hash of each image

larger      the same against its steps, with images as they are trained on, brought to 256 pixels: 16 of the images
            set side by side, as JPEGs of 256 and of 512 and as PNGs of 288. This has the bar, for each kind

beyond      planning alone as one of 512 ranks with 8 rows each, over 700 million pairs and as many texts, simulated

Exits with 3 when a bar is missed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from limits import record_head, write_json
from transfusion.config import Config, SourceConfig, load_config
from transfusion.data.images.decode import use_one_thread
from transfusion.data.index.source_index import SourceIndex, build_indexes
from transfusion.data.loading import rows
from transfusion.data.loading.loader import Loader, plan_settings
from transfusion.data.planning.epoch import EpochOrder, Lengths, Variant
from transfusion.data.planning.packing import Planner
from transfusion.data.prepare.folders import image_sample
from transfusion.data.shards.scan import Texts
from transfusion.data.shards.webdataset import Sample, expand, write_shards
from transfusion.data.viewing.plan_stats import Survey, measure_config, measure_plan
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

RESULT = Path(__file__).resolve().parent / "results" / "data.json"
VOCABULARY, SIDE, PATCH = 8000, 64, 8
# Of the larger images: how many, tiles along a side and pixels along a tile, and what they are brought to.
MOSAICS, TILES, LARGER_SIDE, LARGER_PATCH = 512, 4, 256, 16
LARGER = {"jpeg_256": ("jpg", 256), "jpeg_512": ("jpg", 512), "png_288": ("png", 288)}
# Global batches of them that are read, of the many that are planned at once.
LARGER_BATCHES = 8
# By which the faster way to decode is found.
DECODED_TO_CHOOSE = 64
BATCHES = 640
MISSED = 3
BARS: dict[str, tuple[str, float]] = {
    "tokens_per_second": ("at least", 10e6),
    "padding_share": ("at most", 0.005),
    "images_cut": ("at most", 0),
    "tokens_dropped": ("at most", 0),
    "text_share_error_of_a_batch": ("at most", 0.03),
    "text_share_error": ("at most", 0.001),
    "state_bytes": ("at most", 6000),
    "resume_seconds": ("at most", 2.0),
    **{f"share_of_the_limit_{name}": ("at least", 0.85) for name in LARGER},
}


def make_config(data: Path, model: Path, **changes: Any) -> Config:
    """Emoji and text, half and half; keywords change section data."""
    sources = [
        {"name": "emoji", "shards": f"{data}/emoji-captions/train/*.tar", "verify": "sha256", "weight": 0.5},
        {"name": "text", "shards": f"{data}/text/train/*.jsonl", "weight": 0.5},
    ]
    section = {
        "sources": sources,
        "tokenizer": str(model),
        "global_batch_size": 8,
        "sequence_length": 4096,
        **changes,
    }
    return Config.model_validate(
        {"codec": {"image_size": SIDE}, "model": {"patch_size": PATCH}, "data": section}
    )


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Processor time of a call, the median."""
    taken = []
    for _ in range(rounds):
        forget()
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return statistics.median(taken)


def forget() -> None:
    """Have no measurement collect the garbage, or walk over the objects, that others have left."""
    gc.collect()
    gc.freeze()


def seconds_an_image(call: Callable[[], int]) -> float:
    """Processor time of a call over the number of images it returns."""
    forget()
    begin = processor_time()
    images = call()
    return (processor_time() - begin) / images


def processor_time() -> float:
    """Seconds of this process and of those that it has waited for: Energon prepares in one of its own."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


# Planning


def planning(config: Config, rounds: int) -> dict[str, Any]:
    indexes = build_indexes(config, config.data.sources, Tokenizer(config.data.tokenizer))
    lengths: list[Lengths] = [
        index.lengths for index, source in zip(indexes, config.data.sources, strict=True)
    ]
    settings = plan_settings(config)
    found: list[Survey] = [measure_plan(lengths, settings, batches=BATCHES) for _ in range(rounds)]
    text = found[0].sources["text"]
    return {
        "tokens": found[0].tokens,
        "tokens_per_second": statistics.median(each.tokens_per_second for each in found),
        "padding_share": found[0].padding_share,
        "images_cut": found[0].images_cut,
        "texts_cut": found[0].texts_cut,
        "texts_cut_that_fit_a_row": found[0].texts_cut_that_fit_a_row,
        "tokens_dropped": tokens_dropped(lengths, config, found[0]),
        "text_share": text.share,
        "text_share_error": text.share_error,
        "text_share_error_of_a_batch": text.max_share_error_of_a_batch,
        "state_bytes": found[0].state_bytes,
        "resume_seconds": resume_seconds(lengths, config),
    }


def tokens_dropped(lengths: list[Lengths], config: Config, found: Survey) -> int:
    """Tokens that were drawn and neither stand in a row nor wait in the state."""
    planner = Planner(lengths, plan_settings(config))
    for _ in range(found.batches):
        planner.next_batch(0, config.data.global_batch_size)
    start = planner.state()["start"]
    assert planner.state()["used"] == 0
    decks = [EpochOrder(source, plan_settings(config).variants) for source in lengths]
    drawn = 0
    for deck in decks:
        draw, first, _ = start["sources"][deck.source.name]
        drawn += int(deck.documents(np.arange(draw)).tokens.sum()) + first
    waiting = 0
    for part in (part for row in [*start["open"], *start["ready"]] for part in row):
        code, _, tokens = part if isinstance(part, list) else (part, 0, 0)
        behind, number = divmod(code, len(decks))
        draw = start["sources"][lengths[number].name][0] - behind
        waiting += tokens or int(decks[number].documents(np.array([draw])).tokens[0])
    return drawn - waiting - found.tokens


def resume_seconds(lengths: list[Lengths], config: Config, points: int = 20) -> float:
    """From a state at a random step to its first batch, the longest of all points."""
    chance, states = random.Random(0), []
    planner = Planner(lengths, plan_settings(config))
    for _ in range(BATCHES):
        states.append(json.dumps(planner.state()))
        planner.next_batch(0, config.data.global_batch_size)
    longest = 0.0
    for state in chance.sample(states, points):
        begin = time.process_time()
        Planner(lengths, plan_settings(config), json.loads(state)).next_batch()
        longest = max(longest, time.process_time() - begin)
    return longest


def beyond(config: Config, rounds: int) -> dict[str, Any]:
    """`transfusion data plan --simulate`, the fastest round."""
    found = [
        measure_config(load_config(None, ["data.global_batch_size=4096"]), simulate=True, ranks=512, steps=4)
        for _ in range(rounds)
    ]
    return asdict(min(found, key=lambda each: each.plan_ms_per_batch))


# Reading


def reading(config: Config, rounds: int) -> dict[str, Any]:
    """Microseconds an image: ours from shards to batches, its steps alone, and the peers. All in turn, each round."""
    only = with_sources(config, config.data.sources[:1])
    tokenizer = Tokenizer(config.data.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        (index,) = build_indexes(only, only.data.sources, tokenizer)
        steps = steps_alone(only, index, tokenizer)
        peers, missing = peers_installed(only, tokenizer, Path(folder), len(index))
        micro = microseconds(only, tokenizer, index, steps, peers, rounds)
    ours = micro["index"] + micro["rows"]
    # Of Energon alone: the others have no index.
    prepare = {name: micro.get(f"{name} prepare", 0.0) for name in peers if not name.endswith("prepare")}
    whole = {name: micro[name] + prepare[name] for name in prepare}
    return {
        **against_the_limit(micro, index, steps),
        "microseconds_of_others": whole,
        "of_which_prepare": prepare,
        **{f"over_{name}": whole[name] / ours for name in whole},
        "over_once_indexed": {name: micro[name] / micro["rows"] for name in whole},
        "not_installed": missing,
    }


def larger(config: Config, rounds: int) -> dict[str, Any]:
    """As `reading`, of larger images of each kind, without the peers."""
    tokenizer = Tokenizer(config.data.tokenizer)
    small = with_sources(config, config.data.sources[:1])
    (tiles,) = build_indexes(small, small.data.sources, tokenizer)
    codec = config.codec.model_copy(update={"image_size": LARGER_SIDE})
    model = config.model.model_copy(update={"patch_size": LARGER_PATCH})
    large = config.model_copy(update={"codec": codec, "model": model})
    found: dict[str, Any] = {}
    for name, (kind, side) in LARGER.items():
        with tempfile.TemporaryDirectory() as folder:
            write_shards(mosaics(tiles, kind, side), Path(folder))
            only = with_sources(
                large, [SourceConfig(name="mosaic", shards=f"{folder}/*.tar", verify="sha256")]
            )
            (index,) = build_indexes(only, only.data.sources, tokenizer)
            steps = steps_alone(only, index, tokenizer)
            micro = microseconds(only, tokenizer, index, steps, {}, rounds, LARGER_BATCHES)
        measured = against_the_limit(micro, index, steps)
        found[f"share_of_the_limit_{name}"] = measured.pop("share_of_the_limit")
        found[name] = measured
    return found


def with_sources(config: Config, sources: Sequence[SourceConfig]) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": list(sources)})})


def microseconds(
    config: Config,
    tokenizer: Tokenizer,
    index: SourceIndex,
    steps: dict[str, Callable[[], int]],
    peers: dict[str, Callable[[], int]],
    rounds: int,
    batches: int | None = None,
) -> dict[str, float]:
    """Of an image, the median of the rounds; `index` and `rows` are ours. batches: to read; None: a whole block."""
    # Every image is to be decoded each time, also where the plan of a block passes several epochs.
    rows._CACHE_BYTES = 0
    taken: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(rounds):
        first, again = read_all(config, tokenizer, batches)
        taken["index"].append(first / len(index))
        taken["rows"].append(again)
        for name, call in (steps | peers).items():
            taken[name].append(seconds_an_image(call))
    return {name: statistics.median(values) * 1e6 for name, values in taken.items()}


def against_the_limit(micro: Mapping[str, float], index: SourceIndex, steps: Iterable[str]) -> dict[str, Any]:
    ours, limit = micro["index"] + micro["rows"], sum(micro[name] for name in steps)
    return {
        "images": len(index),
        "opencv": find_spec("cv2") is not None,
        "microseconds_an_image": {
            "ours": ours,
            "of_which_index": micro["index"],
            "limit": limit,
            "steps": {name: micro[name] for name in steps},
        },
        "share_of_the_limit": limit / ours,
    }


def mosaics(index: SourceIndex, kind: str, side: int) -> Iterator[Sample]:
    """Samples of square images: small ones side by side, so that there is as much to see everywhere."""
    chance, tile = random.Random(0), side // TILES
    for number in range(MOSAICS):
        mosaic = Image.new("RGBA", (side, side))
        for place in range(TILES * TILES):
            data = index.read_image(chance.randrange(len(index)))
            image = Image.open(io.BytesIO(data)).convert("RGBA").resize((tile, tile))
            mosaic.paste(image, (place % TILES * tile, place // TILES * tile))
        stream = io.BytesIO()
        if kind == "jpg":
            on_white(mosaic).save(stream, "JPEG", quality=90)
        else:
            mosaic.save(stream, "PNG")
        yield image_sample(stream.getvalue(), kind, f"sixteen small images, number {number}")


def read_all(config: Config, tokenizer: Tokenizer, batches: int | None = None) -> tuple[float, float]:
    """Seconds to index all images, and seconds an image from plan to batch over so many batches.

    None: over one whole block of the plan. Of fewer the plan of the whole block is charged all the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A folder of its own, or the index of an earlier round would save what is measured here.
        fresh = config.model_copy(update={"data": config.data.model_copy(update={"index": folder})})
        index = seconds(lambda: build_indexes(fresh, fresh.data.sources, tokenizer), 1)

        def read_block() -> int:
            with Loader(fresh, fresh.data.sources, tokenizer, rank=0, world_size=1) as loader:
                wanted = range(batches or plan_settings(fresh).batches_per_block)
                return sum(batch.counts.images for _ in wanted for batch in loader.next_step())

        return index, seconds_an_image(read_block)


def steps_alone(config: Config, index: SourceIndex, tokenizer: Tokenizer) -> dict[str, Callable[[], int]]:
    """Each step for all images, when nothing else is done; each returns how many it was done for."""
    images = [index.read_image(sample) for sample in range(len(index))]
    decode = fastest_decode(images)
    decoded = [as_image(decode(data)) for data in images]
    flat = [on_white(image) for image in decoded]
    resize = functools.partial(resized, side=config.codec.image_size)
    small = [resize(image) for image in flat]
    captions = list(Texts(index.shards))
    facts = [
        json.dumps({"caption": text, "sha256": hashlib.sha256(data).hexdigest()}).encode()
        for data, text in zip(images, captions, strict=True)
    ]
    planner = Planner([index.lengths], plan_settings(config))
    return {
        "read": lambda: read_whole(index),
        "check": lambda: each(lambda both: checked(*both), list(zip(images, facts, strict=True))),
        "decode": lambda: each(decode, images),
        "composite": lambda: each(on_white, decoded),
        "resize": lambda: each(resize, flat),
        "tokenise": lambda: len(tokenizer_of(tokenizer)(captions)),
        "pack": lambda: plan_block(planner, config),
        "collate": lambda: stacked(small),
    }


def plan_block(planner: Planner, config: Config) -> int:
    """As many batches as are planned at once; returns the images in them."""
    batches = [planner.next_batch() for _ in range(plan_settings(config).batches_per_block)]
    return sum(piece.variant != Variant.TEXT for batch in batches for row in batch for piece in row)


def each(call: Callable[[Any], object], values: Sequence[Any]) -> int:
    """Call it on each and keep nothing: fresh memory for all results would cost more than some of the steps."""
    for value in values:
        call(value)
    return len(values)


def checked(image: bytes, facts: bytes) -> bool:
    """The least that tells damage and a wrong image: checksum, hash, and what KEY.json says it is."""
    zlib.crc32(image)
    same: bool = hashlib.sha256(image).hexdigest() == json.loads(facts)["sha256"]
    return same


def read_whole(index: SourceIndex) -> int:
    """Every shard once."""
    for shard in index.shards:
        Path(shard).read_bytes()
    return len(index)


def tokenizer_of(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """sentencepiece itself, all texts in one call, in one thread."""
    return functools.partial(tokenizer._processor.encode, num_threads=1)


def fastest_decode(images: Sequence[bytes]) -> Callable[[bytes], Any]:
    """For each kind of file Pillow, or OpenCV where it is installed, gives what Pillow gives, and is faster."""
    kinds: dict[bytes, list[bytes]] = collections.defaultdict(list)
    for data in images:
        kinds[data[:2]].append(data)
    chosen = {kind: fastest_of_kind(files[:DECODED_TO_CHOOSE]) for kind, files in kinds.items()}
    return lambda data: chosen[data[:2]](data)


def fastest_of_kind(files: list[bytes]) -> Callable[[bytes], Any]:
    def pillow(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        return image.convert("RGB" if image.format == "JPEG" else "RGBA")

    try:
        import cv2
    except ImportError:
        return pillow

    def opencv(data: bytes) -> np.ndarray:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        to_rgba = cv2.COLOR_BGRA2RGBA if values.shape[2] == 4 else cv2.COLOR_BGR2RGBA
        return cv2.cvtColor(values, cv2.COLOR_BGR2RGB if is_jpeg(data) else to_rgba)

    if not all(np.array_equal(opencv(data), np.asarray(pillow(data))) for data in files):
        return pillow
    return min((opencv, pillow), key=lambda decode: seconds(lambda: each(decode, files), 3))


def is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def as_image(decoded: Any) -> Image.Image:
    return decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded)


def on_white(image: Image.Image) -> Image.Image:
    """From RGBA, or as it is. Pillow's fastest way, which gives what its alpha_composite gives."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image)
    return white


def resized(image: Image.Image, side: int = SIDE) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def stacked(images: list[Image.Image]) -> int:
    """Batches of 256 as tensors [I, C, H, W]; returns the number of images."""
    for first in range(0, len(images), 256):
        batch = np.stack([np.asarray(image) for image in images[first : first + 256]])
        torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
    return len(images)


# Peers: each in one process, as its documentation has it, with the same functions for a sample.


def peers_installed(
    config: Config, tokenizer: Tokenizer, folder: Path, images: int
) -> tuple[dict[str, Callable[[], int]], list[str]]:
    """One pass over all images by each peer that is installed, and the names of those that are not.

    Each returns how many it gave: Energon's last batch would be filled up from its next epoch, and is left out.
    """
    shards = [shard.resolve() for shard in expand(config.data.sources[0].shards)]
    peers: dict[str, Callable[[], int]] = {"webdataset": lambda: with_webdataset(shards, tokenizer)}
    if find_spec("datasets"):
        peers["datasets"] = lambda: with_datasets(shards, tokenizer, folder / "datasets")
    if find_spec("megatron") and find_spec("megatron.energon"):
        describe_for_energon(shards, folder / "energon")
        peers["energon prepare"] = lambda: prepare_for_energon(shards, folder / "energon", images)
        peers["energon"] = lambda: with_energon(folder / "energon", tokenizer, images // 256)
    missing = [name for name in ("datasets", "energon") if name not in peers]
    for name in missing:
        print(f"{name} is not installed: not compared", flush=True)
    return peers, missing


def prepared(image: Image.Image, caption: str, tokenizer: Tokenizer) -> tuple[Image.Image, list[int]]:
    """What every peer does with a sample."""
    return resized(on_white(image.convert("RGBA"))), tokenizer.encode(caption)


def batched(images: list[Image.Image], ids: list[list[int]]) -> int:
    """What every peer does with a batch: tensors of images and of padded ids; returns how many."""
    padded = np.zeros((len(ids), max(map(len, ids))), np.int64)
    for row, text in zip(padded, ids, strict=True):
        row[: len(text)] = text
    torch.from_numpy(padded)
    return stacked(images)


def with_webdataset(shards: list[Path], tokenizer: Tokenizer) -> int:
    """A pass of webdataset, in its order."""
    import webdataset

    data = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False)
    samples = data.decode("pil").map(lambda sample: prepared(sample["png"], sample["txt"], tokenizer))
    return sum(batched(*columns) for columns in samples.batched(256, collation_fn=_columns))


def with_datasets(shards: list[Path], tokenizer: Tokenizer, cache: Path) -> int:
    """A pass of Hugging Face datasets, streaming, in its order."""
    import datasets

    def of_sample(sample: dict[str, Any]) -> dict[str, Any]:
        image, ids = prepared(sample["png"], sample["txt"], tokenizer)
        return {"image": image, "ids": ids}

    data = datasets.load_dataset(
        "webdataset",
        data_files={"train": [str(shard) for shard in shards]},
        split="train",
        streaming=True,
        cache_dir=str(cache),
    )
    samples = data.map(of_sample, remove_columns=["json", "png", "txt", "__key__", "__url__"])
    return sum(batched(batch["image"], batch["ids"]) for batch in samples.iter(batch_size=256))


def describe_for_energon(shards: list[Path], folder: Path) -> None:
    """Its index, and what its samples are, by its command."""
    folder.mkdir()
    for shard in shards:
        (folder / shard.name).symlink_to(shard)
    command = [str(Path(sys.executable).parent / "energon"), "prepare", "--non-interactive"]
    command += ["--num-workers", "1", "--split-parts", "train:.*", "--sample-type", "CaptioningSample"]
    command += ["--field-map", json.dumps({"image": "png", "caption": "txt"}), str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def prepare_for_energon(shards: list[Path], folder: Path, images: int) -> int:
    """Its index anew, as its command makes it, without the start of a program."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    names = [shard.name for shard in shards]
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            folder, names, split_parts_patterns=[("train", ".*")], workers=1
        )
    return images


def with_energon(folder: Path, tokenizer: Tokenizer, batches: int) -> int:
    """So many batches of Megatron-Energon, shuffled as in its documentation; its training data never end."""
    from megatron import energon

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = energon.SampleDecoder(image_decode="pilrgba")

        def encode_sample(self, sample: Any) -> tuple[Image.Image, list[int]]:
            return prepared(sample.image, sample.caption, tokenizer)

        def batch(self, samples: list[Any]) -> int:
            return batched(*_columns(samples))

        def encode_batch(self, batch: int) -> int:
            return batch

    alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    data = energon.get_train_dataset(
        folder,
        worker_config=alone,
        batch_size=256,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    return sum(itertools.islice(energon.get_loader(data), batches))


def _columns(samples: Iterable[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    return tuple(list(column) for column in zip(*samples, strict=True))


def missed(figures: dict[str, Any]) -> list[str]:
    """Bars that were not reached, in words."""
    found = []
    for name, (sense, bar) in BARS.items():
        if name in figures:
            value = figures[name]
            if (value < bar) if sense == "at least" else (value > bar):
                found.append(f"{name} is {value:.4g}, must be {sense} {bar:g}")
    return found


def main() -> int:
    # Palettes with transparency: each reader here turns them into RGBA, as the warning asks.
    warnings.filterwarnings("ignore", message="Palette images with Transparency")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with emoji-captions/ and text/")
    parser.add_argument(
        "--only", default="planning,beyond,reading,larger", help="parts, with commas between them"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_one_thread()
    parts = {"planning": planning, "reading": reading, "larger": larger, "beyond": beyond}
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(parts):
        parser.error(f"--only {', '.join(sorted(unknown))}: parts are {', '.join(parts)}")
    record = record_head(torch.device("cpu"))
    # Where the data lies on this machine is nobody's concern.
    record["command"] = (
        f"python benchmarks/data.py --data DIR --only {options.only} --rounds {options.rounds}"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tokenizer.model"
        # Nothing is written beside the data.
        config = make_config(options.data, model, index=str(Path(folder) / "index"))
        shards = [shard for source in config.data.sources for shard in expand(source.shards)]
        train_tokenizer(Texts(shards), model, vocabulary=VOCABULARY)
        for part in wanted:
            record[part] = parts[part](config, options.rounds)
            print(json.dumps({part: record[part]}, indent=2), flush=True)
    record["missed"] = [text for part in wanted for text in missed(record[part])]
    write_json(record, options.out)
    print("\n".join(record["missed"]) or "every bar that was measured is reached")
    return MISSED if record["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
