"""Grids go on over versions: a setting that came later changes no mark while it is as by default."""

from __future__ import annotations

from types import SimpleNamespace

from transfusion.config import load_config
from transfusion.scaling.grid import Job


def mark(*overrides: str) -> str:
    grid, cell = SimpleNamespace(suites=("validation",), classifier=""), SimpleNamespace(flops=0.0)
    job = Job(grid, cell, 0, None, ())  # type: ignore[arg-type]
    return job.mark(load_config(None, list(overrides)))


def test_marks_are_those_of_the_first_grids() -> None:
    # As made before the settings of `grid._LATER` were there.
    assert mark() == "2d730a1fe26b"
    changed = ("model.modality_weights=all", "diffusion.context=clean", "optimizer.ema_half_life=9")
    assert len({mark(each) for each in changed} | {mark()}) == 4
