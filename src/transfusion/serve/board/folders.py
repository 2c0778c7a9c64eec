"""The runs of a folder: which there are, and what their files say. Nothing is written, and nothing locked.

A file is opened only where it lies within the folder once all links are followed. What cannot be read is told in words.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from transfusion.observe.metrics import EVALUATED
from transfusion.observe.runfolder import RunFolder
from transfusion.serve.board.curves import Curves, number, parse

# Device and inode of files.
Locks: TypeAlias = frozenset[tuple[int, int]]
# Of the folder that is given: its runs, those of grids in it, and those of folders of grids.
_DEPTH = 3
_MAX_RUNS, _MAX_ENTRIES = 500, 20_000
# Without a lock that can be seen, as on another machine, a run counts as under way for so long after its last line.
_RUNNING_SECONDS = 60
_FORGET_SECONDS = 600
_TAIL_BYTES = 1 << 16
_MAX_CONFIG_BYTES, _MAX_IMAGE_BYTES = 1 << 20, 64 << 20
_MAX_LETTERS = 2000
_GRID = re.compile(r"step_([0-9]{1,15})\.png")
_MAX_VALUES, _MAX_DEPTH = 2000, 12
# Every run has its own.
_PLACES = ("run.name", "run.dir", "run.folder")


class Run:
    """One run folder. What was read of its files is kept while they are the same.

    Args:
        name: Of the run, unique among those that are shown.
        path: Its folder.
        root: What its files must lie in.
        slot: Its place among the colours.
    """

    def __init__(self, name: str, path: Path, root: Path, slot: int) -> None:
        self.name, self.slot = name, slot
        self.folder, self._root = RunFolder(path), root
        self.asked = 0.0
        self._curves: Curves | None = None
        self._tail: tuple[tuple[int, ...], list[dict[str, Any]]] = ((), [])
        self._config: tuple[tuple[int, ...], dict[str, Any] | None] = ((), None)

    def forget(self) -> None:
        """Give back the memory of the curves."""
        self._curves = None

    def summary(self, locked: Locks, now: float) -> dict[str, Any]:
        """What the list of runs tells."""
        lines, config = self._last_lines(), self.config()
        last: dict[str, Any] = {}
        for line in lines:
            last |= {name: value for name, value in line.items() if number(value) is not None}
        steps = _planned(config)
        written = self._written()
        is_running = self._is_locked(locked) or now - written < _RUNNING_SECONDS
        return {
            "name": self.name,
            "slot": self.slot,
            "state": "running" if is_running else "ended",
            "step": lines[-1]["step"] if lines else None,
            "steps": steps,
            "losses": {
                name: value
                for name, value in last.items()
                if name == "loss" or (name.endswith("_loss") and not name.startswith(EVALUATED))
            },
            "tokens": last.get("tokens"),
            "tokens_per_second": last.get("tokens_per_second"),
            "memory_gib": last.get("memory_gib"),
            "written": written,
            "seconds_left": _seconds_left(lines, steps) if is_running else None,
            "notes": list(self._notes(lines, config)),
        }

    def _notes(self, lines: list[dict[str, Any]], config: dict[str, Any] | None) -> Iterator[str]:
        if self._inside(self.folder.metrics) is None:
            yield "No metrics.jsonl yet: no step has been logged."
        elif not lines:
            yield "metrics.jsonl holds no step that can be read."
        if config is None:
            yield "config.yaml is missing or cannot be read, so the planned steps are not known."

    def started(self) -> float:
        """When the first line was written, or else the configuration."""
        try:
            with self._open(self.folder.metrics) as file:
                line = parse(file.readline(_TAIL_BYTES))
        except OSError:
            line = None
        return (line and number(line.get("time"))) or _modified(self.folder.config)

    def series(self, names: Sequence[str], cursor: str) -> dict[str, Any]:
        """What is new of some metrics. See `Curves.read`."""
        self.asked = time.monotonic()
        path = self._inside(self.folder.metrics)
        curves = self._curves = self._curves or Curves()
        try:
            if path is None:
                raise FileNotFoundError
            return curves.read(path, names, cursor)
        except OSError as error:
            # That there is none yet stands in the list.
            note = "" if isinstance(error, FileNotFoundError) else f"metrics.jsonl: {error.strerror}"
            return {"points": {}, "width": 1, "first": 0, "cursor": "", "names": [], "note": note}

    def grids(self) -> dict[str, Any]:
        """The steps that have a sample grid, and what changes when one is drawn again."""
        sample_grid = (self.config() or {}).get("sample_grid")
        prompts = sample_grid.get("prompts") if isinstance(sample_grid, dict) else None
        return {
            "grids": [
                {"step": step, "version": ".".join(map(str, state))}
                for step, path in sorted(self._grid_files().items())
                if (state := _state(path))
            ],
            "prompts": [str(prompt) for prompt in prompts] if isinstance(prompts, list) else [],
        }

    def grid(self, step: int) -> bytes | None:
        """The image of a step, None where there is none."""
        path = self._grid_files().get(step)
        try:
            if path is None or path.stat().st_size > _MAX_IMAGE_BYTES:
                return None
            return path.read_bytes()
        except OSError:
            return None

    def _grid_files(self) -> dict[int, Path]:
        found = {}
        try:
            for entry in os.scandir(self.folder.samples):
                match = _GRID.fullmatch(entry.name)
                path = self._inside(Path(entry.path)) if match else None
                if match and path:
                    found[int(match[1])] = path
        except OSError:
            return {}
        return found

    def log(self, cursor: str) -> dict[str, Any]:
        """The lines of log.txt behind a cursor, or the last ones. `whole`: they replace those that are known."""
        try:
            with self._open(self.folder.log) as file:
                state = os.fstat(file.fileno())
                known, _, offset = cursor.partition(".")
                is_known = known == str(state.st_ino) and offset.isdecimal() and len(offset) < 20
                earliest = max(0, state.st_size - _TAIL_BYTES)
                whole = not (is_known and earliest <= int(offset) <= state.st_size)
                begin = earliest if whole else int(offset)
                file.seek(begin)
                text = file.read(_TAIL_BYTES)
        except OSError:
            return {"lines": [], "cursor": "", "whole": True, "note": "There is no log.txt."}
        if whole and begin:
            # The first line has lost its beginning.
            dropped = text.find(b"\n") + 1
            begin, text = begin + dropped, text[dropped:]
        text = text[: text.rfind(b"\n") + 1]
        lines = text.decode("utf-8", "replace").split("\n")[:-1]
        return {
            "lines": [line[:_MAX_LETTERS] for line in lines],
            "cursor": f"{state.st_ino}.{begin + len(text)}",
            "whole": whole,
        }

    def config(self) -> dict[str, Any] | None:
        """config.yaml, None where it cannot be read."""
        path = self._inside(self.folder.config)
        state = _state(path)
        if state != self._config[0]:
            self._config = (state, _read_config(path))
        return self._config[1]

    def _last_lines(self) -> list[dict[str, Any]]:
        """The steps at the end of metrics.jsonl."""
        path = self._inside(self.folder.metrics)
        state = _state(path)
        if state != self._tail[0]:
            self._tail = (state, _read_tail(path))
        return self._tail[1]

    def _written(self) -> float:
        return max(_modified(self.folder.metrics), 0.0) or _modified(self.folder.config)

    def _is_locked(self, locked: Locks) -> bool:
        try:
            state = (self.folder.path / "lock").lstat()
        except OSError:
            return False
        # Overlays and the like tell `stat` another device than the kernel's list.
        is_virtual = os.major(state.st_dev) == 0
        return any(
            inode == state.st_ino and (is_virtual or device == state.st_dev) for device, inode in locked
        )

    def _open(self, path: Path) -> Any:
        inside = self._inside(path)
        if inside is None:
            raise FileNotFoundError(path)
        return inside.open("rb")

    def _inside(self, path: Path) -> Path | None:
        """The file behind all links, None where there is none or it lies outside of the runs."""
        try:
            real = path.resolve(strict=True)
            return real if real.is_relative_to(self._root) and real.is_file() else None
        except (OSError, RuntimeError):
            return None


class Runs:
    """All runs in a folder. The list is made anew each time it is asked for, and a run keeps its place.

    Args:
        root: A run folder, or one that holds some.
    """

    def __init__(self, root: Path) -> None:
        self._given = root
        self._root = root.resolve()
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._slots: dict[str, int] = {}

    def __getitem__(self, name: str) -> Run:
        """The run of this name.

        Raises:
            KeyError: For a name that is not in the list.
        """
        with self._lock:
            if name not in self._runs:
                self._scan()
            run = self._runs[name]
        if not run.folder.path.is_dir():
            raise KeyError(name)
        return run

    def summary(self) -> dict[str, Any]:
        """The list."""
        with self._lock:
            notes = self._scan()
            runs = list(self._runs.values())
        now, locked = time.time(), _locked_files()
        return {
            "folder": _plain(self._given),
            "runs": [run.summary(locked, now) for run in runs],
            "notes": notes,
            "now": now,
        }

    def _scan(self) -> list[str]:
        folders, notes = _find(self._root)
        former, new = self._runs, []
        self._runs = {}
        for name, path in folders.items():
            run = former.get(name)
            if run is None or run.folder.path != path:
                run = Run(name, path, self._root, 0)
                new.append(run)
            self._runs[name] = run
        # The oldest comes first, so that the colours are the same when the board is started again.
        for run in sorted(new, key=lambda run: (run.started(), run.name)):
            run.slot = self._slots.setdefault(run.name, len(self._slots))
        for run in former.values():
            if time.monotonic() - run.asked > _FORGET_SECONDS:
                run.forget()
        return notes


def _find(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Run folders by name, and what is to be told of the search."""
    if not root.is_dir():
        return {}, [f"The folder {_plain(root)} is no longer there."]
    if _is_run(root):
        return {_plain(root.name): root}, []
    found: dict[str, Path] = {}
    links = entries = 0
    level = [root]
    for _ in range(_DEPTH):
        below = []
        for folder in level:
            for entry in _entries(folder):
                entries += 1
                if entry.name.startswith(".") or entries > _MAX_ENTRIES:
                    continue
                path = Path(entry.path)
                if entry.is_symlink():
                    links += path.is_dir()
                elif entry.is_dir(follow_symlinks=False):
                    if _is_run(path):
                        found[_plain(path.relative_to(root).as_posix())] = path
                    else:
                        below.append(path)
        level = below
    notes = []
    if links:
        what = "One link to a folder is" if links == 1 else f"{links} links to folders are"
        notes.append(f"{what} left out. Show the folder behind it with a board of its own.")
    if len(found) > _MAX_RUNS or entries > _MAX_ENTRIES:
        notes.append(
            f"This folder is too large to be shown whole. Name one that holds at most {_MAX_RUNS} runs."
        )
    return dict(itertools.islice(sorted(found.items()), _MAX_RUNS)), notes


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(itertools.islice(entries, _MAX_ENTRIES))
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.config.is_file() or folder.metrics.is_file()


