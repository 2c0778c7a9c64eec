"""What other programs read in an exported folder, beside weights and config.json: their tokenizer and their defaults.

tokenizer.json           the tokenizer for the `tokenizers` library, where it gives the very ids of tokenizer.model;
                         of a published tokenizer a copy with its ids moved
tokenizer_config.json    what transformers needs to know of it
generation_config.json   ids of control tokens under transformers' names, and how a model generates unless it is told
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transfusion.config import Config
from transfusion.config.objectives import SAMPLERS
from transfusion.errors import UserError
from transfusion.files import atomic_copy, atomic_write_text
from transfusion.sequence.published_tokenizer import moved, read_values
from transfusion.sequence.tokenizer import JSON, MODEL, Tokenizer, file_name
from transfusion.sequence.tokenizer_json import tokenizer_json
from transfusion.tokens import CONTROL_PIECES, SpecialToken

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
CONTROL_IDS = {
    "bos_token_id": int(SpecialToken.BEGIN_DOCUMENT),
    "eos_token_id": int(SpecialToken.END_DOCUMENT),
    "pad_token_id": int(SpecialToken.PADDING),
}
# Of `Pipeline.sample` and `transfusion sample`.
GUIDANCE, STEPS = 3.0, 25
# In the words of the `tokenizers` library: as documents begin in training.
_BOS = CONTROL_PIECES[SpecialToken.BEGIN_DOCUMENT]
_BOS_AND_A = [{"SpecialToken": {"id": _BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
_BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": _BOS_AND_A,
    "pair": [*_BOS_AND_A, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {_BOS: {"id": _BOS, "ids": [CONTROL_IDS["bos_token_id"]], "tokens": [_BOS]}},
}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as a file for people to read too."""
    atomic_write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_tokenizer(folder: Path, tokenizer: Path, sequence_length: int, *, with_bos: bool = False) -> str:
    """Write the tokenizer, tokenizer.json and tokenizer_config.json. Of a published one tokenizer.json is both.

    Where the ids of a sentencepiece model would differ in tokenizer.json, a warning stands for the latter two.

    Args:
        folder: Where to.
        tokenizer: Its file.
        sequence_length: Of training, in tokens.
        with_bos: Whether <BOS> comes before each text unless a call has add_special_tokens=False.

    Returns:
        The name of the file that `Tokenizer` reads.

    Raises:
        UserError: For a published tokenizer whose ids cannot be moved.
    """
    name = file_name(tokenizer)
    if name == MODEL:
        atomic_copy(tokenizer, folder / MODEL)
        try:
            Tokenizer(tokenizer)
            described = tokenizer_json(tokenizer.read_bytes())
        except (UserError, ValueError) as error:
            log.warning("no tokenizer.json is written, since it could not equal tokenizer.model: %s", error)
            return name
    else:
        described = moved(read_values(tokenizer))
    if with_bos:
        described["post_processor"] = _BOS_FIRST
    write_json(folder / JSON, described)
    if name == JSON and Tokenizer(folder / JSON).names() != Tokenizer(tokenizer).names():
        raise UserError(
            f"{tokenizer}: its ids cannot be moved behind the control tokens; take another tokenizer"
        )
    tokens = {"pad": SpecialToken.PADDING, "bos": SpecialToken.BEGIN_DOCUMENT}
    tokens |= {"eos": SpecialToken.END_DOCUMENT, "unk": SpecialToken.UNKNOWN}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_length,
        **{f"{kind}_token": CONTROL_PIECES[token] for kind, token in tokens.items()},
        "additional_special_tokens": [
            piece for token, piece in CONTROL_PIECES.items() if token not in tokens.values()
        ],
        # A text that spells a control token is text.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return name


def image_generation(config: Config) -> dict[str, Any]:
    """generation_config.json of a whole model: how images are drawn unless a call says otherwise.

    Names are those of diffusers. size is [height, width] in pixels.
    """
    size = config.codec.sizes[0]
    image: dict[str, Any] = {
        "size": [size.height, size.width],
        "guidance_scale": GUIDANCE if config.data.caption_dropout else 1.0,
    }
    if config.codec.makes == "latents":
        image |= {"num_inference_steps": STEPS, "sampler": SAMPLERS[config.diffusion.prediction][0]}
    return {**CONTROL_IDS, "do_sample": False, "image": image}


def text_generation(pieces: int, rows: int) -> dict[str, Any]:
    """generation_config.json of a text tower: of the ids that are no text, <EOS> alone may be chosen.

    Args:
        pieces: Of the tokenizer.
        rows: Of the embedding.
    """
    silent = [int(token) for token in SpecialToken if token != SpecialToken.END_DOCUMENT]
    return {**CONTROL_IDS, "do_sample": False, "suppress_tokens": [*silent, *range(pieces, rows)]}
