"""The experiment files: every cell is a configuration, and each row of the paper's tables says what that row says."""

from __future__ import annotations

from pathlib import Path

import pytest

from transfusion.config import Config
from transfusion.config.experiments import Grid, read_grid
from transfusion.config.objectives import PREDICTED

EXPERIMENTS = Path(__file__).parents[3] / "configs" / "experiments"
GRIDS = sorted(path.name for path in EXPERIMENTS.glob("*.yaml") if "axes:" in path.read_text())
SIZES = {"0.16b": 768, "0.37b": 1024, "0.76b": 1536, "1.4b": 2048, "7b": 4096}


def grid(name: str) -> Grid:
    return read_grid(EXPERIMENTS / f"{name}.yaml")


def configs(name: str, scale: str) -> dict[str, Config]:
    """Configuration of each cell of a scale, by the rest of its name."""
    found = (cell for cell in grid(name).cells if cell.values["scale"] == scale)
    return {cell.name.partition("/")[2]: cell.config(reads_codec=False) for cell in found}


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_is_a_configuration(name: str) -> None:
    cells = grid(name.removesuffix(".yaml")).cells
    found = [cell.config(reads_codec=False).as_dict() for cell in cells]
    assert len(found) > 1
    # No two cells are the same run.
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_each_table_has_its_rows() -> None:
    assert [f"table-{number}.yaml" for number in range(3, 9)] == [n for n in GRIDS if n.startswith("table")]
    rows = {name: len(configs(name, "full")) for name in (f"table-{number}" for number in range(3, 9))}
    assert rows == {"table-3": 10, "table-4": 4, "table-5": 4, "table-6": 7, "table-7": 10, "table-8": 4}
    for name in rows:
        assert configs(name, "full").keys() == configs(name, "small").keys()
    for size, width in SIZES.items():
        for cell in (f"{size}/transfusion", f"{size}/chameleon"):
            assert configs("table-3", "full")[cell].model.hidden_size == width


@pytest.mark.parametrize("scale", ["full", "small"])
def test_the_rows_say_what_the_paper_says(scale: str) -> None:
    rate = {"full": 1e-4, "small": 3e-3}[scale]
    three = configs("table-3", scale)["7b/chameleon"]
    assert (three.model.family, three.codec.kind, three.optimizer.learning_rate) == ("chameleon", "vq", rate)
    assert three.codec.codebook_size == {"full": 16_384, "small": 1024}[scale]
    four = configs("table-4", scale)
    recipe = {
        name.partition("/")[2]: (
            len(config.data.sources),
            config.model.qk_norm,
            config.model.norm_placement,
            config.train.z_loss,
            config.model.family,
        )
        for name, config in four.items()
    }
    assert recipe == {
        "llama": (1, False, "pre", 0.0, "transfusion"),
        "llama-and-diffusion": (2, False, "pre", 0.0, "transfusion"),
        "llama-stabilised": (1, True, "post", 1e-5, "transfusion"),
        "stabilised-and-image-tokens": (2, True, "post", 1e-5, "chameleon"),
    }
    rows = [config.data.global_batch_size for config in four.values()]
    assert rows[0] == rows[2] == rows[1] // 2 == rows[3] // 2
    for name, config in configs("table-5", scale).items():
        assert f"{config.model.patch_embed}/{config.model.image_attention}" == name
    six = configs("table-6", scale)
    most = {"full": 1024, "small": 64}[scale]
    assert [config.patches_per_image for config in six.values()] == [
        most // side**2 for side in (1, 2, 4, 8, 2, 4, 8)
    ]
    assert [config.model.patch_embed for config in six.values()] == ["linear"] * 4 + ["unet"] * 3
    for name, config in configs("table-7", scale).items():
        assert config.model.patch_embed == name.partition("/")[2]
    for name, config in configs("table-8", scale).items():
        cap = {"none": 0, "500": 500}[name.partition("/")[2]]
        assert (config.model.patch_embed, config.diffusion.max_timestep_before_caption) == ("unet", cap)


def test_the_emoji_grids_spend_alike() -> None:
    scaling, ablation = grid("emoji-scaling"), grid("emoji-ablation")
    assert (
        len(scaling.cells) == 6 and len(ablation.cells) == 4 and scaling.seeds == ablation.seeds == (0, 1, 2)
    )
    budgets = {cell.name: cell.flops for cell in scaling.cells}
    for size in "sml":
        assert budgets[f"transfusion/{size}"] == budgets[f"chameleon/{size}"]
    assert 8 < budgets["transfusion/l"] / budgets["transfusion/s"] < 10  # type: ignore[operator]
    assert {cell.flops for cell in ablation.cells} == {budgets["transfusion/m"]}
    position = grid("emoji-position")
    assert {cell.flops for cell in position.cells} == {budgets["transfusion/s"]}
    told = {cell.name: cell.config(reads_codec=False) for cell in position.cells}
    assert len(told) == 9 and position.seeds == (0, 1, 2)
    for name, config in told.items():
        model, kind, _ = name.split("/")
        family = "chameleon" if model == "chameleon" else "transfusion"
        assert (config.model.family, config.model.patch_position) == (family, kind)
        assert family == "chameleon" or PREDICTED[config.diffusion.prediction] == model
