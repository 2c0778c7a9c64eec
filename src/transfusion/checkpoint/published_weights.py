"""Starts the text tower from a published causal language model: config.json, safetensors and, if there, its tokenizer.

Each rank reads the slices that it trains and nothing else, straight from the files into its fp32 shards. Parts that
it does not have (patch encoder and decoder, places of patches) keep their drawn weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transfusion.checkpoint.published_models import CONFIG, refuse_other_network
from transfusion.checkpoint.published_vocabulary import TOKENIZERS, numbers_of_folder, pieces_of_folder
from transfusion.config import Config, ModelConfig
from transfusion.config.weights_folder import StoredTensor, stored_tensors, weight_files
from transfusion.errors import UserError
from transfusion.files import FINGERPRINT_BYTES, digest
from transfusion.parallel.collectives import raise_together
from transfusion.parallel.engine import Engine
from transfusion.parallel.parameter_shards import AVERAGE, WEIGHT, Shard
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.tokens import SpecialToken

log = logging.getLogger(__name__)

STEM = "model"
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
    # Of those families that have them.
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
_NORMS = ("attention.query_norm", "attention.key_norm")
_BIASED = ("attention.query", "attention.key", "attention.value")


def start_from_published(folder: Path, engine: Engine, tokenizer: Tokenizer) -> None:
    """Fill the weights of `engine`, and its moving average, from the model in `folder`.

    Rows of embedding and head: with its tokenizer.json or tokenizer.model in the folder each of our pieces takes the
    row of the piece of the same bytes. Without either, or where tokenizer.model is ours, each number takes the row of
    the same number. With a tokenizer of `sequence.published_tokenizer` rows go by the names of pieces first, and those
    of <BOS> and <EOS> are the ones that config.json names. Rows without a counterpart keep their drawn weights, and
    rows of theirs without one are left out. A tied head starts as the embedding. It is trained apart from it without
    model.tie_embeddings.

    Called by all ranks together. Raises UserError, on every rank: files that are missing or damaged, and a `model`
    section that means another network, with the values to set.
    """
    model = raise_together(lambda: PublishedModel(folder, engine.config))
    row_V = raise_together(lambda: _rows(folder, model, engine.config.model.vocabulary, tokenizer))
    raise_together(lambda: _fill(engine.shards(), model, row_V))
    engine.shards_written(0)
    if model.tied and not engine.config.model.tie_embeddings:
        log.info(
            "%s: its text head is its embedding; they start alike here and are trained apart, unless"
            " model.tie_embeddings=true",
            folder,
        )
    found = int((row_V >= 0).sum())
    if engine.rank == 0 and not any((folder / name).is_file() for name in TOKENIZERS):
        log.warning(
            "%s holds no tokenizer: its row N of the embedding becomes that of piece N%s here, which is right only"
            " where both tokenizers number alike",
            folder,
            f" + {len(SpecialToken)}" if _is_published(tokenizer) else "",
        )
    log.info("weights of %s: %d of %d rows of the embedding are from it", folder, found, len(row_V))


class PublishedModel:
    """The tensors of a causal language model's folder, read slice by slice."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Raises UserError where the folder holds no model that `config.model` can start from."""
        self.folder = folder
        self.settings = refuse_other_network(folder, config)
        self.tied = bool(self.settings.get("tie_word_embeddings"))
        try:
            self.tensors = stored_tensors(weight_files(folder, STEM), STEM)
        except (OSError, ValueError) as error:
            raise UserError(f"train.init_from: {folder}: {error}") from None
        self._open: dict[Path, Any] = {}
        wanted = {
            theirs for name in _text_weights(config.model) if (theirs := published_name(name, self.tied))
        }
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


def _text_weights(model: ModelConfig) -> Iterator[str]:
    """Our parameters that start from a file, by their names."""
    yield from (name for name in OUTSIDE if name != "lm_head.weight" or not model.tie_embeddings)
    for layer in range(model.layers):
        for part in IN_BLOCK:
            if part not in _NORMS or model.qk_norm:
                yield f"blocks.{layer}.{part}.weight"
            if part in _BIASED and model.attention_bias:
                yield f"blocks.{layer}.{part}.bias"


def _refuse_other_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor], wanted: set[str], settings: dict[str, Any]
) -> None:
    """Raise UserError unless the files hold what is wanted, and beside it only what is computed anew."""
    if missing := sorted(wanted - tensors.keys()):
        raise UserError(
            f"{folder} is not a whole {settings['model_type']} model: {missing[0]} is in none of its files"
            f" ({len(missing)} missing); copy it again"
        )
    # A tied head may be stored too.
    left = [
        name for name in tensors if name not in wanted | {HEAD} and not name.endswith(".rotary_emb.inv_freq")
    ]
    if left:
        raise UserError(
            f"cannot start from the model in {folder}: this network has no place for {min(left)}"
            f" ({len(left)} such tensors)"
        )
    shape = (settings.get("vocab_size", tensors[EMBEDDING].shape[0]), settings["hidden_size"])
    for name in (EMBEDDING, HEAD):
        if name in tensors and tensors[name].shape != shape:
            raise UserError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, and {CONFIG} says {list(shape)} (vocab_size,"
                " hidden_size); copy both from one model"
            )


