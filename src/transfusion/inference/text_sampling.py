"""Language mode: which token comes next.

R rows, N of them that are drawn, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    never_V, begin_K = _special_ids(logit_RV.shape[1], vocabulary, tuple(begins_K), logit_RV.device)
    begins_RK = logit_RV.index_select(1, begin_K).masked_fill(~image_allowed_RK, -math.inf)
    return logit_RV.masked_fill(never_V, -math.inf).index_copy_(1, begin_K, begins_RK)


@lru_cache(maxsize=8)
def _special_ids(
    ids: int, vocabulary: int, begins_K: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """bool [V], which of so many ids neither are text nor end it, and int64 [K], those that begin images."""
    never_V = torch.zeros(ids, dtype=torch.bool)
    never_V[: len(SpecialToken)] = True
    never_V[vocabulary:] = True
    never_V[SpecialToken.END_DOCUMENT] = False
    return never_V.to(device), torch.tensor(begins_K, device=device)


def sample_token(logit_RV: Tensor, sampling_R: Sequence[TextSampling], index_R: Sequence[int]) -> Tensor:
    """The next token of each row, int64 [R].

    index_R: how many tokens the row has chosen before. The draw depends on the row's seed and that number alone, not on
    which other rows share the batch.
    """
    drawn = [row for row, sampling in enumerate(sampling_R) if sampling.temperature > 0]
    token_R = logit_RV.argmax(-1)
    if not drawn:
        return token_R
    temperature_N1, top_p_N1 = (
        torch.tensor([[getattr(sampling_R[row], name)] for row in drawn], device=logit_RV.device)
        for name in ("temperature", "top_p")
    )
    probability_NV = (logit_RV[drawn] / temperature_N1).softmax(-1)
    probability_NV, token_NV = probability_NV.sort(stable=True, dim=-1, descending=True)
    sum_NV = probability_NV.cumsum(-1)
    # A token is kept when those before it do not reach top_p yet, so the likeliest always is.
    kept_NV = probability_NV.masked_fill(sum_NV - probability_NV >= top_p_N1, 0.0).cumsum(-1)
    keys = [(sampling_R[row].seed << _TOKEN_BITS) + index_R[row] for row in drawn]
    key_N = torch.tensor(keys, device=logit_RV.device)
    uniform_N1 = torch.special.ndtr(counter_normal(key_N, (1,), stream=TEXT_STREAM).double())
    place_N1 = torch.searchsorted(kept_NV, (uniform_N1 * kept_NV[:, -1:]).to(kept_NV.dtype), right=True)
    # Rounding may carry the draw past the last kept token.
    last_N1 = (kept_NV < kept_NV[:, -1:]).sum(-1, keepdim=True)
    token_R[drawn] = token_NV.gather(1, torch.minimum(place_N1, last_N1)).squeeze(1)
    return token_R
