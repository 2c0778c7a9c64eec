"""The data engine against the bars of its issue, each limit measured in the same run.

    .venv/bin/python benchmarks/data.py --data DIR [--only planning,reading,beyond] [--out benchmarks/results/data.json]

DIR holds `emoji-captions/train/*.tar` (pictures with captions) and `text/train/*.jsonl`. A tokenizer of 8,000 pieces
is trained on them first. All times are processor time of one core, the median of several rounds.

planning    speed, padding, cuts, shares of batches and of the whole, size of the state, time to resume: half the
            tokens text, half pairs of 64 patches, rows of 4,096, global batches of 8 rows
reading     one pass over the pictures from shards to batches, index and plan included, against the sum of what its
            steps take alone with the fastest library that is installed, and against webdataset doing the same work

beyond      planning alone as one of 512 ranks with 8 rows each, over 700 million pairs and as many texts, simulated

Exits with 3 when a bar is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from limits import record_head, write_json
from transfusion import presets
from transfusion.config import Config
from transfusion.data.deck import Deck, Lengths
from transfusion.data.index import SourceIndex
from transfusion.data.loader import Loader, build_indexes, plan_settings, source_lengths
from transfusion.data.planner import Planner
from transfusion.data.scan import texts
from transfusion.data.shards import expand
from transfusion.data.survey import Survey, as_dict, survey, survey_config
from transfusion.data.tokenizer import Tokenizer, train_tokenizer

RESULT = Path(__file__).resolve().parent / "results" / "data.json"
VOCABULARY, SIDE, PATCH = 8000, 64, 8
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
    "share_of_the_limit": ("at least", 0.75),
    "over_webdataset": ("at least", 1.3),
}


def make_config(data: Path, model: Path, **changes: Any) -> Config:
    """Emoji and text, half and half; keywords change section data."""
    sources = [
        {"name": "emoji", "shards": f"{data}/emoji-captions/train/*.tar", "share": 0.5},
        {"name": "text", "shards": f"{data}/text/train/*.jsonl", "share": 0.5},
    ]
    section = {"sources": sources, "tokenizer": str(model), "rows": 8, "row_length": 4096, **changes}
    return Config.model_validate(
        {"codec": {"image_size": SIDE}, "model": {"patch_size": PATCH}, "data": section}
    )


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Processor time of a call, the median."""
    taken = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return statistics.median(taken)


# Planning


def planning(config: Config, rounds: int) -> dict[str, Any]:
    indexes = build_indexes(config, config.data.sources, Tokenizer(config.data.tokenizer))
    lengths: list[Lengths] = [
        source_lengths(index, source.schedule, config)
        for index, source in zip(indexes, config.data.sources, strict=True)
    ]
    settings = plan_settings(config)
    found: list[Survey] = [survey(lengths, settings, batches=BATCHES) for _ in range(rounds)]
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
        "text_share_error_of_a_batch": text.greatest_share_error_of_a_batch,
        "state_bytes": found[0].state_bytes,
        "resume_seconds": resume_seconds(lengths, config),
    }


def tokens_dropped(lengths: list[Lengths], config: Config, found: Survey) -> int:
    """Tokens that were drawn and neither stand in a row nor wait in the state."""
    planner = Planner(lengths, plan_settings(config))
    for _ in range(found.batches):
        planner.next_batch(0, config.data.rows)
    start = planner.state()["start"]
    assert planner.state()["used"] == 0
    decks = [Deck(source, plan_settings(config).variants) for source in lengths]
    drawn = 0
    for deck in decks:
        draw, first, _ = start["sources"][deck.source.name]
        drawn += int(deck.documents(np.arange(draw)).tokens_D.sum()) + first
    waiting = 0
    for part in (part for row in [*start["open"], *start["ready"]] for part in row):
        code, _, tokens = part if isinstance(part, list) else (part, 0, 0)
        behind, number = divmod(code, len(decks))
        draw = start["sources"][lengths[number].name][0] - behind
        waiting += tokens or int(decks[number].documents(np.array([draw])).tokens_D[0])
    return drawn - waiting - found.tokens


def resume_seconds(lengths: list[Lengths], config: Config, points: int = 20) -> float:
    """From a state at a random step to its first batch, the longest of all points."""
    chance, states = random.Random(0), []
    planner = Planner(lengths, plan_settings(config))
    for _ in range(BATCHES):
        states.append(json.dumps(planner.state()))
        planner.next_batch(0, config.data.rows)
    longest = 0.0
    for state in chance.sample(states, points):
        begin = time.process_time()
        Planner(lengths, plan_settings(config), json.loads(state)).next_batch()
        longest = max(longest, time.process_time() - begin)
    return longest


def beyond(config: Config, rounds: int) -> dict[str, Any]:
    """`transfusion data plan --simulate`, the fastest round."""
    found = [
        survey_config(presets.load(None, ["data.rows=4096"]), simulate=True, ranks=512, steps=4)
        for _ in range(rounds)
    ]
    return as_dict(min(found, key=lambda each: each.plan_ms_per_batch))


# Reading


