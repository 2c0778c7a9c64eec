"""The Chameleon baseline: images are tokens, learned and drawn like words (the paper's comparison)."""

from __future__ import annotations

from transfusion.families.family import Family, ImageMetric
from transfusion.inference.image_scores import token_likelihood
from transfusion.inference.image_tokens import TokenDrawing, advance_tokens
from transfusion.losses.chameleon import ChameleonLoss
from transfusion.model import Chameleon

CHAMELEON = Family(
    network=Chameleon,
    loss=lambda config, codec: ChameleonLoss(config.codec, codec),
    drawing=TokenDrawing,
    advance=advance_tokens,
    score=token_likelihood,
    image_calls=lambda sampling, config, patches: patches,
    # Image tokens pass the blocks and the head as the text's do.
    image_operations=lambda network, shape, recomputes, modality: 0,
    head_targets=lambda shape: shape[1] * shape[2],
    image_metric=lambda diffusion: ImageMetric(
        "image_nats_per_token",
        "nats/token",
        "cross entropy over the image tokens of validation {}, captions first",
    ),
)
