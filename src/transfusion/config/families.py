"""What a configuration must say for each family of models. The families themselves are in `transfusion.families`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySettings:
    """reads: what the codec must make of images. defaults: a recipe other than the sections' own, where a file does not
    say. needs: values of the section `model` without which the family is none, and why. shares_rows: whether ranks can
    share a sequence (train.sequence_parallel).
    """

    reads: Literal["latents", "tokens"]
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    shares_rows: bool = True


# By `model.family`.
FAMILY_SETTINGS: dict[str, FamilySettings] = {
    "transfusion": FamilySettings(reads="latents"),
    # The recipe of the Chameleon baseline (paper, section 4.2 and appendix; Chameleon, section 2.3).
    "chameleon": FamilySettings(
        reads="tokens",
        defaults={
            "model": {
                "qk_norm": True,
                "norm_placement": "post",
                "image_attention": "causal",
                "patch_size": 1,
            },
            "train": {"z_loss": 1e-5},
            "optimizer": {"learning_rate": 1e-4},
        },
        needs={"patch_size": 1, "image_attention": "causal"},
        why="which reads one token per latent pixel, in order",
        shares_rows=False,
    ),
}
