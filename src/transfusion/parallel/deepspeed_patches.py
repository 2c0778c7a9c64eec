"""What is replaced in DeepSpeed, and the one place that imports it.

The engine reads fields that DeepSpeed does not document, and some of its functions are exchanged for the length of a
step. So a version that they were not written for is refused before anything is built.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transfusion.errors import UserError
from transfusion.optim import groups

FIRST_VERSION, VERSION_AFTER = (0, 19, 8), (0, 20)
REQUIREMENT = "deepspeed>=0.19.8,<0.20"
_REMEDY = f"DS_BUILD_OPS=0 pip install '{REQUIREMENT}', or set train.engine=local"


def fits(version: str) -> bool:
    """Whether the engine was written for this version of DeepSpeed."""
    return FIRST_VERSION <= tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < VERSION_AFTER


def import_deepspeed() -> Any:
    """DeepSpeed, quiet and without anything to compile at its start.

    Raises UserError where it is missing, or of a version that the engine and these functions were not written for.
    """
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"train.engine=zero needs DeepSpeed ({error}): {_REMEDY}") from None
    finally:
        logging.disable(former)
    if not fits(deepspeed.__version__):
        raise UserError(
            f"train.engine=zero was written for {REQUIREMENT} and would misread version {deepspeed.__version__}:"
            f" {_REMEDY}"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by their former names; nobody who trains can change that.
    renamed = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    # DeepSpeed would compile this CPU operator for a minute, and a killed compilation blocks all later ones;
    # without it collectives go through gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def clip_and_skip_on_device(zero: Any, adamw: torch.optim.AdamW, largest: float) -> Iterator[list[Tensor]]:
    """Have DeepSpeed's step of stage 3 clip and skip inside of AdamW, without reading the norm.

    Yields a list that holds the norm and whether the step was skipped, once it was made.
    """
    home = sys.modules[type(zero).__module__]
    original, decided = home.is_invalid_grad_norm, []

    def norms() -> list[Tensor]:
        # As DeepSpeed's own, but that one copies a constant to the device for each group, which waits for it.
        squares = [
            torch.stack([norm.double() for norm in torch._foreach_norm(gradients)]).square().sum()
            for gradients in zero.averaged_gradients.values()
        ]
        total = torch.stack(squares)
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        norm = total.sum().sqrt()
        decided.extend([norm, groups.clip_and_skip(adamw, norm, largest, zero.clip_grad)])
        return [norm]

    home.is_invalid_grad_norm = lambda norm: False  # type: ignore[attr-defined]
    zero._get_norm_groups, zero.unscale_and_clip_grads = norms, lambda group, norm: None
    try:
        yield decided
    finally:
        home.is_invalid_grad_norm = original  # type: ignore[attr-defined]
        del zero._get_norm_groups, zero.unscale_and_clip_grads


@contextmanager
def refuse_norms_above(zero: Any, largest: float) -> Iterator[list[float]]:
    """Make DeepSpeed refuse a gradient norm above `largest` as it refuses one that is not finite.

    It has no setting for that. Yields a list, which holds the norm that was refused, if one was.
    """
    refused: list[float] = []
    # Stages and dtypes have optimisers of their own; each asks this function of its module.
    home = sys.modules[type(zero).__module__]
    original = home.is_invalid_grad_norm

    def is_invalid(norm: Any) -> bool:
        if original(norm):
            return True
        if float(norm) > largest:
            refused.append(float(norm))
        return bool(refused)

    home.is_invalid_grad_norm = is_invalid  # type: ignore[attr-defined]
    try:
        yield refused
    finally:
        home.is_invalid_grad_norm = original  # type: ignore[attr-defined]
