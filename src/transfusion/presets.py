"""From a YAML file and dotted overrides to a `Config`, with every mistake told at once."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from transfusion import codec_folder
from transfusion.config import PROBLEM_SEPARATOR, SHARE_FORMS, Config, Section
from transfusion.errors import UserError
from transfusion.urls import redacted_text

Checked = TypeVar("Checked", bound=BaseModel)


def load(path: str | Path | None, overrides: Sequence[str] = (), *, reads_codec: bool = True) -> Config:
    """Read `path` (None: the defaults), apply `section.key=value` overrides, check everything.

    A YAML file may name another under `base:`, relative to itself; its own values win. `FILE#CELL` is a cell of an
    experiment file (see `grids`).
    reads_codec: take from codec.folder what it tells; without it the folder need not be there.
    Raises UserError with one line for each mistake.
    """
    if path is not None and "#" in str(path) and not Path(path).exists():
        # Imported here: grids are made of what this module reads.
        from transfusion import grids

        return grids.read_cell(str(path)).config(overrides, reads_codec=reads_codec)
    values = read(Path(path)) if path is not None else {}
    where = str(path) if path is not None else "the overrides"
    return load_values(values, overrides, where=where, reads_codec=reads_codec)


def load_values(
    values: dict[str, Any], overrides: Sequence[str], *, where: str, reads_codec: bool = True
) -> Config:
    """Apply overrides to plain values, which change, and check everything; see `load`."""
    problems = _override(values, overrides)
    if reads_codec and isinstance(values.get("codec"), dict):
        values["codec"] = codec_folder.completed(values["codec"], problems)
    return check(values, problems=problems, where=where)


def load_as(kind: type[Checked], path: str | Path, overrides: Sequence[str] = ()) -> Checked:
    """As `load`, for another kind of configuration."""
    values = read(Path(path))
    return check_as(kind, values, problems=_override(values, overrides), where=str(path))


def check(
    values: dict[str, Any], *, problems: Sequence[str] = (), where: str = "the configuration"
) -> Config:
    """Validate plain values into a `Config`; raises UserError that lists every problem."""
    return check_as(Config, values, problems=problems, where=where)


def check_as(
    kind: type[Checked], values: dict[str, Any], *, problems: Sequence[str] = (), where: str
) -> Checked:
    """As `check`, for another kind of configuration."""
    found = list(problems)
    values = copy.deepcopy(values)
    while True:
        try:
            config = kind.model_validate(values)
            break
        except ValidationError as error:
            mistakes = [mistake | {"loc": _place(mistake["loc"])} for mistake in error.errors()]
        found += [problem for mistake in mistakes for problem in _explain(mistake, kind)]
        # Parts are compared only once each of them is well: take out what is wrong, to hear of the rest.
        if not all(_take_out(values, mistake) for mistake in mistakes):
            break
    if len(found) == 1:
        raise UserError(redacted_text(f"{where}: {found[0]}"))
    if found:
        raise UserError(
            f"{len(found)} problems in {where}:"
            + "".join(f"\n  - {redacted_text(problem)}" for problem in found)
        )
    return config


def _override(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
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
        raise TypeError(f"{key} is no entry of a list of {len(entries)}; they are numbered from 0")
    return int(key)


def _place(location: Sequence[int | str]) -> tuple[int | str, ...]:
    """Where a mistake stands, in the words of the file."""
    return tuple(part for part in location if part not in SHARE_FORMS)


def _take_out(values: dict[str, Any], mistake: Any) -> bool:
    """Remove the value that a mistake is about; False when it is about a whole section."""
    place = mistake["loc"]
    if len(place) < 2 or mistake["type"] == "value_error":
        return False
    target: Any = values
    for key in place[:-1]:
        target = target[key] if isinstance(target, list) or key in target else {}
    if not isinstance(target, dict) or place[-1] not in target:
        return False
    del target[place[-1]]
    return True


def _explain(error: Any, kind: type[BaseModel]) -> list[str]:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        general = ".".join("0" if isinstance(part, int) else str(part) for part in error["loc"])
        near = difflib.get_close_matches(general, list(_known_keys(kind)), n=1, cutoff=0.5)
        remedy = f"; did you mean {near[0]}?" if near else "; `transfusion config` lists every key"
        return [f"{path} is not a known key{remedy}"]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message.split(PROBLEM_SEPARATOR)
    return [f"{path}: {message[0].lower()}{message[1:]}, got {error['input']!r}"]


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        # Sections, and the entries of lists such as data.sources.
        for kind, inner in ((field.annotation, ""), *((kind, "0.") for kind in get_args(field.annotation))):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _known_keys(kind, f"{prefix}{name}.{inner}")