def published_name(name: str, tied: bool) -> str | None:
    """A causal language model's name for one of our parameters; None where it has none."""
    if name in OUTSIDE:
        return EMBEDDING if tied and name == "lm_head.weight" else OUTSIDE[name]
    first, _, rest = name.partition(".")
    if first != "blocks":
        return None
    layer, _, part = rest.partition(".")
    part, _, kind = part.rpartition(".")
    # Weights that patches have of their own start as those of text do.
    return f"model.layers.{layer}.{IN_BLOCK[part.removeprefix('image_')]}.{kind}"


def _rows(folder: Path, model: PublishedModel, vocabulary: int, tokenizer: Tokenizer) -> Tensor:
    """For each row of our vocabulary the model's row that it starts from, int64 [V]; -1: none."""
    theirs = model.tensors[EMBEDDING].shape[0]
    if _is_published(tokenizer):
        return _rows_of_published(folder, model, vocabulary, tokenizer)
    beside = folder / "tokenizer.model"
    ours = beside.is_file() and digest(beside.read_bytes(), FINGERPRINT_BYTES) == tokenizer.fingerprint
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


def _is_published(tokenizer: Tokenizer) -> bool:
    # What stands for a tokenizer in tests has none of its own.
    return isinstance(tokenizer, Tokenizer) and tokenizer.is_published


def _rows_of_published(folder: Path, model: PublishedModel, vocabulary: int, tokenizer: Tokenizer) -> Tensor:
    """As `_rows`, for a published tokenizer: by the names of pieces, else by their bytes, else by their numbers."""
    theirs = model.tensors[EMBEDDING].shape[0]
    row_V = torch.full((vocabulary,), -1, dtype=torch.int64)
    names, numbers, spelt = tokenizer.names(), numbers_of_folder(folder) or {}, pieces_of_folder(folder)
    if numbers and all(numbers.get(name) == number for number, name in enumerate(names) if name):
        # An export of ours, also the rows that begin images of further sizes.
        same = min(vocabulary, theirs)
        row_V[:same] = torch.arange(same)
        return row_V
    controls = {
        SpecialToken.BEGIN_DOCUMENT: model.settings.get("bos_token_id"),
        SpecialToken.END_DOCUMENT: model.settings.get("eos_token_id"),
    }
    for number, (name, value) in enumerate(zip(names, tokenizer.piece_bytes(), strict=True)):
        found: list[Any] = [numbers.get(name), None if spelt is None else spelt.get(value)]
        if number < len(SpecialToken):
            # A list has all that may end an answer, and first what ends a document.
            ids = controls.get(SpecialToken(number))
            found.insert(1, ids[0] if isinstance(ids, list) and ids else ids)
        elif spelt is None:
            found = [number - len(SpecialToken)]
        row = next((row for row in found if isinstance(row, int)), -1)
        if row < theirs:
            row_V[number] = row
    return row_V


@torch.no_grad()
def _fill(shards: list[Shard], model: PublishedModel, row_V: Tensor) -> None:
    for shard in shards:
        name = published_name(shard.name, model.tied)
        if name is None or not shard.length:
            continue
        weight = shard.values[WEIGHT]
        if shard.name in VOCABULARY:
            _fill_vocabulary(shard, weight, model, name, row_V)
        else:
            shape = model.tensors[name].shape
            if shape != shard.shape:
                raise UserError(f"{model.folder}: {name} has shape {shape}, and {CONFIG} says {shard.shape}")
            width = math.prod(shard.shape[1:])
            first, last = shard.start // width, -(-(shard.start + shard.length) // width)
            rows = model.rows(name, first, last).flatten()
            weight.copy_(rows.narrow(0, shard.start - first * width, shard.length))
        if AVERAGE in shard.values:
            shard.values[AVERAGE].copy_(weight)


def _fill_vocabulary(shard: Shard, weight: Tensor, model: PublishedModel, name: str, row_V: Tensor) -> None:
    """Rows in runs of consecutive ones: a whole table of the same numbers is read at once."""
    width = shard.shape[1]
    end = shard.start + shard.length
    for first, last in _runs(row_V, shard.start // width, -(-end // width)):
        values = model.rows(name, int(row_V[first]), int(row_V[first]) + last - first).flatten()
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
