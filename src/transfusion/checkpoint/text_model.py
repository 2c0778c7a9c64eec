"""The text tower of a checkpoint as a causal language model, in a folder that transformers opens to the same logits.

config.json               that of a Llama, with model.attention_bias of a Qwen2, with model.qk_norm of a Qwen3
model.safetensors         the moving average where the run kept one, else the weights; fp32, transformers' names
tokenizer.model           and tokenizer.json, tokenizer_config.json, generation_config.json: see `hub_files`

What only images need is left out. `train.init_from` takes the folder too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transfusion.checkpoint.export import CONFIG, SavedModel, open_saved, write_export
from transfusion.checkpoint.hub_files import (
    CONTROL_IDS,
    GENERATION,
    text_generation,
    write_json,
    write_tokenizer,
)
from transfusion.checkpoint.published_models import MODELS, CausalModel, rope_scaling
from transfusion.checkpoint.published_weights import STEM, published_name
from transfusion.checkpoint.stream import write_tensors
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.parallel.parameter_shards import AVERAGE, WEIGHT
from transfusion.sequence.tokenizer import Tokenizer

FORMAT = "transfusion text model"
# Of the section `model`: without these no family has such blocks. Rotary positions of text are theirs, also in 2d.
_NEEDS = {"family": "transfusion", "norm_placement": "pre"}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def export_text_model(source: str | Path, out: str | Path) -> Path:
    """Write the text tower of a run's newest checkpoint, or of one checkpoint folder, as a model of transformers.

    Streams one tensor at a time. A former such folder at `out` is replaced once the new one is complete.

    Args:
        source: The folder of a run or of a checkpoint.
        out: The folder to write.

    Returns:
        The folder.

    Raises:
        UserError: For a network that none of its families equals, a missing or damaged checkpoint or tokenizer, and
            where `out` holds anything else.
    """
    saved = open_saved(source)
    model = saved.config.model.model_dump()
    for key, needed in _NEEDS.items():
        if model[key] != needed:
            raise UserError(
                f"{source} has no text tower that transformers knows, since model.{key}={_plain(model[key])}; export"
                f" it without --text-model, or train with model.{key}={_plain(needed)}"
            )
    if model["attention_bias"] and model["qk_norm"]:
        raise UserError(
            f"{source} has no text tower that transformers knows, since model.attention_bias=true and"
            " model.qk_norm=true; export it without --text-model, or train with one of them"
        )
    pieces = Tokenizer(saved.tokenizer).vocabulary
    return write_export(out, FORMAT, lambda folder: _write(folder, saved, pieces))


def _write(folder: Path, saved: SavedModel, pieces: int) -> None:
    reader, manifest = saved.reader, saved.reader.manifest
    ours = {
        theirs: name
        for name in manifest.parameters
        if ".image_" not in name and (theirs := published_name(name, tied=False))
    }
    shapes = {theirs: manifest.parameters[name].shape for theirs, name in ours.items()}
    read = partial(reader.read_whole, AVERAGE if AVERAGE in manifest.kinds else WEIGHT)
    write_tensors(
        folder / f"{STEM}.safetensors", shapes, lambda theirs: read(ours[theirs]), metadata={"format": "pt"}
    )
    rows = manifest.parameters["embedding.weight"].shape[0]
    write_json(folder / CONFIG, _causal_config(saved.config, rows))
    write_json(folder / GENERATION, text_generation(pieces, rows))
    write_tokenizer(folder, saved.tokenizer, saved.config.data.sequence_length, with_bos=True)


def _causal_config(config: Config, rows: int) -> dict[str, Any]:
    model = config.model
    family = next(
        name for name, each in MODELS.items() if _parts(each) == (model.attention_bias, model.qk_norm)
    )
    rope = {"rope_type": "default", "rope_theta": model.rope_theta} | rope_scaling(model)
    return {
        "format": FORMAT,
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": rows,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        # transformers 4 reads the first two, 5 the third.
        "rope_theta": model.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": rope,
        "attention_bias": model.attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": "float32",
        **CONTROL_IDS,
    }


def _parts(family: CausalModel) -> tuple[bool, bool]:
    return family.attention_bias, family.qk_norm


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
