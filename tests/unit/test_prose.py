"""The README, the guides and the reference read well: full stops in place of semicolons, and no endless sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_SEMICOLONS_IN_A_HUNDRED, MAX_WORDS = 3, 40
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "launch/README.md")),
    *sorted(page for page in ROOT.glob("docs/**/*.md") if page.name != "LOG.md"),
]


def sentences(text: str) -> list[str]:
    """The sentences of a page. Code, tables, headings, comments and addresses are left out."""
    text = re.sub(r"^---\n.*?^---$", "", text, count=1, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\s*```.*?^\s*```$", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|<[^>]+>", " ", text, flags=re.DOTALL)
    text = re.sub(r"^\s*(\||#|:::|!!!|\?\?\?).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    blocks = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.)\s+", text)
    found = (each.strip() for block in blocks for each in re.split(r"(?<=[.!?])[)\"]?\s+", block))
    return [each for each in found if re.search(r"\w", each)]


def complaints(text: str) -> list[str]:
    """What is wrong with the sentences of a page, in a line each."""
    found = sentences(text)
    long = [f"{len(each.split())} words: {each}" for each in found if len(each.split()) > MAX_WORDS]
    semicolons = [each for each in found if ";" in each]
    allowed = max(1, len(found) * MAX_SEMICOLONS_IN_A_HUNDRED // 100)
    return [*long, *(semicolons if sum(each.count(";") for each in found) > allowed else [])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short_and_whole(page: Path) -> None:
    assert complaints(page.read_text(encoding="utf-8")) == []


def test_what_reads_badly_is_found() -> None:
    assert complaints("A " + "very " * MAX_WORDS + "long one.") and complaints("One; two; three.")
    fine = (
        "One idea.\n\n- `a; b` is code\n- [so](is;not) this\n\n| a; b |\n\n```\na; b; c\n```\n\nNothing more."
    )
    assert complaints(fine) == [] and len(sentences(fine)) == 4
