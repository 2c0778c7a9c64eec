"""What the config.json of a published causal language model says, and which settings of `model` mean the same network.

Families differ in a few parts of their blocks, and in what a key means that config.json leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfusion.config import Config, ModelConfig
from transfusion.errors import UserError

CONFIG = "config.json"
_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# By the kind of scaling, what it is made of, under our names and transformers'.
_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Settings of transformers' models. Those that change numbers are compared, the others are of training, of generation
# or of how files are stored.
# fmt: off
_KEYS = {
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
# Qwen's, which may let the upper layers see a window of positions alone.
_LAYERS_SLIDE = {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalModel:
    """A family of models whose blocks are ours.

    Attributes:
        attention_bias: Whether queries, keys and values have biases, and nothing else has.
        qk_norm: Whether queries and keys have norms.
        keys: Of config.json, beside those that all have.
        defaults: What a key means that config.json leaves out, where that is not what it means in a Llama.
    """

    attention_bias: bool = False
    qk_norm: bool = False
    keys: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


# By `model_type`.
MODELS: dict[str, CausalModel] = {
    # SmolLM and SmolLM2 are Llamas too.
    "llama": CausalModel(),
    "mistral": CausalModel(
        keys=frozenset({"sliding_window"}), defaults={"sliding_window": 4096, "num_key_value_heads": 8}
    ),
    "qwen2": CausalModel(
        attention_bias=True,
        keys=frozenset(_LAYERS_SLIDE),
        defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32},
    ),
    "qwen3": CausalModel(
        qk_norm=True,
        keys=frozenset(_LAYERS_SLIDE),
        defaults={
            "sliding_window": 4096,
            "max_window_layers": 28,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
    ),
}
# What these have that the network here has not.
_REFUSED = {
    "smollm3": "some of its layers have no rotary positions (no_rope_layers)",
    "gemma": "its norms, its activation and the size of its embeddings are others",
    "gemma2": "its norms, its activation and its capped logits are others",
    "gemma3_text": "its norms, its activation and its two kinds of layers are others",
    "mixtral": "its feed-forward is a mixture of experts",
    "qwen2_moe": "its feed-forward is a mixture of experts",
    "qwen3_moe": "its feed-forward is a mixture of experts",
    "phi3": "it stores queries, keys and values as one matrix",
    "olmo2": "its norms stand elsewhere",
}


def read_settings(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json. Raises UserError where it has none."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"train.init_from: cannot read {path}: {error.strerror}; name a folder as transformers saves a causal"
            " language model, with config.json and safetensors"
        ) from None
    except ValueError as error:
        raise UserError(f"train.init_from: {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"train.init_from: {path} holds no settings")
    return values


def refuse_other_network(folder: Path, config: Config) -> dict[str, Any]:
    """Compare the model in a folder with `config.model`.

    Returns:
        The values of its config.json.

    Raises:
        UserError: With all differences at once, and each value to set, where the blocks would not compute what its do.
    """
    settings = read_settings(folder)
    name = settings.get("model_type")
    family = MODELS.get(name) if isinstance(name, str) else None
    if family is None:
        reason = f", since {_REFUSED[str(name)]}" if str(name) in _REFUSED else ""
        raise UserError(
            f"cannot start from the model in {folder}: its model_type is {name!r}, and only {_listed(MODELS)} can be"
            f" read{reason}; take a model of one of these families"
        )
    values = {**family.defaults, **settings}
    problems = list(_problems(values, family))
    rope, scaling = _rope(values, problems)
    try:
        dimensions, parts = _compared(values, family, rope, scaling, config.model)
        problems += _windows(values, config.data.sequence_length)
    except KeyError as error:
        raise UserError(f"{folder / CONFIG} is not a {name} model's: {error} is missing") from None
    both = dimensions | parts
    if wrong := [key for key, (_, there) in both.items() if not isinstance(there, int | float | str)]:
        raise UserError(f"{folder / CONFIG} is not a {name} model's: {wrong[0]} is not a number")
    for told, compared in (
        ("its network has other dimensions: set", dimensions),
        ("its network has other parts: set", parts),
    ):
        different = [f"{key}={_plain(there)}" for key, (here, there) in compared.items() if here != there]
        if different:
            problems.append(f"{told} {' '.join(different)}")
    if problems:
        raise UserError(f"cannot start from the model in {folder}: " + "; ".join(problems))
    return settings


def _problems(values: dict[str, Any], family: CausalModel) -> Iterator[str]:
    """What no setting of `model` can mean."""
    for key, value in values.items():
        # They may change what it computes.
        if (
            value
            and not isinstance(value, str)
            and not key.startswith(("_", "unsloth_"))
            and key not in _KEYS | family.keys
        ):
            yield (
                f"its {CONFIG} has {key}, which a {values['model_type']} model does not; remove it there if it changes"
                " nothing"
            )
    if values.get("attention_bias") and not family.attention_bias:
        yield "it has attention_bias, also where heads are joined, and this network has no bias there"
    if values.get("mlp_bias"):
        yield "it has mlp_bias, and this network has no biases there"
    if (values.get("hidden_act") or "silu") != "silu":
        yield f"its hidden_act is {values['hidden_act']!r}, and this network's is 'silu'"


def _rope(values: dict[str, Any], problems: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that is said about rotary positions, and the settings of `model.rope_scaling` that mean the same."""
    # Up to transformers 4 under names of its own, from 5 on together.
    ropes = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    found: list[dict[str, Any]] = []
    for rope in ropes:
        scaling = _scaling(rope)
        if scaling is None:
            problems.append(
                f"its rotary embedding is scaled ({rope}), and this network's can be so by"
                f" {_listed(_SCALINGS)} alone, with all their numbers; remove it from {CONFIG} if the weights were"
                " trained without it"
            )
        elif found and scaling != found[0]:
            problems.append(
                "its rotary embedding is scaled in two ways, in rope_parameters and in rope_scaling"
            )
        else:
            found.append(scaling)
    rope = {key: value for each in reversed(ropes) if isinstance(each, dict) for key, value in each.items()}
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1) != 1:
        problems.append("its partial_rotary_factor is not 1, and this network rotates all dimensions")
    return rope, found[0] if found else {"type": "none"}


