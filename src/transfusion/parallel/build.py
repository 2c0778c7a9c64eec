"""Builds the engine that a configuration names, or says why it cannot run here."""

from __future__ import annotations

import torch

from transfusion.codec import Codec
from transfusion.config import Config, ModelConfig
from transfusion.errors import UserError
from transfusion.families.build import compute_dtype
from transfusion.parallel.collectives import raise_together
from transfusion.parallel.deepspeed_patches import import_deepspeed
from transfusion.parallel.engine import Engine
from transfusion.parallel.environment import Environment
from transfusion.parallel.ulysses import refuse_unshared
from transfusion_kernels import dispatch


def build_engine(config: Config, environment: Environment, codec: Codec | None = None) -> Engine:
    """The engine that `train.engine` names, with freshly initialised weights.

    auto: ZeRO with more than one process or on a GPU, else local. `config.model.vocabulary` must be set.
    codec: of the images; None: their pixels.
    Called by all ranks together. Raises UserError on every rank, before anything is built: for the local
    engine in several processes, ZeRO without DeepSpeed, rows that the processes cannot share, and an attention that
    cannot run here.
    """
    kind = config.train.engine
    if kind == "auto":
        kind = "zero" if environment.world_size > 1 or environment.device.type == "cuda" else "local"
    raise_together(lambda: refuse_unshared(config, environment.world_size))
    raise_together(lambda: _refuse_attention(config, environment.device))
    if kind == "local":
        if environment.world_size > 1:
            raise UserError(
                f"train.engine=local runs in one process, but {environment.world_size} were started; "
                "use train.engine=zero, or start a single process"
            )
        from transfusion.parallel.local import LocalEngine

        return LocalEngine(config, environment, codec)
    from transfusion.parallel.zero import ZeroEngine

    # Building it takes collectives, which a rank without DeepSpeed would never join.
    raise_together(import_deepspeed)
    return ZeroEngine(config, environment, codec)


def _head_width(model: ModelConfig) -> str:
    """Which settings make the width of a head."""
    if model.head_dim:
        return f"model.head_dim {model.head_dim}"
    return f"model.hidden_size {model.hidden_size} / model.heads {model.heads}"


def _refuse_attention(config: Config, device: torch.device) -> None:
    """Raise UserError where the attention asked for cannot run, or a GPU would silently use the dense one."""
    model, asked = config.model, config.train.attention
    dtype = compute_dtype(config)
    query = torch.empty(1, model.heads, 1, model.head_width, device=device, dtype=dtype)
    try:
        choice = dispatch.choose(asked, query)
    except ValueError as error:
        raise UserError(
            f"train.attention={asked} cannot run on {device.type}: {error}; set train.attention=auto"
        ) from None
    fell_back = asked == "auto" and dispatch.ENVIRONMENT_VARIABLE not in choice.reason
    if device.type == "cuda" and choice.implementation == "reference" and fell_back:
        raise UserError(
            f"attention on this GPU would be the dense reference, since {choice.reason}; head_dim is "
            f"{_head_width(model)}; train.attention=reference asks for it"
        )
