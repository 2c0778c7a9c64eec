"""Prints the README's table of the quickstart from benchmarks/results/quickstart.json.

.venv/bin/python benchmarks/table.py [--write]     --write puts it into README.md between its two markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"
BEGIN, END = "<!-- quickstart table: benchmarks/table.py -->", "<!-- end of table -->"
ROWS = {
    "generation_accuracy": "generation accuracy: a classifier of real digits reads the digit of the prompt",
    "classifier_accuracy_on_real": "the same classifier on real validation images",
    "caption_accuracy": "caption accuracy: greedy captions of validation images that name the right digit",
    "generation_diversity": "diversity: distance between generated images of a digit, relative to real ones",
    "nearest_training_distance_generated": "distance from a generated image to the nearest training image",
    "nearest_training_distance_real": "distance from a validation image to the nearest training image",
    "text_loss_nats_per_token": "validation text loss, nats per token (threshold: a bigram model on the same text)",
    "text_loss_nats_per_byte": "validation text loss, nats per byte",
    "bigram_nats_per_byte": "the bigram model, nats per byte",
}


def table(record: dict[str, Any]) -> str:
    """The table as Markdown, with the machine, the versions and the date below it."""
    lines = ["| `bash launch/quickstart.sh` | result | threshold |", "|---|---|---|"]
    for name, meaning in ROWS.items():
        metric = record["metrics"][name]
        sense = "at least" if metric["higher_is_better"] else "below"
        value = metric["threshold"]
        threshold = f"{sense} {value:.3g}" if value is not None else ""
        lines.append(f"| {meaning} | {metric['value']:.3f} | {threshold} |")
    lines.append(f"| time without installation | {record['seconds_without_set_up']} s | at most 600 s |")
    lines.append(f"| peak memory, all processes | {record['peak_memory_gib']:.2f} GiB | below 4 GiB |")
    where = record["environment"]
    packages = where["packages"]
    lines += [
        "",
        f"{where['cpu_count']} cores of {' '.join(where['cpu'].split())}, Python {where['python']}, torch"
        f" {packages['torch']}, DeepSpeed {packages['deepspeed']}, {where['time'][:10]}. Measured by"
        " `python campaigns/quickstart.py`.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    text = table(json.loads(RESULT.read_text(encoding="utf-8")))
    if not parser.parse_args().write:
        print(text)
        return
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
