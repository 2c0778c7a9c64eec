"""Which parameters are decayed, which go by Muon, and the one place that builds AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transfusion.config import OptimizerConfig


def parameter_groups(
    described: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Groups of AdamW: matrices, embeddings among them, are decayed. Norms, biases and gains are not.

    Matrices that go by Muon are a group of their own. `described` tells the shapes, by name, since a sharded parameter
    has lost its own. What takes no gradient is in none. A group without parameters is left out.
    """
    trained = {name: shape for name, shape in described.items() if shape.requires_grad}
    by_muon = for_muon(trained, config)
    rest = [(name, shape.dim() >= 2) for name, shape in trained.items() if name not in by_muon]
    groups = [
        {"params": [parameters[name] for name in by_muon], "weight_decay": config.weight_decay},
        {
            "params": [parameters[name] for name, is_matrix in rest if is_matrix],
            "weight_decay": config.weight_decay,
        },
        {"params": [parameters[name] for name, is_matrix in rest if not is_matrix], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def for_muon(described: Mapping[str, Tensor], config: OptimizerConfig) -> list[str]:
    """The parameters that Muon takes where it is asked for, by their shapes: the matrices of the blocks.

    Embeddings, heads, and what encodes and decodes patches stay with AdamW.
    """
    if config.name != "muon":
        return []
    return [
        name
        for name, shape in described.items()
        if name.startswith("blocks.") and shape.dim() == 2 and shape.requires_grad
    ]


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW with every setting written out; the learning rate is set anew before each step."""
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        amsgrad=False,
        maximize=False,
        capturable=False,
        fused=fused,
    )


def runs_fused(device: torch.device) -> bool:
    """Whether AdamW is one kernel there, which clips and skips without asking the host."""
    return device.type == "cuda"


def is_fused(optimizer: torch.optim.AdamW) -> bool:
    """Whether `clip_and_skip` works for it."""
    return bool(optimizer.defaults["fused"])


def clip_and_skip(optimizer: torch.optim.AdamW, norm: Tensor, max_norm: float, clip: float) -> Tensor:
    """Let the fused AdamW's next steps clip to the global norm `clip`, or do nothing where they are to be skipped.

    norm: 0-dim, of the whole gradient. Returns whether they will be skipped, 0-dim bool: the norm is not finite, or
    greater than `max_norm`. Nothing is read by the host.
    """
    skipped = ~norm.isfinite() | (norm > max_norm)
    # The names by which AdamW takes what torch.amp's scaler leaves it; gradients are divided by the scale.
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = ((norm.float() + 1e-6) / clip).clamp(min=1.0)  # type: ignore[attr-defined]
    return skipped


def create_moments(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Give AdamW its zero moments now instead of at the first step, so that they can be saved and loaded."""
    fused = is_fused(optimizer)
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            # The fused kernel counts on the device, the plain one on the host.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)


def set_updates(optimizer: torch.optim.AdamW, updates: int) -> None:
    """Tell AdamW how many updates it has made, for its bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
