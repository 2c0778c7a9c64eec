"""A codec's training as one file: weights, averages, Adam's moments, discriminator, counters. No pickles.

<run>/checkpoints/step_00001000.safetensors    the two newest are kept
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Adam

from transfusion.config.weights_folder import stored_tensors
from transfusion.errors import UserError
from transfusion.files import atomic_file, remove_unfinished

_KEPT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimiser_tensors(prefix: str, module: nn.Module, adam: Adam) -> dict[str, Tensor]:
    """Adam's moments of a module's parameters, under `prefix/moment/NAME`; what has none yet is left out."""
    return {
        f"{prefix}/{moment}/{name}": adam.state[parameter][moment]
        for name, parameter in module.named_parameters()
        if parameter in adam.state
        for moment in _MOMENTS
    }


def load_optimiser(
    prefix: str, module: nn.Module, adam: Adam, tensors: Mapping[str, Tensor], updates: int
) -> None:
    """Inverse of `optimiser_tensors`."""
    for name, parameter in module.named_parameters():
        if f"{prefix}/{_MOMENTS[0]}/{name}" in tensors:
            moments = {
                moment: tensors[f"{prefix}/{moment}/{name}"].to(parameter, copy=True) for moment in _MOMENTS
            }
            adam.state[parameter] = {"step": torch.tensor(float(updates)), **moments}


def optimiser_shapes(prefix: str, module: nn.Module) -> dict[str, torch.Size]:
    """What `optimiser_tensors` holds once there are moments: then of all parameters."""
    return {
        f"{prefix}/{moment}/{name}": parameter.shape
        for name, parameter in module.named_parameters()
        for moment in _MOMENTS
    }


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint whole or not at all, and delete all but the two newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.safetensors"
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    remove_unfinished(folder, {path.name})
    with atomic_file(path) as partial:
        save_file(whole, partial, metadata={"facts": json.dumps({"step": step, **facts})})
    for old in _checkpoints(folder)[:-_KEPT]:
        old.unlink()
    return path


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, facts) of the newest checkpoint, None if there is none. Raises UserError for a damaged one."""
    found = _checkpoints(folder)
    if not found:
        return None
    try:
        stored_tensors(found[-1:], found[-1].stem)
        with safe_open(str(found[-1]), framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{found[-1]} is damaged ({error}); delete it to continue from the one before"
        ) from None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors"))
