"""Damages good shards at random and reads them: never a crash, a hang, or an image with another sample's caption.

    .venv/bin/python campaigns/fuzz.py --data 'DIR/*.tar' [--times 10000] [--out FILE]

The shards hold pairs, with the `sha256` of each image in KEY.json. Each time the beginning of one is flipped, cut,
repeated, overwritten or torn at random places, scanned twice, and every image found good is decoded. Exits with 3
when something went wrong.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from transfusion.data.images.decode import decode
from transfusion.data.shards.sample import Fault, RawSample, SampleError
from transfusion.data.shards.scan import scan
from transfusion.data.shards.webdataset import expand
from transfusion.observe.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]
BYTES, SLOWEST_SECONDS = 200_000, 5.0
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "packages", "git", "transfusion")
DAMAGES = ("flip", "cut", "repeat", "overwrite", "tear", "zero")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="glob of good shards")
    parser.add_argument("--times", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    arguments = parser.parse_args()
    shards = [path.read_bytes()[:BYTES] for path in expand(arguments.data)]
    captions = {}
    for path in expand(arguments.data):
        content = path.read_bytes()
        captions |= {
            _hash(content, found): found.text
            for found in scan(path, "sha256")
            if isinstance(found, RawSample)
        }
    rng = random.Random(arguments.seed)
    wrong: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.tar"
        for number in range(arguments.times):
            data = bytearray(rng.choice(shards))
            kinds = [damage(data, rng) for _ in range(rng.randint(1, 3))]
            path.write_bytes(data)
            begin = time.process_time()
            try:
                problems = check(path, bytes(data), captions, counts)
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            slowest = max(slowest, time.process_time() - begin)
            wrong += [f"number {number} ({', '.join(kinds)}): {problem}" for problem in problems]
    if slowest > SLOWEST_SECONDS:
        wrong.append(f"one shard took {slowest:.1f} s")
    environment = describe_environment()
    record = {
        "command": "python campaigns/fuzz.py",
        "environment": {name: environment[name] for name in KEPT},
        "times": arguments.times,
        "seed": arguments.seed,
        "found": dict(counts.most_common()),
        "slowest_seconds": round(slowest, 3),
        "wrong": wrong,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join([*wrong[:20], f"{arguments.times} times, {len(wrong)} wrong, slowest {slowest:.2f} s"]))
    return 3 if wrong else 0


def damage(data: bytearray, rng: random.Random) -> str:
    """Damage the bytes at a random place; returns how."""
    kind = rng.choice(DAMAGES)
    first = rng.randrange(max(1, len(data)))
    length = rng.choice((1, 17, 512, 1024, rng.randrange(1, 20_000)))
    # Half of them at borders of blocks, where nothing looks torn.
    if rng.random() < 0.5:
        first, length = first // 512 * 512, max(512, length // 512 * 512)
    span = slice(first, first + length)
    if kind == "flip" and data:
        data[min(first, len(data) - 1)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[span]
    elif kind == "repeat":
        place = rng.randrange(max(1, len(data))) // 512 * 512
        data[place:place] = data[span]
    elif kind == "overwrite":
        data[span] = rng.randbytes(len(data[span]))
    elif kind == "zero":
        data[span] = bytes(len(data[span]))
    else:
        del data[first:]
    return kind


def check(path: Path, data: bytes, captions: dict[str, str], counts: collections.Counter[str]) -> list[str]:
    """What is wrong with the way this shard is read."""
    problems = []
    found = list(scan(path, "sha256"))
    if found != list(scan(path, "sha256")):
        problems.append("read twice, it is not the same")
    for each in found:
        if isinstance(each, Fault):
            counts[each.reason] += 1
            continue
        counts["good" if each.images else "text"] += 1
        if not each.images:
            # A cut along the borders of members has left a caption that nothing tells from a text.
            continue
        stored = each.images[0]
        try:
            decode(data[stored.offset : stored.offset + stored.size], channels=3, image_size=32)
        except SampleError:
            counts["found bad by decoding"] += 1
        own = captions.get(_hash(data, each))
        if own != each.text and each.text in captions.values():
            problems.append(f"{each.key}: the caption {each.text!r} is another image's")
    return problems


def _hash(data: bytes, sample: RawSample) -> str:
    stored = sample.images[0]
    return hashlib.sha256(data[stored.offset : stored.offset + stored.size]).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
