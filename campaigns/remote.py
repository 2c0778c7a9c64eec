"""What a small cache costs: bytes downloaded in an epoch, and how much of the transfer training does not wait for.

    .venv/bin/python campaigns/remote.py [--shards 50] [--samples 1000] [--out FILE]

Makes shards of captioned images, serves them over HTTP on this machine, and reads them through a cache of a tenth
of their bytes.

    traffic   bytes downloaded in one epoch over bytes of the data: windows of 2 shards, and all shards in one window,
              which is a global permutation (measured on some steps, scaled to the epoch)
    waiting   the server sends so slowly that an epoch's transfer takes a given share of its other time, which a pause
              in each step stands for; one connection. Hidden is the share of the transfer that was not waited for

Every stream is compared with that of a cache that holds everything. Exits with 3 where one differs, or where the cache
was above its bound while its working set was below.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from limits import record_head, write_json
from transfusion.config import Config
from transfusion.data.index.build import IndexJob, write_index
from transfusion.data.loading.loader import Loader
from transfusion.data.shards.webdataset import write_shards
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer
from web import Web

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "remote.json"
WINDOW, TENTH, WRONG = 2, 10, 3
GLOBAL_STEPS = 40
# Transfer of an epoch over the rest of its time.
LOADS = (0.25, 0.5, 0.9)
CAPTIONS = ("a handwritten three", "the digit seven, in bright ink", "someone wrote the number nine")


class Place(NamedTuple):
    """Shards in `served`, their index in `index`; bytes and samples of all of them."""

    folder: Path
    shards: int
    samples: int
    bytes: int

    def config(self, web: Web, *, run: str, window: int, cache_bytes: int, connections: int) -> Config:
        """A run over all shards, with a cache of its own."""
        shards = f"{web.address}/{{00000..{self.shards - 1:05d}}}.tar"
        data = {
            "sources": [{"name": "images", "shards": shards, "shuffle_window": window}],
            "tokenizer": str(self.folder / "tokenizer.model"),
            "index": str(self.folder / "index"),
            "sequence_length": 64,
            "global_batch_size": 8,
            "cache": {
                "folder": str(self.folder / run),
                "gigabytes": cache_bytes / 1e9,
                "connections": connections,
            },
        }
        return Config.model_validate({"codec": {"channels": 1, "image_size": 8}, "data": data})


class Passed(NamedTuple):
    """Some steps of a run. waited_first: seconds before the first step; waited: before all others."""

    steps: int
    samples: int
    downloaded: int
    peak: int
    seconds: float
    waited_first: float
    waited: float
    digest: str


def make_place(folder: Path, web: Web, shards: int, samples: int) -> Place:
    """Shards of noise with captions, a tokenizer, and the index, made over the network."""
    generator = np.random.default_rng(0)

    def pairs() -> Iterator[dict[str, bytes]]:
        for number in range(shards * samples):
            stream = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(stream, "png")
            yield {"png": stream.getvalue(), "txt": CAPTIONS[number % len(CAPTIONS)].encode()}

    paths = write_shards(pairs(), folder / "served", per_shard=samples)
    train_tokenizer(list(CAPTIONS) * 20, folder / "tokenizer.model", vocabulary=320)
    place = Place(folder, shards, shards * samples, sum(path.stat().st_size for path in paths))
    config = place.config(web, run="indexing", window=WINDOW, cache_bytes=1 << 40, connections=4)
    write_index(IndexJob.of(config), folder / "index", max_share=0)
    return place


def go(config: Config, *, samples: int, steps: int = 1 << 62, pause: float = 0.0) -> Passed:
    """Steps until so many samples are drawn, or so many steps are done; `pause` seconds of other work in each."""
    digest, drawn, done = hashlib.blake2b(digest_size=16), 0, 0
    loader = Loader(config, config.data.sources, Tokenizer(config.data.tokenizer), rank=0, world_size=1)
    with contextlib.closing(loader):
        assert loader.fetching is not None
        fetcher = loader.fetching.fetcher
        begin, first = time.monotonic(), 0.0
        while drawn < samples and done < steps:
            (batch,) = loader.next_step()
            first = first if done else fetcher.waited_seconds
            digest.update(batch.token_ids_BS.numpy().tobytes())
            for group in batch.media:
                digest.update(group.values.numpy().tobytes())
            drawn, done = drawn + loader.reading.samples, done + 1
            time.sleep(pause)
        seconds, cache = time.monotonic() - begin, fetcher.cache
        return Passed(
            done,
            drawn,
            cache.downloaded_bytes,
            cache.peak_bytes,
            seconds,
            first,
            fetcher.waited_seconds - first,
            digest.hexdigest(),
        )


def traffic(place: Place, web: Web) -> tuple[dict[str, Any], list[str]]:
    """Bytes of an epoch over bytes of the data, and what was wrong."""
    problems, found = [], {}
    bound = place.bytes // TENTH
    for name, window in (("windows", WINDOW), ("global permutation", place.shards)):
        steps = GLOBAL_STEPS if window == place.shards else 1 << 62
        small, whole = (
            go(
                place.config(web, run=f"{window}-{size}", window=window, cache_bytes=size, connections=4),
                samples=place.samples,
                steps=steps,
            )
            for size in (bound, place.bytes + 1)
        )
        if small.digest != whole.digest:
            problems.append(f"{name}: the cache changed the stream")
        if window == WINDOW and small.peak > bound:
            problems.append(f"{name}: {small.peak} bytes in a cache of {bound}")
        found[name] = {
            "shuffle_window": window,
            "cache_bytes": bound,
            "steps": small.steps,
            "samples": small.samples,
            "downloaded_bytes": small.downloaded,
            "epochs_of_bytes_an_epoch": round(
                small.downloaded / place.bytes * place.samples / small.samples, 3
            ),
            "peak_bytes": small.peak,
        }
    return found, problems


def waiting(place: Place, web: Web) -> tuple[list[dict[str, Any]], list[str]]:
    """How much of the transfer is hidden, by how long it takes, and what was wrong."""
    bound, pause = place.bytes // TENTH, 0.004
    plain = place.config(web, run="plain", window=WINDOW, cache_bytes=place.bytes + 1, connections=4)
    # The first pass downloads, the second tells how long all but the transfer takes.
    whole = [go(plain, samples=place.samples, pause=pause) for _ in range(2)][1]
    problems, found = [], []
    for load in LOADS:
        web.rate = round(place.bytes / (load * whole.seconds))
        config = place.config(web, run=f"load-{load}", window=WINDOW, cache_bytes=bound, connections=1)
        slow = go(config, samples=place.samples, pause=pause)
        web.rate = 0
        if slow.digest != whole.digest:
            problems.append(f"load {load}: the network changed the stream")
        transfer = slow.downloaded / round(place.bytes / (load * whole.seconds))
        waited = slow.waited_first + slow.waited
        found.append(
            {
                "transfer_over_other_time": load,
                # The machine's other work may have made the other time longer.
                "transfer_over_other_time_measured": round(transfer / (slow.seconds - waited), 3),
                "transfer_seconds": round(transfer, 2),
                "waited_for_first_step_seconds": round(slow.waited_first, 2),
                "waited_later_seconds": round(slow.waited, 2),
                "hidden_share": round(1 - waited / transfer, 3),
                "hidden_share_after_the_first_step": round(
                    1 - slow.waited / max(1e-9, transfer - slow.waited_first), 3
                ),
                "seconds": round(slow.seconds, 2),
                "seconds_without_transfer": round(whole.seconds, 2),
            }
        )
    return found, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=50)
    parser.add_argument("--samples", type=int, default=1000, help="of each shard")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.closing(Web(Path(name) / "served")) as web:
        place = make_place(Path(name), web, options.shards, options.samples)
        by_order, problems = traffic(place, web)
        for order, figures in by_order.items():
            print(f"{order}: {figures['epochs_of_bytes_an_epoch']} times the data in an epoch", flush=True)
        by_load, more = waiting(place, web)
        for figures in by_load:
            print(
                f"transfer {figures['transfer_over_other_time_measured']} of the other time:"
                f" {figures['hidden_share']:.1%} hidden",
                flush=True,
            )
    record = record_head(torch.device("cpu")) | {
        "shards": options.shards,
        "samples_of_a_shard": options.samples,
        "bytes": place.bytes,
        "traffic": by_order,
        "waiting": by_load,
        "problems": problems + more,
    }
    write_json(record, options.out)
    print("\n".join(record["problems"]) or "every stream was the same")
    return WRONG if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
