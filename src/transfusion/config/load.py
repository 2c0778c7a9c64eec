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
    """Load a configuration and check it as a whole.

    Args:
        path: A YAML file, or `FILE#CELL` for a cell of an experiment file. None takes the defaults. A YAML file may
            name others under `base:`, relative to itself. Its own values win.
        overrides: `section.key=value`, applied in order. Values are read as YAML.
        reads_codec: Fill the section `codec` from `codec.folder`. Without it the folder need not be there.

    Returns:
        The configuration, which cannot be changed.

    Raises:
        UserError: With one line for each mistake.
    """
    if path is not None and SEPARATOR in str(path) and not Path(path).exists():
        return read_cell(str(path)).config(overrides, reads_codec=reads_codec)
    values = read(Path(path)) if path is not None else {}
    where = str(path) if path is not None else "the overrides"
    return load_values(values, overrides, where=where, reads_codec=reads_codec)


def load_as(kind: type[Checked], path: str | Path, overrides: Sequence[str] = ()) -> Checked:
    """Load another kind of configuration.

    Args:
        kind: The class of the configuration.
        path: A YAML file, as for `load_config`.
        overrides: As for `load_config`.

    Raises:
        UserError: With one line for each mistake.
    """
    values = read(Path(path))
    return check_as(kind, values, problems=override(values, overrides), where=str(path))
