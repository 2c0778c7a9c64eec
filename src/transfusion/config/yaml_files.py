"""YAML files with bases, dotted overrides over them, and the same the other way: a configuration as YAML.

A plain value is what YAML 1.2 takes it for, so that 1e-4 is a number and `no` a text.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from transfusion.config.sections import Section
from transfusion.errors import UserError
from transfusion.urls import redacted_text

_TAG = "tag:yaml.org,2002:"
# Line ends to YAML 1.1, and letters to everyone else.
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_MAX_DIGITS, _MAX_DEPTH = 100, 32
# Letters of an override in a message.
_SHOWN = 200
_FORMS = {
    # Numbers that the versions of YAML read differently: 010, 0b1, 2:30.
    "doubtful": r"[-+]?0[0-9_]+|0o[0-7]+|[-+]?0b[01_]+|[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?",
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
# In PyYAML's form. None: whatever the first letter.
_RESOLVERS: dict[Any, Any] = {
    None: [(_TAG + name, re.compile(rf"(?:{form})\Z")) for name, form in _FORMS.items()]
}


class _Misread(yaml.MarkedYAMLError):
    """YAML that says one thing and means another."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        line_by_key: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # 1 and 0x1 are one key.
            value = key.value if key.tag == _TAG + "merge" else self.construct_object(key)
            if value in line_by_key:
                raise _Misread(
                    problem=f"{key.value} stands here a second time, first in line {line_by_key[value]}; join both",
                    problem_mark=key.start_mark,
                )
            line_by_key[value] = key.start_mark.line + 1
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise _Misread(problem="this number has too many digits", problem_mark=node.start_mark)
        return int(self.construct_yaml_int(node))

    def refuse_number(self, node: yaml.ScalarNode) -> None:
        raise _Misread(
            problem=f"{node.value} is read as different numbers by versions of YAML; write it in decimal digits,"
            f' or for text "{node.value}"',
            problem_mark=node.start_mark,
        )


_Loader.add_constructor(_TAG + "doubtful", _Loader.refuse_number)
_Loader.add_constructor(_TAG + "int", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    # Quotes text that either version of YAML takes for something else.
    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers | _RESOLVERS

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if _LINE_ENDS.search(text) else None
        return self.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def parse(text: str) -> Any:
    """The value of a YAML text.

    Raises ValueError for what is no YAML, has a key twice in one section, or a number that versions of YAML read
    differently.
    """
    if odd := _LINE_ENDS.search(text):
        raise ValueError(
            f'it holds U+{ord(odd[0]):04X}, which YAML takes for a line end; write it as "\\u{ord(odd[0]):04X}"'
        )
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(_told(error)) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _told(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}: {problem}"


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file over those of its `base`. Raises UserError for one that cannot be read."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base files form a circle")
    values = read_yaml(path)
    bases = values.pop("base", None)
    names = [] if bases is None else [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base must name a file or a list of files, got {bases!r}")
    merged = read_all([beside(path, base) for base in names], (*seen, path.resolve()))
    _merge(merged, values)
    return merged


def beside(path: Path, name: str) -> Path:
    """The file that a configuration file names: relative to itself, ~ being the home folder."""
    return path.parent / os.path.expanduser(name)


def read_all(paths: Sequence[Path], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of several files, later ones over earlier ones. Raises UserError as `read`."""
    merged: dict[str, Any] = {}
    for path in paths:
        _merge(merged, read(path, seen))
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of one YAML file as they stand there. Raises UserError for one that cannot be read."""
    try:
        values = parse(path.read_text(encoding="utf-8-sig")) or {}
    except OSError as error:
        raise UserError(
            f"cannot read config {path}: {error.strerror}; configs/train holds the ready ones"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {redacted_text(str(error))}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as `model:`, not a {type(values).__name__}")
    return values


def _merge(target: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, in place. Raises TypeError where the path leads through a plain value."""
    keys = key.split(".")
    target: Any = values
    for part, following in itertools.pairwise(keys):
        target = target[_number(part, target)] if isinstance(target, list) else target.setdefault(part, {})
        if not isinstance(target, dict | list):
            raise TypeError(f"{part} is a value, not a section with {following}")
    target[_number(keys[-1], target) if isinstance(target, list) else keys[-1]] = value


def _number(key: str, entries: Sequence[Any]) -> int:
    if not key.isdecimal() or int(key) >= len(entries):
        raise TypeError(f"{key} is not an entry of a list of {len(entries)}; entries are numbered from 0")
    return int(key)


def override(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply `section.key=value` overrides in place; returns what is wrong with them."""
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key or key.count(".") > _MAX_DEPTH:
            problems.append(f"{override[:_SHOWN]!r} is not an override; write section.key=value")
            continue
        try:
            put(values, key.lstrip("-"), _value(text))
        except (ValueError, TypeError) as error:
            problems.append(f"{override[:_SHOWN]!r} cannot be read: {str(error).removeprefix('line 1: ')}")
    return problems


def _value(text: str) -> Any:
    """What an override sets. Raises ValueError as `parse`, and where a part of the text would be left out."""
    if not text:
        return ""
    value = parse(text)
    node = yaml.compose(text, _Loader)
    if text[node.end_mark.index if node else 0 :].strip():
        raise ValueError("what follows # is a comment; write the value in quotes")
    return value


def dump(config: Section, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(
        yaml.dump(config.as_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def explain(config: BaseModel) -> str:
    """The whole configuration as YAML, every key with its meaning as a comment."""
    return "\n".join(_commented(config, 0))


def _commented(section: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _commented(value, depth + 1)
            continue
        plain = section.model_dump(mode="json")[name]
        text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10_000)
        text = text.removesuffix("...\n").strip()
        yield f"{indent}{name}: {text}" + (f"  # {field.description}" if field.description else "")
