"""Experiment files: cells as the product of axes, one of them as a configuration, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from transfusion.config import load_config
from transfusion.config.experiments import read_grid
from transfusion.errors import UserError

BASE = {"model": {"layers": 2, "hidden_size": 64, "heads": 4}, "data": {"sequence_length": 512}}
GRID = {
    "base": "base.yaml",
    "axes": {
        "model": {"plain": None, "normed": {"model.qk_norm": True}},
        "size": {"s": {"model.layers": 1, "flops": 1e9}, "m": {"model.hidden_size": 128, "flops": 4.0e9}},
    },
    "seeds": [0, 3],
    "suites": ["validation"],
}


def written(folder: Path, grid: dict) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "large.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "model": {"layers": 9}}))
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def test_cells_are_the_product_of_the_axes(tmp_path: Path) -> None:
    grid = read_grid(written(tmp_path, GRID))
    assert [cell.name for cell in grid.cells] == ["plain/s", "plain/m", "normed/s", "normed/m"]
    assert grid.seeds == (0, 3) and grid.suites == ("validation",)
    cell = grid.cell("normed/m")
    assert cell.values == {"model": "normed", "size": "m"} and cell.flops == 4e9
    config = cell.config(["train.steps=7"])
    assert (config.model.qk_norm, config.model.layers, config.model.hidden_size) == (True, 2, 128)
    assert config.train.steps == 7 and config.data.sequence_length == 512


def test_a_cell_stands_wherever_a_configuration_may(tmp_path: Path) -> None:
    path = written(tmp_path, GRID)
    config = load_config(f"{path}#plain/s", ["run.seed=4"])
    assert config.model.layers == 1 and config.run.seed == 4
    odd = tmp_path / "a#b.yaml"
    odd.write_text(yaml.safe_dump(BASE))
    assert load_config(odd).model.layers == 2


def test_a_base_of_an_axis_goes_over_those_before_it(tmp_path: Path) -> None:
    axes = {"size": {"l": {"base": "large.yaml"}}, "model": {"plain": {}, "slow": {"base": "slow.yaml"}}}
    path = written(tmp_path, {"base": "base.yaml", "axes": axes})
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump({"model": {"heads": 2}, "train": {"steps": 5}}))
    plain, slow = (load_config(f"{path}#l/{name}") for name in ("plain", "slow"))
    assert (plain.model.layers, plain.model.heads) == (9, 4)
    assert (slow.model.layers, slow.model.heads, slow.train.steps) == (9, 2, 5)


def test_scales_name_a_base_for_each_size(tmp_path: Path) -> None:
    bases = {"full": {"0.76b": "large.yaml"}, "small": {"0.76b": "base.yaml"}}
    axes = {"row": {"causal": {"base": "0.76b", "model.qk_norm": True}}}
    grid = read_grid(written(tmp_path, {"bases": bases, "axes": axes}))
    assert [cell.name for cell in grid.cells] == ["full/causal", "small/causal"]
    assert [cell.config().model.layers for cell in grid.cells] == [9, 2]
    assert all(cell.config().model.qk_norm for cell in grid.cells)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis": {}}, "axis is not a key"),
        ({"axes": {"a": {"x": {"layers": 2}}}}, "axes.a.x: layers is not an override"),
        ({"axes": {"a": [1, 2]}}, "axes.a must map"),
        ({"axes": {"a": {"x": 3}}}, "axes.a.x must be a set of overrides"),
        ({"axes": {"a": {}}}, "axes.a must map"),
        ({"base": None}, "has no base"),
        ({"bases": {"full": {"s": "base.yaml"}}}, "base 'base.yaml' is none of s"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_grid(written(tmp_path, GRID | changes))


def test_mistakes_in_a_cell_name_the_cell(tmp_path: Path) -> None:
    axes = {"a": {"x": {"model.layer": 2}, "y": {"model.layers.deep": 2}}}
    path = written(tmp_path, {"base": "base.yaml", "axes": axes})
    with pytest.raises(UserError, match=r"cell x.*did you mean model.layers"):
        load_config(f"{path}#x")
    with pytest.raises(UserError, match=r"cell y: model.layers.deep"):
        load_config(f"{path}#y")
    with pytest.raises(UserError, match="has no cell 'z'; it has x, y"):
        load_config(f"{path}#z")
