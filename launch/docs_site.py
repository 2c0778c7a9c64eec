"""What mkdocs.yml adds to mkdocs: links out of docs/, and lists of names in docstrings.

mkdocs calls the functions `on_...`, its hooks. griffe, which reads the docstrings, calls the class at the end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Pages of the navigation that are kept outside of docs/.
OUTSIDE = ("CHANGELOG.md",)
# Badges, such as the README has.
REMOTE_IMAGE = re.compile(r"!\[[^\[\]]*\]\(https?://[^()\s]+\) ?")
LINK = re.compile(r"!?\[([^\[\]]*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of docs/, and what those link to in turn."""
    found = dict.fromkeys(ROOT / name for name in OUTSIDE)
    waiting = [*(DOCS / file.src_uri for file in files.documentation_pages()), *found]
    while waiting:
        for target in _targets(waiting.pop()):
            if target.is_file() and DOCS not in target.parents and target not in found:
                found[target] = None
                waiting += [target] if target.suffix == ".md" else []
    for path in found:
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are on the site, which has no folders of the repository and fetches no images."""
    source = Path(str(page.file.abs_src_path)).resolve()
    if source == DOCS / "LOG.md":
        page.meta["search"] = {"exclude": True}

    def rewritten(link: re.Match[str]) -> str:
        target = _resolved(source, link[2])
        if target.is_dir():
            return link[1]
        if not target.is_file() or (DOCS in source.parents and DOCS in target.parents):
            return link[0]
        start = link[0].index("](") + 2
        return f"{link[0][:start]}{_relative(page.file.src_uri, _place(target))}{link[3] or ''})"

    return LINK.sub(rewritten, REMOTE_IMAGE.sub("", markdown))


def _targets(page: Path) -> Iterator[Path]:
    return (_resolved(page, link[2]) for link in LINK.finditer(page.read_text(encoding="utf-8")))


def _resolved(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def _place(path: Path) -> str:
    """Where a file stands on the site."""
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"


def _relative(page: str, place: str) -> str:
    return os.path.relpath(place, os.path.dirname(page) or ".")


class NamedLines(griffe.Extension):
    """Makes lists of lines `name: meaning`, as docstrings here describe parameters and attributes, and shows <BOS>."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            parts = as_lists(obj.docstring.value, _names(obj)).split("`")
            parts[::2] = (re.sub(r"<(?=\w+>)", "&lt;", part) for part in parts[::2])
            obj.docstring.value = "`".join(parts)


def _names(obj: griffe.Object) -> set[str]:
    names = set(obj.members)
    for function in (obj, obj.members.get("__init__")):
        if isinstance(function, griffe.Function):
            names |= {parameter.name for parameter in function.parameters}
    return names


def as_lists(text: str, names: set[str]) -> str:
    """The text with a list item for each line that begins with one of the names, or several, and a colon."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = re.match(r"(\w+(?:, \w+)*): (?=\S)", line)
        if found and names.issuperset(found[1].split(", ")):
            shown = ", ".join(f"`{name}`" for name in found[1].split(", "))
            lines += [*([] if inside else [""]), f"- {shown}: {line[found.end() :]}"]
            inside = True
        elif inside and line.strip() and not re.match(r"(Returns|Raises|Yields)\b", line):
            lines[-1] += f" {line.strip()}"
        else:
            lines += [*([""] if inside else []), line]
            inside = False
    return "\n".join(lines)