def differences(runs: Sequence[Run]) -> dict[str, Any]:
    """The values in which configurations differ: rows of a name and a text for each run, None where it has none."""
    configs = [run.config() for run in runs]
    readable = [
        dict(itertools.islice(_flat(config), _MAX_VALUES)) for config in configs if config is not None
    ]
    names = dict.fromkeys(name for values in readable for name in values)
    rows = [
        {"name": name, "values": [values.get(name) for values in readable]}
        for name in names
        if name not in _PLACES and len({values.get(name) for values in readable}) > 1
    ]
    named = list(zip(runs, configs, strict=True))
    return {
        "runs": [run.name for run, config in named if config is not None],
        "unreadable": [run.name for run, config in named if config is None],
        "rows": rows,
    }


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth < _MAX_DEPTH:
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list) and depth < _MAX_DEPTH and any(isinstance(each, dict) for each in value):
        for place, each in enumerate(value):
            yield from _flat(each, f"{name}.{place}", depth + 1)
    else:
        yield name, _words(value)


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value or "(empty)"
    # Piece by piece, since aliases can make a short file a very long text.
    pieces = json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value)
    try:
        return "".join(itertools.islice(pieces, _MAX_LETTERS))[:_MAX_LETTERS]
    except (TypeError, ValueError, RecursionError):
        return "(cannot be shown)"


