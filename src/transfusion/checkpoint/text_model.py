"""The text tower of a checkpoint as a LlamaForCausalLM, in a folder that transformers opens to the same logits.

config.json               that of a Llama
model.safetensors         the moving average where the run kept one, else the weights; fp32, transformers' names
tokenizer.model           and tokenizer.json, tokenizer_config.json, generation_config.json: see `hub_files`

What only images need is left out. `train.init_from` takes the folder too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transfusion.checkpoint.export import CONFIG, TOKENIZER, SavedModel, open_saved, write_export
from transfusion.checkpoint.hub_files import (
    CONTROL_IDS,
    GENERATION,
    text_generation,
    write_json,
    write_tokenizer,
)
from transfusion.checkpoint.llama import STEM, llama_name
from transfusion.checkpoint.stream import write_tensors
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.files import atomic_copy
from transfusion.parallel.parameter_shards import AVERAGE, WEIGHT
from transfusion.sequence.tokenizer import Tokenizer

FORMAT = "transfusion text model"
# Of the section `model`: without these the blocks are no Llama's. Rotary positions of text are its own, also in 2d.
_NEEDS = {"family": "transfusion", "qk_norm": False, "norm_placement": "pre"}


def export_text_model(source: str | Path, out: str | Path) -> Path:
    """Write the text tower of a run's newest checkpoint, or of one checkpoint folder, as a LlamaForCausalLM.

    Streams one tensor at a time. A former such folder at `out` is replaced once the new one is complete.

    Args:
        source: The folder of a run or of a checkpoint.
        out: The folder to write.

    Returns:
        The folder.

    Raises:
        UserError: For a network that no Llama equals, a missing or damaged checkpoint or tokenizer, and where `out`
            holds anything else.
    """
    saved = open_saved(source)
    model = saved.config.model.model_dump()
    for key, needed in _NEEDS.items():
        if model[key] != needed:
            raise UserError(
                f"{source} has no text tower that is a Llama, since model.{key}={_plain(model[key])}; export it without"
                f" --text-model, or train with model.{key}={_plain(needed)}"
            )
    pieces = Tokenizer(saved.tokenizer).vocabulary
    return write_export(out, FORMAT, lambda folder: _write(folder, saved, pieces))


def _write(folder: Path, saved: SavedModel, pieces: int) -> None:
    reader, manifest = saved.reader, saved.reader.manifest
    ours = {
        theirs: name
        for name in manifest.parameters
        if ".image_" not in name and (theirs := llama_name(name, tied=False))
    }
    shapes = {theirs: manifest.parameters[name].shape for theirs, name in ours.items()}
    read = partial(reader.read_whole, AVERAGE if AVERAGE in manifest.kinds else WEIGHT)
    write_tensors(
        folder / f"{STEM}.safetensors", shapes, lambda theirs: read(ours[theirs]), metadata={"format": "pt"}
    )
    rows = manifest.parameters["embedding.weight"].shape[0]
    write_json(folder / CONFIG, _llama_config(saved.config, rows))
    write_json(folder / GENERATION, text_generation(pieces, rows))
    atomic_copy(saved.tokenizer, folder / TOKENIZER)
    write_tokenizer(folder, saved.tokenizer, saved.config.data.sequence_length, with_bos=True)


def _llama_config(config: Config, rows: int) -> dict[str, Any]:
    model = config.model
    return {
        "format": FORMAT,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        # transformers 4 reads the first, 5 the second.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **CONTROL_IDS,
    }


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
