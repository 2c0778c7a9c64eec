"""Every message that docs/troubleshooting.md quotes is one that the program says, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
MIN_MESSAGES = 60
# What varies in a message. No source holds this letter.
VARIES = "\0"
# What logging puts values for, and what a shell does.
_FORMAT = re.compile(r"%[-+#0]*[\d.]*[dfgrsx]")
_SHELL = re.compile(r"\$\{[^}]*\}|\$\w+|%[sd]")


def sources(root: Path) -> list[Path]:
    """The files whose words reach a user."""
    python = [path for folder in ("src", "kernels") for path in root.glob(f"{folder}/**/*.py")]
    scripts = [path for ending in ("sh", "sbatch") for path in root.glob(f"launch/*.{ending}")]
    return sorted([path for path in python if "tests" not in path.parts] + scripts)


def quoted(page: str) -> list[str]:
    """The messages of a page: its bold code. One may go on in the next line."""
    return [" ".join(found.split()) for found in re.findall(r"\*\*`([^`]+)`\*\*", page)]


def said(node: ast.AST) -> str:
    """The text of an expression, with a mark for each part that varies. Adjacent literals are one already."""
    if isinstance(node, ast.Constant):
        return _FORMAT.sub(VARIES, node.value) if isinstance(node.value, str) else VARIES
    if isinstance(node, ast.JoinedStr):
        # Here a per cent sign is one.
        return "".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return said(node.left) + said(node.right)
    return VARIES


def texts(path: Path) -> Iterator[str]:
    """What a file may say. Docstrings and comments are for other readers."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        for line in source.splitlines():
            if not line.lstrip().startswith("#"):
                yield _SHELL.sub(VARIES, line)
        return
    tree = ast.parse(source)
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docstrings = {id(value) for value in statements if isinstance(value, ast.Constant)}
    for node in ast.walk(tree):
        is_text = isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and id(node) not in docstrings
        if is_text and (text := said(node)).strip(VARIES):
            yield " ".join(text.split())


def missing(messages: Sequence[str], spoken: Sequence[str]) -> list[str]:
    """Messages that no text holds. `...` stands for one or more parts that vary, and for nothing else."""
    everything = "\n".join(spoken)

    def form(message: str) -> str:
        parts = (re.escape(part) for part in re.split(r"\.\.\.", message))
        return f"{VARIES}+".join(parts)

    return [message for message in messages if not re.search(form(message), everything)]


@pytest.fixture(scope="module")
def spoken() -> list[str]:
    return [text for path in sources(ROOT) for text in texts(path)]


def test_the_program_says_what_is_quoted(spoken: list[str]) -> None:
    messages = quoted(PAGE.read_text(encoding="utf-8"))
    assert len(messages) >= MIN_MESSAGES
    assert missing(messages, spoken) == []


def test_each_message_has_one_entry() -> None:
    messages = quoted(PAGE.read_text(encoding="utf-8"))
    assert [message for message in sorted(set(messages)) if messages.count(message) > 1] == []


SOURCE = '''
"""A docstring speaks of the moon."""
def load(path, steps):
    """It may say: no cheese in there."""
    # The moon is far away.
    log.warning("%d steps of %.1f s were"
                " skipped", steps, 1.0)
    raise UserError(
        f"cannot read {path}: {'it is a folder' if path.is_dir() else 'gone'}"
        f"; name {path.parent} or another" + (f" ({steps} steps)" if steps else "")
    )
'''


@pytest.fixture
def example(tmp_path: Path) -> list[str]:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "load.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "run.sh").write_text('# The sun.\nfail "no $thing in ${folder:-here} now"\n')
    return [text for path in sources(tmp_path) for text in texts(path)]


@pytest.mark.parametrize(
    "message",
    [
        "cannot read",
        "cannot read ...: ...; name ... or another",
        "or another...",
        "it is a folder",
        "... steps of ... s were skipped",
        "no ... in ... now",
    ],
)
def test_a_message_is_found_whatever_its_lines(message: str, example: list[str]) -> None:
    assert missing([message], example) == []


@pytest.mark.parametrize(
    "message",
    [
        # Reworded.
        "could not read",
        "cannot read ...: ...; name ... or other",
        "no ... in ... any more",
        # In a docstring or a comment.
        "no cheese in there",
        "moon",
        "The sun",
        # A mark in place of fixed words, or of nothing.
        "cannot ... name",
        "steps ...of",
        # Parts of two messages.
        "cannot read ... skipped",
    ],
)
def test_a_message_that_nobody_says_is_found(message: str, example: list[str]) -> None:
    assert missing([message], example) == [message]


def test_bold_code_is_quoted() -> None:
    page = "**`one ... two`** or **`three\nfour`** Of `code` and **bold `code` here**, **`code` first.** nothing."
    assert quoted(page) == ["one ... two", "three four"]
