"""Writes docs/reference/configuration.md and commands.md from the code: python launch/docs.py

`tests/unit/test_docs.py` compares what is committed with what this would write.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import BaseModel

from transfusion.cli import main as command_line
from transfusion.codec_train.settings import CodecTrainConfig
from transfusion.config import Config, SourceConfig
from transfusion.evaluate.suites.run import sections

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"

CONFIGURATION = """\
# Configuration

Every key of a training configuration, with its type, its default and its meaning. Look a key up here while you write
a file like those in `configs/train`.

```
transfusion config configs/train/quickstart.yaml
transfusion train configs/train/quickstart.yaml train.steps=200 data.global_batch_size=16
```

The first command checks a configuration and prints all of it. The second changes two keys for one run.

- A file holds sections, and each section holds keys. What a file does not say has the default below.
- `base: FILE` at the top of a file takes the values of another file first. The path is relative to the file.
- `section.key=value` on the command line wins over the file. The value is read as YAML.
- Plain values are those of YAML 1.2, so `1e-4` is a number. A key that stands twice in a section, and a number that
  versions of YAML read differently (`010`, `2:30`), are mistakes.
- `~` at the beginning of a path is the home folder.
- A file or folder that exists is what it is called. Other brackets, braces and stars in `shards` are patterns.
- Entries of a list are numbered from 0, as in `data.sources.0.weight=2`. The tables write `N` for the number.
- Entries of `data.validation` take the keys of `data.sources`.
- A wrong key or value ends the command with exit code 2. All mistakes are listed at once.

See also the [commands](commands.md), the [training guide](../guides/training.md) and the
[data guide](../guides/data.md).
"""

CODEC_CONFIGURATION = """\
## Codec training

`transfusion codec train` reads another configuration. It has the sections and keys below. Ready files are in
`configs/codec`, and [images](images.md) says how an autoencoder is trained.
"""

SUITES_CONFIGURATION = """\
## Evaluation suites

A file for `transfusion eval MODEL --suite FILE.yaml` has a section for each suite that is to run. Keys that it leaves
out are as below. Each key is also an override, as in `transfusion eval MODEL --suite images images.count=200`.
[Evaluation](evaluation.md) says what the suites measure. Entries of `data` take the keys of `data.sources`.
"""

COMMANDS = """\
# Commands

Every command of `transfusion`, with its arguments and options. `transfusion COMMAND --help` prints the same.

```
transfusion doctor
transfusion train configs/train/quickstart.yaml
```

Arguments are given in the order of the usage line. Options may stand anywhere after the command. `OVERRIDES` are
`section.key=value` for any key of the [configuration](configuration.md).

Training also runs under `torchrun` and `deepspeed`, see [distributed training](distributed.md):

```bash
torchrun --nproc-per-node 2 -m transfusion train configs/train/quickstart.yaml
```
"""

EXIT_CODES = """\
| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | an error in Transfusion itself |
| 2 | bad input, with one line that names the remedy |
| 3 | a check failed: `eval --check`, `data index` with too many bad samples, `doctor` |
| 69 | a lost process ended the run |
| 75 | stopped early and saved: run the same command again |
| 130 | interrupted by Ctrl-C. A training saves at the first and ends with 75 |
"""


def configuration() -> str:
    """The page of all configuration keys."""
    codec = _sections(CodecTrainConfig, level=3, before="codec train: ")
    suites = _sections(sections(), level=3, before="eval: ", known=(SourceConfig,))
    return "\n".join(
        [CONFIGURATION, *_sections(Config), CODEC_CONFIGURATION, *codec, SUITES_CONFIGURATION, *suites]
    )


def _sections(
    kind: type[BaseModel],
    defaults: object = None,
    *,
    level: int = 2,
    path: str = "",
    before: str = "",
    known: Sequence[type[BaseModel]] = (),
) -> Iterator[str]:
    """The tables of a model and of the models within; one that comes again, or is known, is not repeated."""
    schema = kind.model_json_schema(ref_template="{model}")
    rows, inner = list[tuple[str, ...]](), dict[type[BaseModel], tuple[object, int, str]]()
    for name, field in kind.model_fields.items():
        key = f"{path}{name}"
        default = getattr(defaults, name, field.get_default(call_default_factory=True))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner[field.annotation] = (default, level + bool(path), f"{key}.")
            continue
        takes = _schema_type(schema["properties"][name], schema.get("$defs", {}))
        shown = "required" if field.is_required() else _plain(default)
        rows.append((f"`{key}`", takes, shown, field.description or ""))
        for model in (entry for entry in _entries(field.annotation) if entry not in known):
            inner.setdefault(model, (None, level + 1, f"{key}.N."))
    if rows:
        prose = _prose(kind.__doc__) if path and kind.__doc__ else ""
        heading = f"{'#' * level} {before}{path.removesuffix('.') or 'general'}"
        yield "\n".join([heading, "", *([prose] if prose else []), _table("Key Type Default Meaning", rows)])
    for model, (its_defaults, below, within) in inner.items():
        yield from _sections(model, its_defaults, level=below, path=within, before=before, known=known)


def _entries(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a list holds."""
    for part in typing.get_args(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part
        else:
            yield from _entries(part)


def _plain(value: Any) -> str:
    """A default as YAML."""
    if value in ("", [], ()):
        return "empty"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def _schema_type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_schema_type(part, definitions) for part in schema[several])
    if "$ref" in schema:
        return f"{{{', '.join(definitions[schema['$ref']]['properties'])}}}"
    if "prefixItems" in schema:
        parts = [_schema_type(part, definitions) for part in schema["prefixItems"]]
        return f"[{', '.join(parts)}]"
    if schema["type"] == "array":
        return f"list of {_schema_type(schema['items'], definitions)}"
    words = {"string": "text", "boolean": "`true` or `false`"}.get(schema["type"], schema["type"])
    return words + _bounds(
        schema.get("minimum"),
        schema.get("maximum"),
        schema.get("exclusiveMinimum"),
        schema.get("exclusiveMaximum"),
    )


