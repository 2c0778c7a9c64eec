"""The network of an exported folder, on a device, ready to generate."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from transfusion.checkpoint.export import EXPORT_AGAIN, ModelFolder
from transfusion.config.weights_folder import check_tensors, stored_tensors
from transfusion.errors import UserError
from transfusion.families.build import network_of
from transfusion.generate.recipe import Origin, StoredDtype
from transfusion.inference.int8 import keep_int8, quantise
from transfusion.model.backbone import Backbone
from transfusion.sequence.tokenizer import Tokenizer

Weights = Literal["auto", "raw", "ema"]
Dtype = Literal["auto", "float32", "bfloat16", "int8"]


def load_model(
    found: ModelFolder, weights: Weights, tokenizer: Tokenizer, device: torch.device, dtype: Dtype = "auto"
) -> tuple[Backbone, Origin]:
    """The network, for inference only, and which weights it has.

    dtype: "auto" is on CUDA the precision it was trained in, elsewhere fp32. With "int8" the matrices are int8 and
    all else is as with "auto".

    Raises UserError where the folder's files do not belong together, and for a tensor that is missing, left over, of
    another shape or not of floating point, by its name.
    """
    precision = _precision(found, device, dtype)
    path = _weight_file(found, weights)
    vocabulary = found.config.model.vocabulary
    config = found.config.with_vocabulary(tokenizer.vocabulary)
    if vocabulary and config.model.vocabulary > vocabulary:
        raise UserError(
            f"{found.tokenizer} has {tokenizer.vocabulary} pieces, its model has {vocabulary}; {EXPORT_AGAIN}"
        )
    with torch.device("meta"):
        model = network_of(config)
    try:
        stored = stored_tensors([path], path.stem)
        check_tensors(
            {name: tensor.shape for name, tensor in stored.items()},
            {name: tensor.shape for name, tensor in model.state_dict().items()},
        )
        if dtype == "int8":
            _load_int8(model.to(precision), path, stored, device)
        else:
            model.load_state_dict(load_file(path), assign=True)
            if model.lm_head.is_tied:
                # It still has the former weight.
                model.lm_head.weight = model.embedding.weight
            model.to(device, precision)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} does not match config.json: {error}; {EXPORT_AGAIN}") from None
    kept: StoredDtype = "bfloat16" if precision == torch.bfloat16 else "float32"
    origin = Origin(
        model=found.export_id,
        weights="ema" if path == found.average else "raw",
        dtype="int8" if dtype == "int8" else kept,
    )
    return model.eval().requires_grad_(False), origin


def _precision(found: ModelFolder, device: torch.device, dtype: Dtype) -> torch.dtype:
    """Of all that is floating point."""
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype {dtype!r} does not exist; choose auto, float32, bfloat16 or int8")
    half = device.type == "cuda" and found.config.train.precision == "bf16"
    if dtype == "bfloat16" or (half and dtype != "float32"):
        return torch.bfloat16
    return torch.float32


def _load_int8(model: Backbone, path: Path, names: Iterable[str], device: torch.device) -> None:
    """Fill a network on meta with int8 matrices, one tensor of the file in memory at a time."""
    int8_names = keep_int8(model)
    state = model.to_empty(device=device).state_dict()
    for name in names:
        # Opened anew for each tensor. The pages of those read before would stay mapped.
        with safe_open(str(path), framework="pt") as opened:
            tensor = opened.get_tensor(name)
        if name not in int8_names:
            state[name].copy_(tensor)
            continue
        try:
            quantise(tensor, state[name], state[f"{name.removesuffix('.weight')}.scale"])
        except ValueError as error:
            raise UserError(
                f"{path} cannot be opened as int8: {name}: {error}; export an earlier checkpoint"
            ) from None


def _weight_file(found: ModelFolder, weights: Weights) -> Path:
    files = {"auto": found.preferred, "raw": found.weights, "ema": found.average}
    if weights not in files:
        raise UserError(f"weights {weights!r} do not exist; choose auto, raw or ema")
    path = files[weights]
    if path is None:
        raise UserError(
            f"{found.weights.parent} holds no averaged weights (the run had none, see optimizer.ema_decay);"
            " use the raw ones"
        )
    return path
