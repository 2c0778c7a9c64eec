"""What the documents name is there: files, pages, commands with options, keys of a configuration, Python names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from transfusion.cli import main
from transfusion.codec_train.settings import CodecTrainConfig
from transfusion.config import Config

ROOT = Path(__file__).parents[2]
# The log tells of what was.
LOG = "LOG.md"
DOCUMENTS = [
    *(ROOT / folder / "README.md" for folder in (".", "benchmarks", "kernels", "launch")),
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in ROOT.glob("docs/**/*.md") if path.name != LOG),
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


def missing_names(text: str) -> list[str]:
    """Names whose docstrings a page shows, `::: module.name`, and that are not there."""
    missing = []
    for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            missing.append(name)
    return missing


@by_name
def test_documented_names_exist(path: Path) -> None:
    assert missing_names(path.read_text(encoding="utf-8")) == []


def test_a_missing_name_is_found() -> None:
    text = "::: transfusion.schema\n\n::: transfusion.schema.Bach\n\n::: transfusion.Pipeline\n"
    assert missing_names(text) == ["transfusion.schema.Bach"]


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


def without_code(text: str) -> str:
    """A page without its blocks of code, and with nothing in place of code in a line."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> list[str]:
    """Where the links and images of a page lead."""
    plain = without_code(text)
    patterns = (r"\]\(\s*<?([^)\s>]+)", r"^\[[^\]]+\]:\s*(\S+)", r"(?:href|src)=\"([^\"]+)\"")
    return [found for pattern in patterns for found in re.findall(pattern, plain, re.MULTILINE)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page, and those that it states."""
    found: set[str] = set()
    blocks_left_out = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.*?)[ #]*$", blocks_left_out, re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        same = sum(
            each == name or re.fullmatch(rf"{re.escape(name)}-\d+", each) is not None for each in found
        )
        found.add(f"{name}-{same}" if name in found else name)
    return found | set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))


def dead_links(path: Path) -> list[str]:
    """Links of a page to files, pages and headings that are not there. What is elsewhere is not asked for."""
    dead = []
    for link in links(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        place, _, anchor = link.partition("#")
        target = path.parent / place if place else path
        found = target.exists() and not place.startswith("/")
        if found and anchor and target.suffix == ".md":
            found = anchor in anchors(target.read_text(encoding="utf-8"))
        dead += [] if found else [link]
    return dead


@by_name
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text(
        "# One, two\n\n## `c.d`: e_f\n\n## Again\n\n## Again\n\n```\n# no heading\n```\n"
    )
    (tmp_path / "image.png").write_bytes(b"")
    page = tmp_path / "a.md"
    fine = "# A\n[1](b.md#one-two) [2](b.md#cd-e_f) [3](b.md#again-1) [4](#a) [5](https://x.org/y) ![6](image.png)"
    page.write_text(f"{fine} `[7](gone.md)`\n```\n[8](gone.md)\n```\n")
    assert dead_links(page) == []
    page.write_text(
        "[1](gone.md) [2](b.md#three) [3](#b) ![4](gone.png) [5](/b.md) [6](b.md#no-heading)\n[7]: gone/7.md\n"
        '<img src="gone.svg"> [![8](image.png)](gone/8.md)\n'
    )
    assert len(dead_links(page)) == 9


class NavigationLoader(yaml.SafeLoader):
    """Reads mkdocs.yml, which names functions of Python that are of no use here."""


NavigationLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def navigation(entry: Any) -> list[str]:
    """The pages that a navigation of mkdocs.yml names."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in navigation(part)]


def lost_pages(root: Path) -> list[str]:
    """Pages of docs/ that its index or mkdocs.yml leave out, and those of mkdocs.yml that are not there."""
    docs = root / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.glob("**/*.md")}
    index = (docs / "index.md").read_text(encoding="utf-8")
    linked = {link.partition("#")[0] for link in links(index)} | {"index.md", LOG}
    config = yaml.load((root / "mkdocs.yml").read_text(encoding="utf-8"), NavigationLoader)
    # What stands outside of docs/ has its place on the site under repository/.
    named = {
        page for page in navigation(config["nav"]) if not (root / page.removeprefix("repository/")).is_file()
    }
    return [
        *(f"docs/index.md does not link to {page}" for page in sorted(pages - linked)),
        *(f"mkdocs.yml leaves out {page}" for page in sorted(pages - named)),
        *(f"mkdocs.yml names {page}, which is not there" for page in sorted(named - pages)),
    ]


