"""Reads a folder of hostile shards and judges every case of its manifest.json: outcome, reason, time and memory.

    .venv/bin/python campaigns/hostile.py --data DIR [--out benchmarks/results/hostile.json]
    .venv/bin/python campaigns/hostile.py --sounds 10000 [--seed 0] [--out benchmarks/results/hostile-sounds.json]

With --sounds it lays down so many sound files itself. Each shard is read by a fresh process, which also tokenises and
decodes what was found good; then the whole folder is indexed twice by `transfusion data index`. Exits with 3 when a
case is not as the manifest asks.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hostile_sounds import lay_down
from transfusion.config.sections import SOUND
from transfusion.data.images.decode import decode
from transfusion.data.shards.sample import Fault, RawSample, SampleError
from transfusion.data.shards.scan import scan
from transfusion.data.sounds.files import decode_to as decode_sound
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer
from transfusion.tokens import SpecialToken

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MAX_MIB = 300
# Samples of the longest shape: ten seconds.
LONGEST = 160_000
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "packages", "git", "transfusion")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="folder with manifest.json and its shards")
    what.add_argument("--sounds", type=int, default=0, help="files of sound to lay down")
    parser.add_argument("--seed", type=int, default=0, help="of the files of sound")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shard", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shard:
        print(json.dumps(read(arguments.shard, Tokenizer(arguments.tokenizer))))
        return 0
    if not arguments.sounds:
        return check(arguments.data, arguments.out or RESULTS / "hostile.json", "")
    with tempfile.TemporaryDirectory() as folder:
        lay_down(Path(folder), arguments.sounds, arguments.seed)
        given = f" --sounds {arguments.sounds} --seed {arguments.seed}"
        return check(Path(folder), arguments.out or RESULTS / "hostile-sounds.json", given)


def check(data: Path, out: Path, given: str) -> int:
    """Check every case and write the record; returns the exit code. given: on the command line."""
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    wrong: list[str] = []
    cases, peak, slowest = 0, 0.0, 0.0
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.model"
        train_tokenizer(
            ["a photo of an emoji, some text and numbers 0123456789"] * 9, tokenizer, vocabulary=300
        )
        for name, facts in manifest["shards"].items():
            command = [
                sys.executable,
                __file__,
                "--data",
                data,
                "--shard",
                data / name,
                "--tokenizer",
                tokenizer,
            ]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            if done.returncode:
                wrong.append(f"{name}: reading it ended with {done.returncode}: {done.stderr[-300:]}")
                continue
            found = json.loads(done.stdout)
            wrong += [f"{name}: {problem}" for problem in check_shard(facts, found)]
            cases += len(facts["samples"]) + ("shard_reason" in facts)
            peak = max(peak, found["peak_mib"])
            slowest = max([slowest, *(outcome["seconds"] for outcome in found["outcomes"])])
            counts.update(outcome.get("reason", "good") for outcome in found["outcomes"])
        wrong += check_index(data, manifest, Path(folder), tokenizer)
    if peak > (most := manifest.get("max_mib", MAX_MIB)):
        wrong.append(f"a process held {peak:.0f} MiB of at most {most}")
    # Imported here, since it brings torch along, which no process that reads shards needs.
    from transfusion.observe.environment import describe_environment

    environment = describe_environment()
    record = {
        "command": f"python campaigns/hostile.py{given}",
        "environment": {name: environment[name] for name in KEPT},
        "shards": len(manifest["shards"]),
        "cases": cases,
        "found": dict(counts.most_common()),
        "slowest_seconds": round(slowest, 3),
        "wrong": wrong,
        "peak_mib": round(peak, 1),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        "\n".join(
            [*wrong, f"{cases} cases in {len(manifest['shards'])} shards, {len(wrong)} wrong, {peak:.0f} MiB"]
        )
    )
    return 3 if wrong else 0


def read(shard: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a process makes of one shard: of each sample its outcome, seconds and growth of memory in MiB."""
    outcomes = []
    stream = iter(scan(shard))
    while True:
        begin, before = time.perf_counter(), _peak_mib()
        found = next(stream, None)
        if found is None:
            break
        outcome = _refused(found) if isinstance(found, Fault) else _used(found, shard, tokenizer)
        seconds, growth = time.perf_counter() - begin, _peak_mib() - before
        outcomes.append({**outcome, "key": found.key, "seconds": seconds, "growth_mib": growth})
    return {"outcomes": outcomes, "peak_mib": _peak_mib()}


def _refused(fault: Fault) -> dict[str, Any]:
    return {"reason": fault.reason, "offset": fault.offset}


