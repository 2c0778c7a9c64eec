"""Starts the text tower from a Hugging Face Llama: config.json, safetensors, and where it is there its tokenizer.

Each rank reads the slices that it trains and nothing else, straight from the files into its fp32 shards. Parts that
a Llama does not have (patch encoder and decoder, places of patches) keep their drawn weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transfusion.checkpoint.llama_vocabulary import TOKENIZERS, pieces_of_folder
from transfusion.config import Config, ModelConfig
from transfusion.config.weights_folder import StoredTensor, stored_tensors, weight_files
from transfusion.errors import UserError
from transfusion.files import FINGERPRINT_BYTES, digest
from transfusion.parallel.collectives import raise_together
from transfusion.parallel.engine import Engine
from transfusion.parallel.parameter_shards import AVERAGE, WEIGHT, Shard
from transfusion.sequence.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CONFIG = "config.json"
STEM = "model"
# Keys of a rotary embedding that is not scaled.
_PLAIN_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Of the embedding, compared at once.
_ROWS = 4096
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = ("embedding.weight", "lm_head.weight")
# Ours -> theirs; rotary pairs are the same, (i, i + E/2).
OUTSIDE = {"embedding.weight": EMBEDDING, "lm_head.weight": HEAD, "norm.weight": "model.norm.weight"}
IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
# Settings of transformers' Llamas. Those that change numbers are compared, the others are of training, of generation
# or of how files are stored.
# fmt: off
LLAMA_KEYS = {
    "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
    "partial_rotary_factor", "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "torch_dtype", "use_cache", "vocab_size",
    "add_cross_attention", "architectures", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "max_sequence_length", "min_length", "model_max_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p",
    "use_bfloat16",
}
# fmt: on


def start_from_llama(folder: Path, engine: Engine, tokenizer: Tokenizer) -> None:
    """Fill the weights of `engine`, and its moving average, from the Llama in `folder`.

    Rows of embedding and head: with the Llama's tokenizer.json or tokenizer.model in the folder each of our pieces
    takes the row of the piece of the same bytes. Without either, or where tokenizer.model is ours, each number takes
    the row of the same number. Rows without a counterpart keep their drawn weights, and rows of theirs without one are
    left out. A tied head starts as the embedding, and is trained apart from it. Called by all ranks together. Raises
    UserError, on every rank: files that are missing or damaged, and a `model` section that means another network, with
    the values to set.
    """
    llama = raise_together(lambda: Llama(folder, engine.config))
    row_V = raise_together(lambda: _rows(folder, llama, engine.config.model.vocabulary, tokenizer))
    raise_together(lambda: _fill(engine.shards(), llama, row_V))
    engine.shards_written(0)
    found = int((row_V >= 0).sum())
    if engine.rank == 0 and not any((folder / name).is_file() for name in TOKENIZERS):
        log.warning(
            "%s holds no tokenizer: its row N of the embedding becomes that of piece N here, which is right only where"
            " both tokenizers number alike",
            folder,
        )
    log.info("weights of %s: %d of %d rows of the embedding are from it", folder, found, len(row_V))


class Llama:
    """The tensors of a Llama's folder, read slice by slice."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Raises UserError where the folder is no Llama that `config.model` can start from."""
        self.folder = folder
        self.settings = _read_json(folder / CONFIG)
        _refuse_other_network(folder, self.settings, config.model)
        self.tied = bool(self.settings.get("tie_word_embeddings"))
        try:
            self.tensors = stored_tensors(weight_files(folder, STEM), STEM)
        except (OSError, ValueError) as error:
            raise UserError(f"train.init_from: {folder}: {error}") from None
        self._open: dict[Path, Any] = {}
        blocks = (
            f"blocks.{layer}.{part}.weight" for layer in range(config.model.layers) for part in IN_BLOCK
        )
        wanted = {theirs for name in (*OUTSIDE, *blocks) if (theirs := llama_name(name, self.tied))}
        _refuse_other_tensors(folder, self.tensors, wanted, self.settings)
        if self.tied and HEAD in self.tensors and not self._head_is_embedding():
            raise UserError(
                f"{folder}: {CONFIG} says tie_word_embeddings=true, and {HEAD} is stored apart and differs from"
                f" {EMBEDDING}; set it to false there, or remove the tensor"
            )

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of one of their tensors, or elements of a vector; fp32 on the CPU."""
        file = self.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(file), framework="pt")
            rows: Tensor = self._open[file].get_slice(name)[start:end]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        return rows.float()

    def _head_is_embedding(self) -> bool:
        rows = self.tensors[EMBEDDING].shape[0]
        parts = [(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]
        return self.tensors[HEAD].shape == self.tensors[EMBEDDING].shape and all(
            torch.equal(self.rows(HEAD, *part), self.rows(EMBEDDING, *part)) for part in parts
        )


def _refuse_other_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor], wanted: set[str], settings: dict[str, Any]
) -> None:
    """Raise UserError unless the files hold what is wanted, and beside it only what a Llama computes anew."""
    if missing := sorted(wanted - tensors.keys()):
        raise UserError(
            f"{folder} is not a Llama: {missing[0]} is in none of its files ({len(missing)} missing)"
        )
    # A tied head may be stored too.
    left = [
        name for name in tensors if name not in wanted | {HEAD} and not name.endswith(".rotary_emb.inv_freq")
    ]
    if left:
        raise UserError(
            f"cannot start from the Llama in {folder}: this network has no place for {min(left)}"
            f" ({len(left)} such tensors)"
        )
    shape = (settings.get("vocab_size", tensors[EMBEDDING].shape[0]), settings["hidden_size"])
    for name in (EMBEDDING, HEAD):
        if name in tensors and tensors[name].shape != shape:
            raise UserError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, and {CONFIG} says {list(shape)} (vocab_size,"
                " hidden_size); copy both from one model"
            )


def _refuse_other_network(folder: Path, settings: dict[str, Any], model: ModelConfig) -> None:
    """Raise UserError, with all differences at once, where the blocks would not compute what the Llama's do."""
    problems = []
    if settings.get("model_type") != "llama":
        problems.append(f"its model_type is {settings.get('model_type')!r}, and only 'llama' can be read")
    # Up to transformers 4 under names of its own, from 5 on together.
    ropes = [settings[key] for key in ("rope_parameters", "rope_scaling") if settings.get(key)]
    for rope in ropes:
        if not isinstance(rope, dict) or rope.keys() - _PLAIN_ROPE or _type_of(rope) != "default":
            problems.append(f"its rotary embedding is scaled ({rope}), and this network's is not")
    rope = {key: value for each in reversed(ropes) if isinstance(each, dict) for key, value in each.items()}
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor") or 1) != 1:
        problems.append("its partial_rotary_factor is not 1, and this network rotates all dimensions")
    problems += _unknown(settings)
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            problems.append(f"it has {key}, and this network has no biases there")
    if settings.get("hidden_act", "silu") != "silu":
        problems.append(f"its hidden_act is {settings['hidden_act']!r}, and this network's is 'silu'")
    if model.qk_norm:
        problems.append("a Llama has no norm on queries and keys: set model.qk_norm=false")
    try:
        compared = _compared(settings, rope, model)
    except KeyError as error:
        raise UserError(f"{folder / CONFIG} is not a Llama's: {error} is missing") from None
    if wrong := [key for key, (_, there) in compared.items() if not isinstance(there, int | float)]:
        raise UserError(f"{folder / CONFIG} is not a Llama's: {wrong[0]} is not a number")
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    head_dim = settings.get("head_dim") or width // heads
    if head_dim * heads != width:
        problems.append(
            f"its heads have {head_dim} dimensions, which is not its hidden_size divided by its heads"
        )
    different = [f"{key}={there}" for key, (here, there) in compared.items() if here != there]
    if different:
        problems.append("its network has other dimensions: set " + " ".join(different))
    if problems:
        raise UserError(f"cannot start from the Llama in {folder}: " + "; ".join(problems))