def rope_scaling(model: ModelConfig) -> dict[str, Any]:
    """Of `model.rope_scaling` what transformers' settings of the rotary embedding say of it; empty: nothing."""
    scaling = model.rope_scaling
    names = _SCALINGS.get(scaling.type, ())
    return {"rope_type": scaling.type, **{name: getattr(scaling, name) for name in names}} if names else {}


def _scaling(rope: Any) -> dict[str, Any] | None:
    """As settings of `model.rope_scaling`; None where there are none that mean it."""
    if not isinstance(rope, dict):
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = _SCALINGS.get(kind, ()) if isinstance(kind, str) else ()
    # A linear one has no use for the original length, and some files have it.
    unused = {"original_max_position_embeddings"} if kind == "linear" else set()
    if (kind != "default" and not names) or rope.keys() - _ROPE - {*names} - unused or {*names} - rope.keys():
        return None
    return {"type": kind if names else "none", **{name: rope[name] for name in names}}


def _windows(values: dict[str, Any], length: int) -> Iterator[str]:
    """What is wrong where positions see the last few alone, which no setting here can mean."""
    window = values.get("sliding_window")
    if values["model_type"] == "llama":
        return
    if values["model_type"] != "mistral":
        kinds = values.get("layer_types") or ()
        above = values["num_hidden_layers"] > values["max_window_layers"]
        slides = "sliding_attention" in kinds if kinds else above
        if set(kinds) - {"full_attention", "sliding_attention"}:
            yield f"its layer_types are {sorted(set(kinds))}, and this network's are all full_attention"
        window = window if values.get("use_sliding_window") and slides else None
    if window is not None and window < length:
        yield (
            f"its layers see windows of {window} positions (sliding_window), and sequences have {length}: set"
            f" data.sequence_length={window} or less"
        )


def _compared(
    values: dict[str, Any],
    family: CausalModel,
    rope: dict[str, Any],
    scaling: dict[str, Any],
    model: ModelConfig,
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """By our key, our value and that of config.json: dimensions, and what blocks are made of."""
    heads, width = values["num_attention_heads"], values["hidden_size"]
    shared = width // heads if isinstance(heads, int) and isinstance(width, int) and heads else None
    head_dim = values.get("head_dim") or shared
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    dimensions = {
        "model.layers": (model.layers, values["num_hidden_layers"]),
        "model.hidden_size": (model.hidden_size, width),
        "model.heads": (model.heads, heads),
        "model.num_kv_heads": (model.kv_heads, values.get("num_key_value_heads") or heads),
        "model.head_dim": (model.head_width, head_dim),
        "model.ffn_size": (model.ffn_width, values["intermediate_size"]),
        "model.norm_epsilon": (model.norm_epsilon, values.get("rms_norm_eps", 1e-6)),
        "model.rope_theta": (model.rope_theta, theta),
    }
    if head_dim == shared and not model.head_dim:
        # Follows from the others.
        del dimensions["model.head_dim"]
    parts: dict[str, tuple[Any, Any]] = {
        "model.attention_bias": (model.attention_bias, family.attention_bias),
        "model.qk_norm": (model.qk_norm, family.qk_norm),
        "model.norm_placement": (model.norm_placement, "pre"),
    }
    if model.tie_embeddings:
        # The other way round the head starts as the embedding, and is trained apart from it.
        parts["model.tie_embeddings"] = (True, bool(values.get("tie_word_embeddings")))
    for name, value in scaling.items():
        parts[f"model.rope_scaling.{name}"] = (getattr(model.rope_scaling, name), value)
    return dimensions, parts


def _listed(names: Mapping[str, Any]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} and {last}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