def _used(sample: RawSample, shard: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokenise and decode as training does, and as a prompt is read: sounds up to the longest shape."""
    ids = [token for text in sample.texts for token in tokenizer.encode(text)]
    for stored in sample.images:
        with shard.open("rb") as stream:
            stream.seek(stored.offset)
            data = stream.read(stored.size)
            try:
                if stored.modality == SOUND:
                    if not np.isfinite(decode_sound(data, min(stored.width, LONGEST))).all():
                        return {"reason": "what is not finite is given", "offset": sample.offset}
                else:
                    decode(data, channels=3, image_size=256)
            except SampleError as error:
                return {"reason": str(error), "offset": sample.offset}
    return {
        "text": sample.text if len(sample.texts) else "",
        "size": [[stored.width, stored.height] for stored in sample.images],
        "elements": len(sample.elements),
        "control_ids": min(ids, default=len(SpecialToken)) < len(SpecialToken),
        "notes": sample.notes,
    }


def check_shard(facts: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not as the manifest asks."""
    wrong = []
    by_key: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for outcome in found["outcomes"]:
        by_key[outcome["key"]].append(outcome)
    reasons = {outcome.get("reason") for outcome in found["outcomes"]}
    if facts.get("shard_reason") not in {None, *reasons}:
        wrong.append(f"the shard's reason {facts['shard_reason']} is not told")
    known = {case["key"] for case in facts["samples"]}
    wrong += [f"{key!r} is in no manifest" for key in by_key if key and key not in known]
    for case in facts["samples"]:
        problem = check_case(case, by_key[case["key"]])
        wrong += [f"{case['key']!r} ({case['case']}): {problem}"] if problem else []
    return wrong


def check_case(case: dict[str, Any], outcomes: list[dict[str, Any]]) -> str:
    """The problem with one case; empty when there is none."""
    good = [outcome for outcome in outcomes if "reason" not in outcome]
    bad = [outcome for outcome in outcomes if "reason" in outcome]
    allowed = {
        *case.get("reason", "").split(),
        *(case.get("note", "").split() if "is fine too" in case.get("note", "") else ()),
    }
    if any(outcome["reason"] not in allowed for outcome in bad):
        return f"left out as {[outcome['reason'] for outcome in bad]}, not as {case.get('reason')}"
    if case["expect"] == "drop" and (good or len(bad) != 1):
        return f"{len(good)} times given and {len(bad)} times told, not left out once"
    if case["expect"] == "yield" and len(good) != case.get("max_yields", 1):
        return f"given {len(good)} times"
    if case["expect"] == "either" and len(outcomes) != 1:
        return f"told {len(outcomes)} times"
    for outcome in good:
        for name, value in (("text", outcome["text"]), ("n_elements", outcome["elements"])):
            if case.get(name, value) != value:
                return f"{name} is {value!r}"
        if "size" in case and [case["size"]] != outcome["size"]:
            return f"size is {outcome['size']}"
        if outcome["control_ids"]:
            return "its text has become a control token"
    for outcome in outcomes:
        if outcome["seconds"] > case.get("max_s", 60):
            return f"took {outcome['seconds']:.2f} s"
        if outcome["growth_mib"] > case.get("max_mem_mb", MAX_MIB):
            return f"took {outcome['growth_mib']:.0f} MiB"
    return ""


def lost_of(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Samples lost by reason, as lines of quarantine tell."""
    lost: collections.Counter[str] = collections.Counter()
    for line in lines:
        lost[line["reason"]] += line["lost"]
    return dict(sorted(lost.items()))


def check_index(data: Path, manifest: dict[str, Any], folder: Path, tokenizer: Path) -> list[str]:
    """Index everything twice: exit code, counters, quarantine, and the same files both times."""
    wrong, written = [], []
    for name in ("first", "second"):
        command = [
            "data",
            "index",
            str(data / "*"),
            "--out",
            str(folder / name),
            "--tokenizer",
            str(tokenizer),
        ]
        done = subprocess.run([sys.executable, "-m", "transfusion", *command], capture_output=True, text=True)
        if done.returncode != 3:
            return [f"data index ended with {done.returncode}: {done.stderr[-300:]}"]
        written.append({path.name: path.read_bytes() for path in (folder / name).iterdir()})
    if written[0] != written[1]:
        wrong.append("two index runs differ")
    lines = [json.loads(line) for line in written[0]["quarantine.jsonl"].splitlines()]
    told = collections.Counter((line["shard"], line["key"]) for line in lines)
    for name, facts in manifest["shards"].items():
        for case in facts["samples"]:
            if case["expect"] == "drop" and told[name, case["key"]] != 1:
                wrong.append(f"{name}: {case['key']!r} has {told[name, case['key']]} lines of quarantine")
    counters = json.loads(written[0]["counters.json"])
    if counters["faults"] != lost_of(lines):
        wrong.append("counters and quarantine differ")
    accounted = counters["samples"] + sum(counters["faults"].values())
    if accounted != manifest.get("samples", accounted):
        wrong.append(f"{accounted} of {manifest['samples']} samples are accounted for")
    return wrong


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