def _type_of(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _unknown(settings: dict[str, Any]) -> Iterator[str]:
    """What is wrong with settings that a Llama does not have: they may change what it computes."""
    for key, value in settings.items():
        if (
            value
            and not isinstance(value, str)
            and not key.startswith(("_", "unsloth_"))
            and key not in LLAMA_KEYS
        ):
            yield f"its {CONFIG} has {key}, which a Llama does not; remove it there if it changes nothing"


def _compared(
    settings: dict[str, Any], rope: dict[str, Any], model: ModelConfig
) -> dict[str, tuple[float, Any]]:
    """By our key, our value and that of config.json: what must agree."""
    heads = settings["num_attention_heads"]
    theta = rope.get("rope_theta", settings.get("rope_theta", 10_000.0))
    return {
        "model.layers": (model.layers, settings["num_hidden_layers"]),
        "model.hidden_size": (model.hidden_size, settings["hidden_size"]),
        "model.heads": (model.heads, heads),
        "model.num_kv_heads": (model.kv_heads, settings.get("num_key_value_heads") or heads),
        "model.ffn_size": (model.ffn_width, settings["intermediate_size"]),
        "model.norm_epsilon": (model.norm_epsilon, settings.get("rms_norm_eps", 1e-6)),
        "model.rope_theta": (model.rope_theta, theta),
    }


def llama_name(name: str, tied: bool) -> str | None:
    """A Llama's name for one of our parameters; None where it has none."""
    if name in OUTSIDE:
        return EMBEDDING if tied and name == "lm_head.weight" else OUTSIDE[name]
    first, _, rest = name.partition(".")
    if first != "blocks":
        return None
    layer, _, part = rest.removesuffix(".weight").partition(".")
    # Weights that patches have of their own start as those of text do.
    part = IN_BLOCK[part.removeprefix("image_")]
    return f"model.layers.{layer}.{part}.weight"


def _rows(folder: Path, llama: Llama, vocabulary: int, tokenizer: Tokenizer) -> Tensor:
    """For each row of our vocabulary the Llama's row that it starts from, int64 [V]; -1: none."""
    theirs = llama.tensors[EMBEDDING].shape[0]
    model = folder / "tokenizer.model"
    ours = model.is_file() and digest(model.read_bytes(), FINGERPRINT_BYTES) == tokenizer.fingerprint
    pieces = None if ours else pieces_of_folder(folder)
    row_V = torch.full((vocabulary,), -1, dtype=torch.int64)
    if pieces is None:
        same = min(vocabulary, theirs)
        row_V[:same] = torch.arange(same)
        return row_V
    for number, piece in enumerate(tokenizer.piece_bytes()):
        row = pieces.get(piece, -1)
        if row < theirs:
            row_V[number] = row
    return row_V


@torch.no_grad()
def _fill(shards: list[Shard], llama: Llama, row_V: Tensor) -> None:
    for shard in shards:
        name = llama_name(shard.name, llama.tied)
        if name is None or not shard.length:
            continue
        weight = shard.values[WEIGHT]
        if shard.name in VOCABULARY:
            _fill_vocabulary(shard, weight, llama, name, row_V)
        else:
            shape = llama.tensors[name].shape
            if shape != shard.shape:
                raise UserError(f"{llama.folder}: {name} has shape {shape}, and {CONFIG} says {shard.shape}")
            width = math.prod(shard.shape[1:])
            first, last = shard.start // width, -(-(shard.start + shard.length) // width)
            rows = llama.rows(name, first, last).flatten()
            weight.copy_(rows.narrow(0, shard.start - first * width, shard.length))
        if AVERAGE in shard.values:
            shard.values[AVERAGE].copy_(weight)


def _fill_vocabulary(shard: Shard, weight: Tensor, llama: Llama, name: str, row_V: Tensor) -> None:
    """Rows in runs of consecutive ones: a whole table of the same numbers is read at once."""
    width = shard.shape[1]
    end = shard.start + shard.length
    for first, last in _runs(row_V, shard.start // width, -(-end // width)):
        values = llama.rows(name, int(row_V[first]), int(row_V[first]) + last - first).flatten()
        # A shard may begin and end within a row.
        low, high = max(first * width, shard.start), min(last * width, end)
        part = values.narrow(0, low - first * width, high - low)
        weight.narrow(0, low - shard.start, high - low).copy_(part)


def _runs(row_V: Tensor, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of our rows in [start, end) whose counterparts follow each other."""
    rows = row_V[start:end].tolist()
    first = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1 or rows[first] < 0:
            if rows[first] >= 0:
                yield start + first, start + place
            first = place


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"train.init_from: cannot read {path}: {error.strerror}; name a folder as transformers saves a Llama,"
            " with config.json and safetensors"
        ) from None
    except ValueError as error:
        raise UserError(f"train.init_from: {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"train.init_from: {path} holds no settings")
    return values
