"""How likely an image is behind a cached row that ends in <BOI>.

N draws, C channels, H/W latent height and width, P patches an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.diffusion.bound import DiffusionBound
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.objective import ImageObjective
from transfusion.inference.cache import PagedCache, Row
from transfusion.inference.image_diffusion import predict
from transfusion.inference.runner import ModelRunner
from transfusion.model import Chameleon
from transfusion.sequence.sizes import Size

# Keeps these draws apart from those of samplers, of text and of image tokens.
NOISE_STREAM, TIMESTEP_STREAM = 1 << 22, (1 << 22) + 1
# Bits of a key that number the draw.
_DRAW_BITS = 24
# Rows of one forward.
ROWS = 64


@dataclass(frozen=True, slots=True)
class Score:
    """How likely something is.

    Attributes:
        log_likelihood: In nats. Of an image of a diffusion model it is an estimate of a lower bound, of a density over
            its latents.
        standard_error: Of the estimate, 0 where nothing is drawn.
        count: Tokens of a text or an image, values of the latents of one that is diffused.
        is_greedy: Whether each token of a text is the likeliest one where it stands. None of an image.
    """

    log_likelihood: float
    standard_error: float
    count: int
    is_greedy: bool | None = None


class GivenImage(NamedTuple):
    """An image that is scored.

    Attributes:
        encoded: As the codec encodes it: latents [C, H, W], or tokens [h, w].
        size: In pixels.
        cache: Of what stands before it.
        row: Of that cache. It ends in <BOI>, and stays as it is.
    """

    encoded: Tensor
    size: Size
    cache: PagedCache
    row: Row


def diffusion_bound(
    runner: ModelRunner, config: DiffusionConfig, image: GivenImage, samples: int, seed: int
) -> Score:
    """The variational bound of latents, from so many draws of a timestep and noise, an even number.

    Timesteps are drawn in pairs, each pair from a part of its own, so that the difference within pairs tells the error.
    Scores of one seed share their draws: their differences err less than they do.
    """
    encoded, size, cache, row = image
    objective = ImageObjective(config)
    bound = DiffusionBound(objective.schedule)
    key_N = (seed << _DRAW_BITS) + torch.arange(samples, device=runner.device)
    place_N = torch.special.ndtr(counter_normal(key_N, (1,), stream=TIMESTEP_STREAM).double()).squeeze(1)
    pair_N = torch.arange(samples, device=runner.device) // 2
    timestep_N = bound.timesteps((pair_N + place_N) * 2 / samples)
    terms: list[Tensor] = []
    for keys, timesteps in zip(key_N.split(ROWS), timestep_N.split(ROWS), strict=True):
        clean_NCHW = encoded.float().expand(len(keys), -1, -1, -1)
        noise_NCHW = counter_normal(keys, encoded.shape, stream=NOISE_STREAM)
        noisy_NCHW = objective.schedule.add_noise(clean_NCHW, noise_NCHW, timesteps)
        rows = [cache.fork(row, row.length + runner.sizes.patches(size)) for _ in keys]
        output_NCHW = predict(runner, cache.view(rows), noisy_NCHW, timesteps, size)
        predicted_NCHW = objective.clean(noisy_NCHW.double(), output_NCHW.double(), timesteps)
        if runner.codec.bound is not None:
            predicted_NCHW = predicted_NCHW.clamp(-runner.codec.bound, runner.codec.bound)
        share_N = bound.share_T.to(runner.device)[timesteps]
        terms.append(bound.terms(clean_NCHW, predicted_NCHW, timesteps) / share_N)
        for fork in rows:
            cache.release(fork)
    pair_K2 = torch.cat(terms).view(-1, 2)
    error = (pair_K2[:, 0] - pair_K2[:, 1]).square().sum().sqrt().item() / samples
    total = bound.constant(encoded[None]).item() + pair_K2.mean().item()
    return Score(-total, error, encoded.numel())


def token_likelihood(
    runner: ModelRunner, config: DiffusionConfig, image: GivenImage, samples: int, seed: int
) -> Score:
    """The exact log-likelihood of an image's tokens among image tokens (the Chameleon baseline). Nothing is drawn."""
    encoded, size, cache, row = image
    assert isinstance(runner.model, Chameleon)
    whole = cache.fork(row, row.length + 1 + runner.sizes.patches(size))
    # <BOI> is read once more, for the state that the first token is predicted from.
    whole.length -= 1
    view = cache.view([whole])
    first_state_1D = runner.read(view, runner.token_block([runner.sizes.begin_token(size)], view.lengths))
    block = runner.image_block(encoded[None], view.lengths, size)
    state_ND = torch.cat((first_state_1D, runner.states(view, block)[0, : encoded.numel() - 1]))
    cache.release(whole)
    logit_NK = runner.logits(state_ND)[:, runner.model.config.vocabulary :]
    nats_N = logit_NK.double().log_softmax(-1).gather(1, encoded.flatten()[:, None])
    return Score(nats_N.sum().item(), 0.0, encoded.numel())
