"""The one door to a configuration: a YAML file or a cell of an experiment, with overrides, checked as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transfusion.config.checking import Checked, check_as, load_values
from transfusion.config.config import Config
from transfusion.config.experiments import SEPARATOR, read_cell
from transfusion.config.yaml_files import override, read


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, reads_codec: bool = True
) -> Config:
    """Read `path` (None: the defaults), apply `section.key=value` overrides, check everything.

    A YAML file may name another under `base:`, relative to itself; its own values win. `FILE#CELL` is a cell of an
    experiment file (see `experiments`).
    reads_codec: take from codec.folder what it tells; without it the folder need not be there.
    Raises UserError with one line for each mistake.
    """
    if path is not None and SEPARATOR in str(path) and not Path(path).exists():
        return read_cell(str(path)).config(overrides, reads_codec=reads_codec)
    values = read(Path(path)) if path is not None else {}
    where = str(path) if path is not None else "the overrides"
    return load_values(values, overrides, where=where, reads_codec=reads_codec)


def load_as(kind: type[Checked], path: str | Path, overrides: Sequence[str] = ()) -> Checked:
    """As `load_config`, for another kind of configuration."""
    values = read(Path(path))
    return check_as(kind, values, problems=override(values, overrides), where=str(path))
