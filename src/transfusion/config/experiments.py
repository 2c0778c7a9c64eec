"""Experiment files: many runs in one YAML, as a base configuration and what each cell changes in it.

    base: emoji.yaml                      a configuration, relative to this file
    bases:                                instead of its name, names for several scales: scale -> name -> configuration
      full: {0.76b: ../train/0.76b.yaml}
      small: {0.76b: small/0.76b.yaml}
    axes:                                 cells are the product of the axes; a value is a set of dotted overrides, and
                                          by `base` a configuration that goes over those before it
      model: {transfusion: {}, chameleon: {model.family: chameleon}}
      size: {s: {model.layers: 2, flops: 1.0e12}, m: {model.layers: 4, flops: 4.0e12}}
    seeds: [0, 1, 2]                      values of run.seed; default [0]
    suites: [validation]                  what `transfusion eval` measures of each cell
    classifier: classifier.safetensors    for suites that need one

`flops` in an axis value is the training budget of its cells: `train.steps` then follows from what a step costs. A cell
is named by its values: `transfusion/s`; `FILE#transfusion/s` stands wherever a configuration file may.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion.config.checking import load_values
from transfusion.config.config import Config
from transfusion.config.yaml_files import beside, put, read_all, read_yaml
from transfusion.errors import UserError

SEPARATOR = "#"
_KEYS = {"base", "bases", "axes", "seeds", "suites", "classifier"}
# Keys of an axis value that are no configuration keys.
_BASE, _FLOPS = "base", "flops"


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of a grid, for any of its seeds.

    values: axis -> value. place: in the grid, which orders its results. bases: configurations, later ones over earlier
    ones. flops: its budget, if it has one.
    """

    name: str
    values: dict[str, str]
    place: int
    bases: tuple[Path, ...]
    overrides: dict[str, Any]
    flops: float | None

    def plain(self) -> dict[str, Any]:
        """The values of its configuration, unchecked."""
        values = read_all(self.bases)
        for key, value in self.overrides.items():
            try:
                put(values, key, value)
            except TypeError as error:
                raise UserError(f"cell {self.name}: {key}: {error}") from None
        return values

    def config(self, overrides: Sequence[str] = (), *, reads_codec: bool = True) -> Config:
        """Its configuration, checked as `load_config` does. Raises UserError that lists every mistake."""
        where = f"cell {self.name}"
        return load_values(self.plain(), overrides, where=where, reads_codec=reads_codec)


@dataclass(frozen=True, slots=True)
class Grid:
    """What an experiment file holds."""

    path: Path
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    suites: tuple[str, ...]
    classifier: str

    def cell(self, name: str) -> Cell:
        """The cell of that name. Raises UserError that names all."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        names = ", ".join(cell.name for cell in self.cells)
        raise UserError(f"{self.path} has no cell {name!r}; it has {names}")


def read_grid(path: Path, *, classifier: str = "") -> Grid:
    """Read an experiment file; a classifier given here stands in for the file's.

    Raises UserError for what is missing, unknown or no override.
    """
    values = read_yaml(path)
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]} is not a key of an experiment; it may have {', '.join(sorted(_KEYS))}"
        )
    axes = values.get("axes") or {}
    _refuse_malformed(path, axes)
    bases = values.get("bases")
    if bases is not None:
        axes = {"scale": {scale: {} for scale in bases}, **axes}
    names = list(axes)
    cells = [
        _cell(path, values, dict(zip(names, chosen, strict=True)), axes, place)
        for place, chosen in enumerate(itertools.product(*axes.values()))
    ]
    return Grid(
        path=path,
        cells=tuple(cells),
        seeds=tuple(values.get("seeds") or (0,)),
        suites=tuple(values.get("suites") or ()),
        classifier=classifier or str(values.get("classifier") or ""),
    )


def read_cell(address: str) -> Cell:
    """The cell of `FILE#NAME`."""
    file, _, name = address.partition(SEPARATOR)
    return read_grid(Path(file)).cell(name)


def _refuse_malformed(path: Path, axes: Any) -> None:
    if not isinstance(axes, dict):
        raise UserError(f"{path}: axes must map names to values, not a {type(axes).__name__}")
    for axis, choices in axes.items():
        if not isinstance(choices, dict) or not choices:
            raise UserError(f"{path}: axes.{axis} must map each value to its overrides")
        for choice, overrides in choices.items():
            if overrides is not None and not isinstance(overrides, dict):
                raise UserError(
                    f"{path}: axes.{axis}.{choice} must be a set of overrides such as {{model.layers: 4}}"
                )
            for key in overrides or {}:
                if "." not in key and key not in (_BASE, _FLOPS):
                    raise UserError(
                        f"{path}: axes.{axis}.{choice}: {key} is not an override; write section.key, base or flops"
                    )


def _cell(
    path: Path, values: dict[str, Any], chosen: dict[str, str], axes: dict[str, Any], place: int
) -> Cell:
    overrides: dict[str, Any] = {}
    named = [values.get("base")]
    for axis, choice in chosen.items():
        overrides |= axes[axis][choice] or {}
        named.append(overrides.pop(_BASE, None))
    name = "/".join(map(str, chosen.values()))
    flops = overrides.pop(_FLOPS, None)
    bases = [str(base) for base in named if base is not None]
    if not bases:
        raise UserError(f"{path}: cell {name} has no base; name a configuration file with `base:`")
    if "bases" in values:
        of_scale = values["bases"][chosen["scale"]]
        for base in bases:
            if base not in of_scale:
                raise UserError(f"{path}: cell {name}: base {base!r} is none of {', '.join(of_scale)}")
        bases = [of_scale[base] for base in bases]
    return Cell(
        name=name,
        values={axis: str(choice) for axis, choice in chosen.items()},
        place=place,
        bases=tuple(beside(path, base) for base in bases),
        overrides=overrides,
        flops=None if flops is None else float(flops),
    )