def _planned(config: dict[str, Any] | None) -> int | None:
    """Steps of a training, which that of a codec names at the top."""
    config = config or {}
    train = config.get("train")
    steps = train.get("steps") if isinstance(train, dict) else config.get("steps")
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


def _seconds_left(lines: list[dict[str, Any]], steps: int | None) -> float | None:
    """At the pace of the last lines."""
    same = [line for line in lines if line.get("attempt") == lines[-1].get("attempt")]
    timed = [(line["step"], moment) for line in same if (moment := number(line.get("time"))) is not None]
    if steps is None or not timed or timed[-1][0] <= timed[0][0] or timed[-1][1] <= timed[0][1]:
        return None
    pace = (timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0])
    return max(0.0, steps - timed[-1][0]) * pace


def _read_config(path: Path | None) -> dict[str, Any] | None:
    try:
        if path is None or path.stat().st_size > _MAX_CONFIG_BYTES:
            return None
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _read_tail(path: Path | None) -> list[dict[str, Any]]:
    try:
        if path is None:
            return []
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            texts = file.read().splitlines(keepends=True)
    except OSError:
        return []
    # A line that is cut at either end is none.
    return [line for text in texts if text.endswith(b"\n") and (line := parse(text)) is not None]


def _state(path: Path | None) -> tuple[int, ...]:
    """What changes when a file does, its number first. Empty for none."""
    try:
        state = path.stat() if path else None
    except OSError:
        state = None
    return (state.st_ino, state.st_size, state.st_mtime_ns) if state else ()


def _modified(path: Path) -> float:
    try:
        moment = path.stat().st_mtime
    except OSError:
        return 0.0
    return moment if math.isfinite(moment) else 0.0


def _locked_files() -> Locks:
    """Device and inode of the files that a process of this machine holds locked, as Linux lists them.

    To try the lock instead would keep a training out that starts in that moment.
    """
    try:
        rows = Path("/proc/locks").read_text(encoding="ascii")
    except (OSError, ValueError):
        return frozenset()
    # Rows of those that only wait have an arrow.
    places = re.findall(r"^\d+: \w+ .* ([0-9a-f]+):([0-9a-f]+):(\d+) ", rows, re.MULTILINE)
    return frozenset(
        (os.makedev(int(major, 16), int(minor, 16)), int(inode)) for major, minor, inode in places
    )


def _plain(name: object) -> str:
    """A name as JSON and addresses can hold it, whatever bytes it has on the disk."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")
