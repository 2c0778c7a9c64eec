"""The paper's runs: its sizes, its batch, its optimiser, and heads that tell what the plan predicts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from transfusion.config import Config, OptimizerConfig, load_config
from transfusion.families.build import count_parameters
from transfusion.plan import make_plan

CONFIGS = Path(__file__).parents[3] / "configs" / "train"
# Of the Llama with 32,000 untied embeddings, in millions, and what the linear encoder and decoder add (table 7), in %.
SIZES = {
    "0.16b": (162.4, 0.5),
    "0.37b": (373.8, 0.4),
    "0.76b": (777.8, 0.4),
    "1.4b": (1364, 0.4),
    "7b": (6738, 0.3),
}
RUNS = (*SIZES, "7b-2t")
HEAD = re.compile(
    r"# Time: +(\S.*) on (\d+) (H\d+|A\d+) \(([\d,]+) GPU-hours\), ([\d,]+) tokens/s;"
    r" memory ([\d.]+) GiB a GPU \(predicted"
)


def config_of(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", reads_codec=False)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_papers(name: str) -> None:
    config = config_of(name)
    parts = count_parameters(config.model, config.codec)
    patch_embed = parts["patch_encoder"] + parts["patch_decoder"]
    llama = parts["total"] - patch_embed
    millions, percent = SIZES[name]
    assert llama == pytest.approx(1e6 * millions, rel=3e-4)
    assert round(100 * patch_embed / llama, 1) == percent


def test_the_u_net_adds_what_the_papers_does() -> None:
    config = config_of("7b-2t")
    parts = count_parameters(config.model, config.codec)
    assert parts["patch_encoder"] + parts["patch_decoder"] == pytest.approx(0.27e9, rel=0.05)
    assert parts["total"] == pytest.approx(7.0e9, rel=0.01)


@pytest.mark.parametrize("name", RUNS)
def test_the_recipe_is_the_papers(name: str) -> None:
    config = config_of(name)
    assert config.optimizer == OptimizerConfig(), "whose defaults are the paper's, see tests/unit/config"
    assert config.data.sequence_length == 4096 and config.patches_per_image == 256
    assert config.codec.latent_shape(*config.codec.sizes[0].sides) == (8, 32, 32)
    tokens, steps = (2**22, 500_000) if name == "7b-2t" else (2**21, 250_000)
    assert (
        config.data.sequence_length * config.data.global_batch_size == tokens and config.train.steps == steps
    )
    assert [source.weight for source in config.data.sources] == [0.5, 0.5]
    assert config.diffusion.image_loss_weight == 5.0 and config.diffusion.steps == 1000


@pytest.mark.parametrize("name", RUNS)
def test_the_head_tells_what_the_plan_predicts(name: str) -> None:
    """To 3 %: what the network keeps for its backward pass may move a little without the heads being written anew."""
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    found = HEAD.search(text)
    assert found, "a line `# Time:` as the other configs have it"
    _, gpus, gpu, gpu_hours, tokens, memory = found.groups()
    plan = make_plan(config_of(name), int(gpus), gpu.lower())
    assert plan.fits
    assert float(gpu_hours.replace(",", "")) == pytest.approx(plan.gpu_hours, rel=0.03)
    assert float(tokens.replace(",", "")) == pytest.approx(plan.tokens_per_second, rel=0.03)
    assert float(memory) == pytest.approx(plan.memory.total / 2**30, rel=0.03)
