"""The codebook of a VQ autoencoder while it is trained: what it costs, what of it is used, what is revived.

N encoded patches, C dimensions of a code, K entries of the codebook, I images, h/w height and width of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Quantised(NamedTuple):
    """code_IChw: the chosen entries, through which gradients pass to the encoder. token_N: their numbers."""

    code_IChw: Tensor
    token_N: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def quantise(encoded_IChw: Tensor, entry_KC: Tensor) -> Quantised:
    """The nearest entry of each patch, as VQModel's own quantiser chooses it.

    The losses are counted here, since that quantiser puts the commitment's weight on the other term.
    """
    encoded_IhwC = encoded_IChw.permute(0, 2, 3, 1).float()
    encoded_NC = encoded_IhwC.reshape(-1, entry_KC.shape[1])
    with torch.no_grad():
        token_N = torch.cdist(encoded_NC, entry_KC).argmin(1)
    code_NC = F.embedding(token_N, entry_KC)
    codebook_loss = F.mse_loss(code_NC, encoded_NC.detach())
    commitment_loss = F.mse_loss(encoded_NC, code_NC.detach())
    passed_NC = encoded_NC + (code_NC - encoded_NC).detach()
    code_IChw = passed_NC.view_as(encoded_IhwC).permute(0, 3, 1, 2)
    return Quantised(code_IChw, token_N, codebook_loss, commitment_loss)


@dataclass(frozen=True, slots=True)
class CodebookUse:
    """used: share of the entries chosen at least once. perplexity: exp of the entropy of the choices."""

    used: float
    dead: int
    perplexity: float

    def __str__(self) -> str:
        return f"{self.used:.1%} of the codebook used, {self.dead} dead entries, perplexity {self.perplexity:.0f}"


def use(chosen_K: Tensor) -> CodebookUse:
    """From how often each entry was chosen."""
    share_K = chosen_K.double() / chosen_K.sum().clamp(min=1)
    perplexity = torch.special.entr(share_K).sum().exp().item()
    dead = int((chosen_K == 0).sum())
    return CodebookUse(1 - dead / len(chosen_K), dead, perplexity)


@torch.no_grad()
def revive(entry_KC: Tensor, chosen_K: Tensor, encoded_NC: Tensor, generator: torch.Generator) -> Tensor:
    """Set every entry that nothing chose to a patch as it is encoded now, or near one; returns their numbers.

    Where there are more dead entries than patches these repeat, with a little noise between them.
    """
    dead = torch.nonzero(chosen_K == 0).flatten()
    if len(dead):
        choice = torch.randint(len(encoded_NC), (len(dead),), generator=generator)
        noise = torch.randn((len(dead), entry_KC.shape[1]), generator=generator)
        spread_C = encoded_NC.std(0, correction=0)
        entry_KC[dead] = encoded_NC[choice.to(encoded_NC.device)] + 0.02 * spread_C * noise.to(spread_C)
    return dead
