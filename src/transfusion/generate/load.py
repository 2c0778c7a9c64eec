"""The network of an exported folder, on a device, ready to generate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from transfusion.checkpoint.export import ModelFolder
from transfusion.errors import UserError
from transfusion.families.build import family_of
from transfusion.model.backbone import Backbone
from transfusion.sequence.tokenizer import Tokenizer

Weights = Literal["auto", "raw", "ema"]


def load_model(found: ModelFolder, weights: Weights, tokenizer: Tokenizer, device: torch.device) -> Backbone:
    """The network, for inference only: on CUDA in the precision it was trained in, elsewhere in fp32.

    Raises UserError where the folder's files do not belong together.
    """
    path = _weight_file(found, weights)
    vocabulary = found.config.model.vocabulary
    config = found.config.with_vocabulary(tokenizer.vocabulary)
    if vocabulary and config.model.vocabulary > vocabulary:
        raise UserError(
            f"{found.tokenizer} has {tokenizer.vocabulary} pieces, its model has {vocabulary}; export again"
        )
    with torch.device("meta"):
        model = family_of(config).network(config.model, config.codec)
    try:
        model.load_state_dict(load_file(path), assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not match config.json: {reason}; export again") from None
    half = device.type == "cuda" and found.config.train.precision == "bf16"
    return model.to(device, torch.bfloat16 if half else torch.float32).eval().requires_grad_(False)


def _weight_file(found: ModelFolder, weights: Weights) -> Path:
    files = {"auto": found.preferred, "raw": found.weights, "ema": found.average}
    if weights not in files:
        raise UserError(f"weights {weights!r} do not exist; choose auto, raw or ema")
    path = files[weights]
    if path is None:
        raise UserError(
            f"{found.weights.parent} holds no averaged weights (the run had optimizer.ema_decay=0);"
            " use the raw ones"
        )
    return path