def test_every_page_is_reached() -> None:
    assert lost_pages(ROOT) == []


def test_lost_pages_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs" / "guides").mkdir(parents=True)
    for name in ("index.md", LOG, "guides/a.md", "guides/b.md"):
        (tmp_path / "docs" / name).write_text("[b](guides/b.md)")
    (tmp_path / "CHANGELOG.md").write_text("")
    navigated = (
        "nav: [{Home: index.md}, {Guides: [{A: guides/a.md}, guides/c.md]}, LOG.md, repository/CHANGELOG.md]"
    )
    (tmp_path / "mkdocs.yml").write_text(f"{navigated}\nslugify: !!python/name:x.y\n")
    assert lost_pages(tmp_path) == [
        "docs/index.md does not link to guides/a.md",
        "mkdocs.yml leaves out guides/b.md",
        "mkdocs.yml names guides/c.md, which is not there",
    ]


def launch_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated() -> dict[Path, str]:
    """The pages that launch/docs.py makes, as it would make them now."""
    pages: dict[Path, str] = launch_module("docs").pages()
    return pages


def outdated(pages: Mapping[Path, str]) -> list[str]:
    return [path.name for path, text in pages.items() if path.read_text(encoding="utf-8") != text]


def test_generated_pages_are_up_to_date() -> None:
    assert outdated(generated()) == [], "run: python launch/docs.py"


def test_generated_pages_name_everything() -> None:
    text = "".join(generated().values())
    unnamed = [key for key in keys(Config) if f"`{key}`" not in text and f"# {key}\n" not in text]
    assert unnamed == [] and "`--num-inference-steps`" in text


def test_an_outdated_page_is_found(tmp_path: Path) -> None:
    pages = {tmp_path / "a.md": "as it was\n", tmp_path / "b.md": "as it is\n"}
    for path in pages:
        path.write_text("as it is\n")
    assert outdated(pages) == ["a.md"]


def test_docstrings_become_lists() -> None:
    for needed in ("griffe", "mkdocs"):
        pytest.importorskip(needed)
    site = launch_module("docs_site")
    text = "What it does.\n\na, b: two\n    of them.\nc: one. Other: none.\nRaises UserError.\n\nOther: text."
    assert site.as_lists(text, {"a", "b", "c"}).splitlines() == [
        "What it does.",
        "",
        "",
        "- `a`, `b`: two of them.",
        "- `c`: one. Other: none.",
        "",
        "Raises UserError.",
        "",
        "Other: text.",
    ]


def versions(root: Path) -> dict[str, str]:
    """The version as each file states it; pyproject.toml takes that of the package."""
    stated = (
        ("src/transfusion/__init__.py", "\n__version__ = "),
        ("kernels/pyproject.toml", "\nversion = "),
        ("CITATION.cff", "\nversion: "),
        ("CHANGELOG.md", "\n## "),
    )
    return {
        name: (root / name).read_text(encoding="utf-8").split(before)[1].split()[0].strip('"')
        for name, before in stated
    }


def test_one_version() -> None:
    assert len(set(versions(ROOT).values())) == 1, versions(ROOT)
    assert 'version = { attr = "transfusion.__version__" }' in (ROOT / "pyproject.toml").read_text(
        encoding="utf-8"
    )


def test_another_version_is_found(tmp_path: Path) -> None:
    for name in versions(ROOT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    changed = (tmp_path / "CITATION.cff").read_text(encoding="utf-8").replace("\nversion: ", "\nversion: 9.")
    (tmp_path / "CITATION.cff").write_text(changed, encoding="utf-8")
    assert len(set(versions(tmp_path).values())) == 2
