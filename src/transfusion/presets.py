"""From a YAML file and dotted overrides to a `Config`, with every mistake told at once."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from transfusion.config import Config
from transfusion.errors import UserError


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: the defaults), apply `section.key=value` overrides, check everything.

    A YAML file may name another under `base:`, relative to itself; its own values win.
    Raises UserError with one line for each mistake.
    """
    values = _read(Path(path)) if path is not None else {}
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            problems.append(f"{override!r} is not an override; write section.key=value")
            continue
        try:
            _put(values, key.lstrip("-").split("."), yaml.safe_load(text) if text else "")
        except (yaml.YAMLError, TypeError) as error:
            problems.append(f"{override!r} cannot be read: {str(error).splitlines()[0]}")
    return check(values, problems=problems, where=str(path) if path is not None else "the overrides")


def check(
    values: dict[str, Any], *, problems: Sequence[str] = (), where: str = "the configuration"
) -> Config:
    """Validate plain values into a `Config`; raises UserError that lists every problem."""
    found = list(problems)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found += [_explain(item) for item in error.errors()]
    if found:
        if len(found) == 1:
            raise UserError(f"{where}: {found[0]}")
        raise UserError(
            f"{len(found)} problems in {where}:" + "".join(f"\n  - {problem}" for problem in found)
        )
    return config


def fingerprint(values: Any) -> str:
    """Twelve hex digits that change whenever one of the plain values does."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def dump(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def explain(config: Config) -> str:
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


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: base files form a circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(
            f"cannot read config {path}: {error.strerror}; configs/train holds the ready ones"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as `model:`, not a {type(values).__name__}")
    bases = values.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(merged, _read(path.parent / base, (*seen, path.resolve())))
    _merge(merged, values)
    return merged


def _merge(target: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise TypeError(f"{key} is a value, not a section")
    values[keys[-1]] = value


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, list(_known_keys(Config)), n=1, cutoff=0.5)
        remedy = f"; did you mean {near[0]}?" if near else "; `transfusion config` lists every key"
        return f"{path} is not a known key{remedy}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{path}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")
