"""Images as tokens (the Chameleon baseline): one after another, behind cached prefixes that end in <BOI>.

I images, R rows of the network (twice the images under guidance), P tokens an image, K codes, h/w tokens a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.sampler import guide
from transfusion.inference.cache import KeyValueCache
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.runner import ModelInput, ModelRunner
from transfusion.model import Chameleon
from transfusion.model.patches import Grid

# Keeps these draws apart from those of samplers and of text.
TOKEN_STREAM = 1 << 21


def draw_tokens(
    runner: ModelRunner,
    prefixes: KeyValueCache,
    rows: Sequence[int],
    keys: Sequence[int],
    sampling: ImageSampling,
    config: DiffusionConfig,
) -> Tensor:
    """Tokens int64 [I, h, w]: image i continues row rows[i] of `prefixes`, by the random numbers of keys[i].

    Guidance is applied to the logits of the image tokens. `config`, and steps and sampler of `sampling`, mean nothing
    here. The model is called once a token, both branches of the guidance in one batch. `prefixes` stays as it is.
    """
    model = runner.model
    assert isinstance(model, Chameleon)
    guided, size = sampling.guidance != 1, sampling.size or runner.sizes.first
    patches = runner.sizes.patches(size)
    cache = runner.branches(prefixes, rows, size, guided=guided)
    # <BOI> is read once more, for the state that the first token is drawn from.
    cache.lengths = [length - 1 for length in cache.lengths]
    view = cache.view()
    begin = runner.token_block([runner.sizes.begin_token(size)] * len(cache.lengths), cache.lengths)
    state_RD = runner.read(view, begin)
    position_RPA = runner.image_positions(view.lengths, size)
    key_I = torch.tensor(keys, device=runner.device)
    grid = Grid(len(view.lengths), *runner.sizes.grid(size))
    drawn: list[Tensor] = []
    for place in range(patches):
        sampling.on_call()
        logit_RK = runner.logits(state_RD)[:, model.config.vocabulary :]
        if guided:
            conditional, unconditional = logit_RK.chunk(2)
            logit_RK = guide(conditional, unconditional, sampling.guidance)
        token_I = choose_token(logit_RK, key_I, place)
        drawn.append(token_I)
        if place + 1 < patches:
            id_R1 = model.image_ids(torch.cat((token_I, token_I)) if guided else token_I)[:, None]
            here_R1A = position_RPA[:, place : place + 1]
            ones = [1] * len(id_R1)
            block = ModelInput(id_R1, here_R1A, torch.ones_like(id_R1), ones, place=(grid, place))
            state_RD = runner.read(view, block)
    return torch.stack(drawn, 1).unflatten(1, runner.sizes.latents(size))


def choose_token(logit_IK: Tensor, key_I: Tensor, place: int) -> Tensor:
    """The token of each image at a place, int64 [I], drawn from the softmax by the image's key and the place alone."""
    sum_IK = logit_IK.double().softmax(-1).cumsum(-1)
    normal_I1 = counter_normal(key_I, (1,), stream=TOKEN_STREAM + place)
    threshold_I1 = torch.special.ndtr(normal_I1.double()) * sum_IK[:, -1:]
    place_I = torch.searchsorted(sum_IK, threshold_I1, right=True).squeeze(1)
    return place_I.clamp(max=logit_IK.shape[-1] - 1)