def _bounds(least: Any, most: Any, above: Any = None, below: Any = None) -> str:
    if most is not None and most > 1 << 30:
        most = f"2^{(most + 1).bit_length() - 1} - 1"
    if least is not None and most is not None:
        return f", {least:g} to {most}"
    signs = (("≥", least), (">", above), ("≤", most), ("<", below))
    return " and".join(f" {sign} {bound}" for sign, bound in signs if bound is not None)


def commands() -> str:
    """The page of all commands."""
    root: Any = typer.main.get_command(command_line.app)
    found = list(_commands(root, "transfusion"))
    rows = [
        (f"[`{path}`](#{path.replace(' ', '-')})", (command.help or "").splitlines()[0])
        for path, command in found
    ]
    overview = _table("Command Purpose", rows)
    return "\n".join([COMMANDS, overview, EXIT_CODES, *(_command(path, command) for path, command in found)])


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _command(path: str, command: Any) -> str:
    """A command's usage, and a table of its arguments and options."""
    hints = typing.get_type_hints(command.callback)
    usage, rows = [path], list[tuple[str, ...]]()
    for parameter in command.params:
        kind, several = _type(hints[parameter.name], parameter)
        shown = parameter.name.upper() + "..." * (several and parameter.param_type_name == "argument")
        names = [f"`{name}`" for name in parameter.opts]
        if parameter.param_type_name == "argument":
            names = [f"`{parameter.name.upper()}`"]
            usage.append(shown if parameter.required else f"[{shown}]")
        elif parameter.required:
            usage.append(f"{parameter.opts[0]} {shown}")
        default = "required" if parameter.required else ""
        if not parameter.required and parameter.default is not None and kind != "switch":
            plain = (
                " ".join(f"{part:g}" for part in parameter.default)
                if kind == "two numbers"
                else parameter.default
            )
            default = _plain(str(plain) if kind == "path" else plain)
        rows.append((", ".join(names), kind + ", several" * several, default, parameter.help or ""))
    if any(name.startswith("`-") and default != "required" for name, _, default, _ in rows):
        usage.append("[OPTIONS]")
    shown = " ".join(usage)
    table = _table("Name Type Default Meaning", rows)
    return f"## {path}\n\n{_prose(command.help)}\n```text\n{shown}\n```\n\n{table}"


def _type(hint: Any, parameter: Any) -> tuple[str, bool]:
    """(what a parameter takes, whether it takes several)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    several = typing.get_origin(hint) is list
    if several:
        (hint,) = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint)), several
    if hint == tuple[float, float]:
        return "two numbers", several
    name = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}[hint]
    return name + _bounds(parameter.min, parameter.max), several


def _prose(text: str) -> str:
    """A docstring as paragraphs. A semicolon there becomes a full stop."""
    plain = re.sub(r"\s*\n(?!\n)\s*", " ", re.sub(r"\n\s*\n\s*", "\0", text.strip())).replace("\0", "\n\n")
    return _escaped(re.sub(r"; (\w)", lambda found: f". {found[1].upper()}", plain)) + "\n"


def _table(header: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [header.split(), ["---"] * len(header.split()), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text in which nothing but code is markup."""
    parts = text.split("`")
    parts[::2] = (part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2])
    return "`".join(parts)


def pages() -> dict[Path, str]:
    """Each generated page with its text."""
    return {REFERENCE / "configuration.md": configuration(), REFERENCE / "commands.md": commands()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(REFERENCE.parents[1]))
