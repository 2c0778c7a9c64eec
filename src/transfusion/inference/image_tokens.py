"""Images as tokens (the Chameleon baseline): one after another, behind cached rows that end in <BOI>.

I images, R rows of the network (two for an image under guidance), P tokens an image, K codes, h/w tokens a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.sampler import guide
from transfusion.inference.cache import PagedCache, Row
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.runner import ModelInput, ModelRunner
from transfusion.model import Chameleon
from transfusion.model.patches import Grid
from transfusion.sequence.sizes import Size

# Keeps these draws apart from those of samplers and of text.
TOKEN_STREAM = 1 << 21


class TokenDrawing:
    """One image in the making, token by token. An `ImageDrawing`.

    Guidance is applied to the logits of the image tokens. The section `diffusion`, and steps and sampler of the
    sampling, mean nothing here.

    Args:
        runner: The network, with its codec and sizes.
        config: The section `diffusion`.
        sampling: How it is drawn, with its size. The seed is the key of its random numbers.
        rows: The row that it continues, which ends in <BOI>. Under guidance also one without a caption.
    """

    def __init__(
        self, runner: ModelRunner, config: DiffusionConfig, sampling: ImageSampling, rows: Sequence[Row]
    ) -> None:
        self.sampling, self.rows = sampling, list(rows)
        self.size = sampling.size or runner.sizes.first
        self.tokens: list[Tensor] = []
        self.first_patches = [row.length for row in rows]
        self.all_calls = runner.sizes.patches(self.size)
        self.result: Tensor | None = None
        # <BOI> is read once more, for the state that the first token is drawn from.
        for row in self.rows:
            row.length -= 1

    @property
    def calls(self) -> int:
        """How often the model was called."""
        return len(self.tokens)

    @property
    def group(self) -> tuple[Size, int, bool]:
        """Drawings of one group can be advanced together: they read the same place of their images."""
        return self.size, self.calls, len(self.rows) > 1

    @property
    def preview(self) -> Tensor | None:
        """None: an image of which tokens are missing is not shown."""
        return None

    def take(self, token: Tensor, latents: tuple[int, ...]) -> None:
        """Take the next token. After the last, the rows are again as long as they were."""
        self.tokens.append(token)
        if self.calls == self.all_calls:
            self.result = torch.stack(self.tokens).unflatten(0, latents)
            for row, first_patch in zip(self.rows, self.first_patches, strict=True):
                row.length = first_patch


def advance_tokens(runner: ModelRunner, cache: PagedCache, drawings: Sequence[TokenDrawing]) -> None:
    """Call the model once for the next token of images of one group, both branches of the guidance in one batch."""
    model = runner.model
    assert isinstance(model, Chameleon)
    size, place, guided = drawings[0].group
    branches = range(2 if guided else 1)
    view = cache.view([drawing.rows[branch] for branch in branches for drawing in drawings])
    if place == 0:
        block = runner.token_block([runner.sizes.begin_token(size)] * len(view.lengths), view.lengths)
    else:
        starts = [drawing.first_patches[branch] for branch in branches for drawing in drawings]
        here_R1A = runner.image_positions(starts, size)[:, place - 1 : place]
        last_I = torch.stack([drawing.tokens[-1] for drawing in drawings])
        id_R1 = model.image_ids(last_I.repeat(len(branches)))[:, None]
        grid = Grid(len(id_R1), *runner.sizes.grid(size))
        ones = [1] * len(id_R1)
        block = ModelInput(id_R1, here_R1A, torch.ones_like(id_R1), ones, place=(grid, place - 1))
    logit_RK = runner.logits(runner.read(view, block))[:, model.config.vocabulary :]
    if guided:
        scale_I1 = torch.tensor([[d.sampling.guidance] for d in drawings], device=runner.device)
        conditional, unconditional = logit_RK.chunk(2)
        logit_RK = guide(conditional, unconditional, scale_I1)
    key_I = torch.tensor([drawing.sampling.seed for drawing in drawings], device=runner.device)
    for drawing, token in zip(drawings, choose_token(logit_RK, key_I, place), strict=True):
        drawing.take(token, runner.sizes.latents(size))


def choose_token(logit_IK: Tensor, key_I: Tensor, place: int) -> Tensor:
    """The token of each image at a place, int64 [I], drawn from the softmax by the image's key and the place alone."""
    sum_IK = logit_IK.double().softmax(-1).cumsum(-1)
    normal_I1 = counter_normal(key_I, (1,), stream=TOKEN_STREAM + place)
    threshold_I1 = torch.special.ndtr(normal_I1.double()) * sum_IK[:, -1:]
    place_I = torch.searchsorted(sum_IK, threshold_I1, right=True).squeeze(1)
    return place_I.clamp(max=logit_IK.shape[-1] - 1)
