"""YAML files with bases, dotted overrides over them, and the same the other way: a configuration as YAML."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from transfusion.config.sections import Section
from transfusion.errors import UserError
from transfusion.urls import redacted_text


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file over those of its `base`. Raises UserError for one that cannot be read."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base files form a circle")
    values = read_yaml(path)
    bases = values.pop("base", [])
    names = [bases] if isinstance(bases, str) else bases
    merged = read_all([path.parent / base for base in names], (*seen, path.resolve()))
    _merge(merged, values)
    return merged


def read_all(paths: Sequence[Path], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of several files, later ones over earlier ones. Raises UserError as `read`."""
    merged: dict[str, Any] = {}
    for path in paths:
        _merge(merged, read(path, seen))
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of one YAML file as they stand there. Raises UserError for one that cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(
            f"cannot read config {path}: {error.strerror}; configs/train holds the ready ones"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {redacted_text(' '.join(str(error).split()))}") from None
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
        if not separator or not key:
            problems.append(f"{override!r} is not an override; write section.key=value")
            continue
        try:
            put(values, key.lstrip("-"), yaml.safe_load(text) if text else "")
        except (yaml.YAMLError, TypeError) as error:
            problems.append(f"{override!r} cannot be read: {str(error).splitlines()[0]}")
    return problems


def dump(config: Section, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


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
        text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        yield f"{indent}{name}: {text}" + (f"  # {field.description}" if field.description else "")
