"""What the documents name is there: files, commands with their options, keys of a configuration, names in Python."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from transfusion.cli import main
from transfusion.codec_train.settings import CodecTrainConfig
from transfusion.config import Config

ROOT = Path(__file__).parents[2]
# The log tells of what was.
DOCUMENTS = [
    *(ROOT / folder / "README.md" for folder in (".", "benchmarks", "launch")),
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in ROOT.glob("docs/*.md") if path.name != "LOG.md"),
]
by_name = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
FILES = {".json", ".jsonl", ".png", ".py", ".safetensors", ".txt", ".yaml"}
FOLDERS = "launch|configs|benchmarks|campaigns|docs|kernels|src|tests"


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every block of code."""
    for found in re.finditer(
        r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        yield found[1], found[2]


def commands(path: Path) -> Iterator[list[str]]:
    """The words after `transfusion`; of a synopsis with all that may be left out."""
    for language, text in blocks(path):
        for line in text.replace("\\\n", " ").splitlines() if not language else ():
            if line.startswith("transfusion "):
                plain = re.sub(r"[\[\]]|\.\.\.", " ", line)
                yield [word.split("|")[0] for word in shlex.split(plain, comments=True)[1:]]


def complaint(words: list[str]) -> str:
    """What the command line has against the names of commands and options, or their absence."""
    command: Any = typer.main.get_command(main.app)
    while hasattr(command, "commands"):
        name, *words = words
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    try:
        command.make_context(name, words)
    except Exception as error:
        # A placeholder is no number and no file that exists.
        return "" if type(error).__name__ == "BadParameter" else f"{type(error).__name__}: {error}"
    return ""


@by_name
def test_commands_are_taken(path: Path) -> None:
    assert [words for words in commands(path) if complaint(words)] == []


def test_what_is_wrong_is_found() -> None:
    assert "no command" in complaint(["sampel"]) and "NoSuchOption" in complaint(["report", "x", "--what"])
    assert "MissingParameter" in complaint(["sample", "model", "--prompt", "a"])
    assert not complaint(["sample", "model", "--prompt", "a", "-n", "N", "--out", "images"])
    assert sum(1 for path in DOCUMENTS for _ in commands(path)) > 30


@by_name
def test_files_exist(path: Path) -> None:
    named = set(re.findall(rf"(?:{FOLDERS})/[\w./-]+\.\w+", path.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not list(ROOT.glob(name.replace("VERSION", "*")))] == []


def keys(model: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield before + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{before}{name}.")


@by_name
def test_keys_exist(path: Path) -> None:
    known = {*keys(Config), *keys(CodecTrainConfig)}
    text = path.read_text(encoding="utf-8")
    sections = "|".join(Config.model_fields)
    # `section.key` or `section.key=value`, and overrides wherever they stand.
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:=[^`]*)?`", text))
    named |= set(re.findall(rf"(?<![\w.])((?:{sections})\.[a-z_.]+)=", text))
    files = {name for name in named if Path(name).suffix in FILES}
    assert sorted(named - known - files) == []


@by_name
def test_python_names_exist(path: Path) -> None:
    for language, text in blocks(path):
        for node in ast.walk(ast.parse(text)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for name in (name.name for name in node.names if not hasattr(module, name.name)):
                    # Raises where it is no module either.
                    importlib.import_module(f"{node.module}.{name}")


@by_name
def test_nothing_waits_to_be_filled_in(path: Path) -> None:
    assert re.findall(r"^[A-Z_]{3,}$", path.read_text(encoding="utf-8"), re.MULTILINE) == []


def test_one_version() -> None:
    stated = {
        (ROOT / name).read_text(encoding="utf-8").split(before)[1].split()[0].strip('",')
        for name, before in (
            ("setup.py", "version="),
            ("CITATION.cff", "\nversion: "),
            ("kernels/pyproject.toml", "\nversion = "),
        )
    }
    assert len(stated) == 1