def reading(config: Config, rounds: int) -> dict[str, Any]:
    """Seconds a picture: ours from shards to batches, its steps alone, and webdataset."""
    only = config.model_copy(
        update={"data": config.data.model_copy(update={"sources": config.data.sources[:1]})}
    )
    tokenizer = Tokenizer(config.data.tokenizer)
    (index,) = build_indexes(only, only.data.sources, tokenizer)
    images = len(index)
    ours = seconds(lambda: read_all(only, tokenizer, images), rounds) / images
    steps = {name: value / images for name, value in step_limits(only, index, tokenizer, rounds).items()}
    others = {"webdataset": seconds(lambda: with_webdataset(only, tokenizer), rounds) / images}
    return {
        "images": images,
        "microseconds_an_image": {
            "ours": ours * 1e6,
            "steps": {name: value * 1e6 for name, value in steps.items()},
            "others": {name: value * 1e6 for name, value in others.items()},
        },
        "share_of_the_limit": sum(steps.values()) / ours,
        "over_webdataset": others["webdataset"] / ours,
    }


def read_all(config: Config, tokenizer: Tokenizer, images: int) -> None:
    """One pass over every picture: index, plan, read, decode, lay out, collate."""
    with tempfile.TemporaryDirectory() as folder:
        # A folder of its own, or the index of an earlier round would save what is measured here.
        fresh = config.model_copy(update={"data": config.data.model_copy(update={"index": folder})})
        loader = Loader(fresh, config.data.sources, tokenizer, rank=0, world_size=1)
        seen = 0
        while seen < images:
            seen += sum(batch.counts.images for batch in loader.next_step())
        loader.close()


def step_limits(config: Config, index: SourceIndex, tokenizer: Tokenizer, rounds: int) -> dict[str, float]:
    """Seconds that each step takes for all pictures when nothing else is done."""
    pictures = [index.read_picture(sample) for sample in range(len(index))]
    decode = fastest_decode(pictures[:64])
    decoded = [as_image(decode(data)) for data in pictures]
    flat = [on_white(picture) for picture in decoded]
    small = [resized(picture) for picture in flat]
    captions = list(texts(index.shards))
    planner = Planner([source_lengths(index, ((0, 1.0),), config)], plan_settings(config))
    rows_per_pass = -(-len(index) // (config.data.row_length // (config.patches_per_image + 8)))
    return {
        "read": seconds(lambda: read_whole(index), rounds),
        "decode": seconds(lambda: [decode(data) for data in pictures], rounds),
        "composite": seconds(lambda: [on_white(picture) for picture in decoded], rounds),
        "resize": seconds(lambda: [resized(picture) for picture in flat], rounds),
        "tokenise": seconds(lambda: tokenizer_of(tokenizer)(captions), rounds),
        "pack": seconds(
            lambda: [planner.next_batch() for _ in range(rows_per_pass // config.data.rows)], rounds
        ),
        "collate": seconds(lambda: stacked(small), rounds),
    }


def read_whole(index: SourceIndex) -> int:
    """Every shard once."""
    return sum(len(Path(shard).read_bytes()) for shard in index.shards)


def tokenizer_of(tokenizer: Tokenizer) -> Callable[[list[str]], object]:
    """sentencepiece itself, all texts in one call."""
    encode: Callable[[list[str]], object] = tokenizer._processor.encode
    return encode


def fastest_decode(sample: list[bytes]) -> Callable[[bytes], Any]:
    """To RGBA by OpenCV where it is installed and gives what Pillow gives, else by Pillow."""

    def pillow(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGBA")

    try:
        import cv2
    except ImportError:
        return pillow

    def opencv(data: bytes) -> np.ndarray:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        code = cv2.COLOR_BGRA2RGBA if values.shape[2] == 4 else cv2.COLOR_BGR2RGBA
        return cv2.cvtColor(values, code)

    same = all(np.array_equal(opencv(data), np.asarray(pillow(data))) for data in sample)
    return opencv if same else pillow


def as_image(decoded: Any) -> Image.Image:
    return decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded)


def on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def resized(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def stacked(pictures: list[Image.Image]) -> int:
    """Batches of 256 as tensors [I, C, H, W]; returns their number."""
    starts = range(0, len(pictures), 256)
    for first in starts:
        batch = np.stack([np.asarray(picture) for picture in pictures[first : first + 256]])
        torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
    return len(starts)


def with_webdataset(config: Config, tokenizer: Tokenizer) -> int:
    """The same work in webdataset's way, by Pillow and our tokenizer; returns the number of batches."""
    import webdataset

    def prepare(sample: dict[str, Any]) -> tuple[Image.Image, list[int]]:
        return resized(on_white(sample["png"].convert("RGBA"))), tokenizer.encode(sample["txt"])

    shards = [str(shard) for shard in expand(config.data.sources[0].shards)]
    data = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").map(prepare)
    return sum(stacked(pictures) for pictures, _ in data.batched(256, collation_fn=_columns))


def _columns(samples: list[tuple[Any, ...]]) -> tuple[list[Any], ...]:
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
    parser.add_argument("--only", default="planning,reading,beyond", help="parts, with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"planning": planning, "reading": reading, "beyond": beyond}
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
        config = make_config(options.data, model)
        shards = [shard for source in config.data.sources for shard in expand(source.shards)]
        train_tokenizer(texts(shards), model, vocabulary=VOCABULARY)
        for part in wanted:
            record[part] = parts[part](config, options.rounds)
            print(json.dumps({part: record[part]}, indent=2), flush=True)
    record["missed"] = [text for part in wanted for text in missed(record[part])]
    write_json(record, options.out)
    print("\n".join(record["missed"]) or "every bar that was measured is reached")
    return MISSED if record["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
