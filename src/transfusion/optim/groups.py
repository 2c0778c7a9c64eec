"""Which parameters are decayed, and the one place that builds AdamW, and Muon beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transfusion.config import OptimizerConfig


def parameter_groups(
    described: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices, embeddings among them, are decayed. Norms, biases and gains are not.

    `described` tells the shapes, by name, since a sharded parameter has lost its own. What takes no gradient is in
    none. A group without parameters is left out.
    """
    trained = {name: shape for name, shape in described.items() if shape.requires_grad}
    matrices = [parameters[name] for name, shape in trained.items() if shape.dim() >= 2]
    others = [parameters[name] for name, shape in trained.items() if shape.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def muon(matrices: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Muon | None:
    """Muon for the matrices of the blocks (Jordan et al., 2024), where the configuration asks for it.

    Its updates have the size of AdamW's (Liu et al., 2025, section 2.2), so that both go by one learning rate.
    """
    if config.name != "muon":
        return None
    chosen = [parameter for name, parameter in matrices.items() if is_for_muon(name, parameter)]
    return torch.optim.Muon(
        chosen,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.betas[1],
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )


def is_for_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: embeddings, heads, and what encodes and decodes patches stay with AdamW."""
    return name.startswith("blocks.") and parameter.dim() == 2 and parameter.requires_grad


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


def create_moments(
    optimizer: torch.optim.AdamW, parameters: Iterable[Tensor], muon: torch.optim.Muon | None = None
) -> None:
    """Give AdamW its zero moments now instead of at the first step, so that they can be saved and loaded.

    Muon's momentum stands beside them as a first moment without a second.
    """
    fused = is_fused(optimizer)
    of_muon = {id(matrix) for group in (muon.param_groups if muon else ()) for matrix in group["params"]}
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            # The fused kernel counts on the device, the plain one on the host.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            if muon and id(parameter) in of_muon:
                muon.state[parameter]["momentum_buffer"] = state["exp_avg"]
            else:
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)


def set_updates(optimizer: torch.optim.AdamW, updates: int) -> None:
    """Tell AdamW how many updates it has made, for its bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
