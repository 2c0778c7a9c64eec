"""The network of an exported folder, on a device, ready to generate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from transfusion.checkpoint.export import EXPORT_AGAIN, ModelFolder
from transfusion.config.weights_folder import check_tensors, stored_tensors
from transfusion.errors import UserError
from transfusion.families.build import family_of
from transfusion.model.backbone import Backbone
from transfusion.sequence.tokenizer import Tokenizer

Weights = Literal["auto", "raw", "ema"]


def load_model(found: ModelFolder, weights: Weights, tokenizer: Tokenizer, device: torch.device) -> Backbone:
    """The network, for inference only: on CUDA in the precision it was trained in, elsewhere in fp32.

    Raises UserError where the folder's files do not belong together, and for a tensor that is missing, left over, of
    another shape or not of floating point, by its name.
    """
    path = _weight_file(found, weights)
    vocabulary = found.config.model.vocabulary
    config = found.config.with_vocabulary(tokenizer.vocabulary)
    if vocabulary and config.model.vocabulary > vocabulary:
        raise UserError(
            f"{found.tokenizer} has {tokenizer.vocabulary} pieces, its model has {vocabulary}; {EXPORT_AGAIN}"
        )
    with torch.device("meta"):
        model = family_of(config).network(config.model, config.codec)
    try:
        stored = stored_tensors([path], path.stem)
        check_tensors(
            {name: tensor.shape for name, tensor in stored.items()},
            {name: tensor.shape for name, tensor in model.state_dict().items()},
        )
        model.load_state_dict(load_file(path), assign=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} does not match config.json: {error}; {EXPORT_AGAIN}") from None
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
