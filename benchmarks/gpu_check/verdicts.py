"""What probes have found out about the kernels, read from their records, which are files of one object each.

The packages of the project may not be importable where this runs, so the files are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check.record import read_json

# Outcomes after which a kernel is not launched again: it would take the part that does so with it.
DEADLY = ("hung", "died")


class Verdicts:
    """The newest record of each kind of kernel in a folder."""

    def __init__(self, folder: Path) -> None:
        self._newest: dict[tuple[str, int, str], dict[str, Any]] = {}
        for path in sorted(folder.glob("*.json")):
            record = read_json(path)
            if not isinstance(record, dict) or not {"subject", "verdict"} <= record.keys():
                continue
            subject = record["subject"]
            key = subject["implementation"], subject["head_dim"], subject["dtype"]
            former = self._newest.get(key)
            if former is None or former["verdict"]["time"] <= record["verdict"]["time"]:
                self._newest[key] = {"file": path.name, **record}

    @property
    def records(self) -> list[dict[str, Any]]:
        """All of them, as they are kept in results.json."""
        return list(self._newest.values())

    @property
    def lines(self) -> list[str]:
        """One for each kind of kernel."""
        return [f"{' '.join(map(str, key))}: {_told(record)}" for key, record in self._newest.items()]

    def outcome(self, implementation: str, head_dim: int, dtype: str) -> str:
        """`right`, `wrong`, `hung`, `died`, `failed` or `undecided`, and nothing where there is no record."""
        record = self._newest.get((implementation, head_dim, dtype))
        return str(record["verdict"]["outcome"]) if record else ""

    def deadly(self) -> list[tuple[str, int]]:
        """Implementations and head widths of which some kernel hung or ended its process."""
        found = {key[:2] for key, record in self._newest.items() if record["verdict"]["outcome"] in DEADLY}
        return sorted(found)

    def not_right(self) -> list[tuple[str, int, str]]:
        """The kinds of kernels that were not found right."""
        return [key for key, record in self._newest.items() if record["verdict"]["outcome"] != "right"]


def _told(record: dict[str, Any]) -> str:
    verdict = record["verdict"]
    detail = f", {verdict['detail']}" if verdict["detail"] else ""
    return f"{verdict['outcome']}{detail} ({verdict['seconds']:g} s)"


def restore(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write records of a former call where the kernels look for them. They count on the same machine alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        path = folder / Path(record["file"]).name
        if not path.exists():
            kept = {"subject": record["subject"], "verdict": record["verdict"]}
            path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
