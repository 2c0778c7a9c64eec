"""results.json: what a call has found so far, written anew whenever something comes in, and whole at any time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

RESULTS = "results.json"
LOG = "log.txt"
# Of a part's output that results.json holds, from its end.
TAIL_CHARACTERS = 3000


class Record:
    """The record of a call: its parts in the order in which they began, and what they found.

    A part has a status: `running`, `passed`, `failed`, `out of time`, `no time left`, `skipped` or `interrupted`.
    Beside that stand when it began, how long it took, its exit code, and as `result` the JSON that it wrote. So a part
    that is killed keeps what it had written.
    """

    def __init__(self, out: Path, head: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / RESULTS, out / LOG
        self._begin = time.monotonic()
        self.data: dict[str, Any] = {
            **head,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
            "finished": False,
            "parts": {},
        }
        self.log.write_bytes(b"")
        self.write()

    @property
    def seconds(self) -> float:
        """Since the call began."""
        return time.monotonic() - self._begin

    def part(self, name: str, **found: Any) -> None:
        """Put on record what is known of a part, and write."""
        self.data["parts"].setdefault(name, {}).update(found)
        self.write()

    def write(self) -> None:
        """Write all of it under another name and give it its own, so that a reader finds the one or the other."""
        self.data["seconds"] = round(self.seconds, 1)
        unfinished = self.path.with_name(f".{self.path.name}")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)

    def end_of_log(self) -> int:
        """Bytes of the log so far."""
        return self.log.stat().st_size

    def tail(self, begin: int) -> str:
        """The end of what the log holds from a byte on."""
        with self.log.open("rb") as file:
            file.seek(begin)
            return file.read().decode("utf-8", errors="replace")[-TAIL_CHARACTERS:]


def read_json(path: Path) -> Any:
    """What a JSON file holds, or the objects of a file with one in each line. None where that is not readable."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # The last line may be half written.
            lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
            return [json.loads(line) for line in lines]
        return json.loads(text)
    except (OSError, ValueError):
        return None


def write_json(found: Any, out: Path) -> None:
    """Write JSON whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, out)
