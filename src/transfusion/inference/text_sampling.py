"""Language mode: which token comes next.

R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.diffusion.noise import counter_normal
from transfusion.errors import UserError
from transfusion.schema import SpecialToken

# Keeps the draws of text apart from those of images, whose streams are the steps of a sampler.
TEXT_STREAM = 1 << 20
# Bits of a text key that number the token.
_TOKEN_BITS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSampling:
    """How text is chosen. temperature 0 takes the likeliest token; top_p keeps the likeliest tokens whose
    probabilities reach it together."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def check(sampling: TextSampling) -> None:
    """Raise UserError for settings out of range."""
    if not math.isfinite(sampling.temperature) or sampling.temperature < 0:
        raise UserError(f"temperature {sampling.temperature} must be a number of at least 0; 0 is greedy")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p {sampling.top_p} must lie in (0, 1]; 1 keeps every token")


def mask_logits(
    logit_RV: Tensor, vocabulary: int, begins_K: Sequence[int], image_allowed_RK: Tensor
) -> Tensor:
    """Logits with minus infinity for what cannot stand next.

    Of the control tokens only <EOS> may be chosen, and those that begin images where image_allowed_RK (bool) says so;
    other ids from `vocabulary` on are rows of the embedding that no text uses.
    """
    forbidden_RV = torch.zeros(logit_RV.shape, dtype=torch.bool, device=logit_RV.device)
    forbidden_RV[:, : len(SpecialToken)] = True
    forbidden_RV[:, vocabulary:] = True
    forbidden_RV[:, SpecialToken.END_DOCUMENT] = False
    forbidden_RV[:, list(begins_K)] = ~image_allowed_RK
    return logit_RV.masked_fill(forbidden_RV, -math.inf)


def sample_token(
    logit_RV: Tensor, sampling: TextSampling, row_R: Sequence[int], index_R: Sequence[int]
) -> Tensor:
    """The next token of each row, int64 [R].

    row_R: the row's number in the request; index_R: how many tokens it has chosen before. The draw depends on
    seed + row and that number alone, not on which other rows share the batch.
    """
    if sampling.temperature == 0:
        return logit_RV.argmax(-1)
    probability_RV = (logit_RV / sampling.temperature).softmax(-1)
    probability_RV, token_RV = probability_RV.sort(stable=True, dim=-1, descending=True)
    sum_RV = probability_RV.cumsum(-1)
    # A token is kept when those before it do not reach top_p yet, so the likeliest always is.
    kept_RV = probability_RV.masked_fill(sum_RV - probability_RV >= sampling.top_p, 0.0).cumsum(-1)
    keys = [((sampling.seed + row) << _TOKEN_BITS) + index for row, index in zip(row_R, index_R, strict=True)]
    key_R = torch.tensor(keys, device=logit_RV.device)
    uniform_R1 = torch.special.ndtr(counter_normal(key_R, (1,), stream=TEXT_STREAM).double())
    place_R1 = torch.searchsorted(kept_RV, (uniform_R1 * kept_RV[:, -1:]).to(kept_RV.dtype), right=True)
    # Rounding may carry the draw past the last kept token.
    last_R1 = (kept_RV < kept_RV[:, -1:]).sum(-1, keepdim=True)
    return token_RV.gather(1, torch.minimum(place_R1, last_R1)).squeeze(1)
