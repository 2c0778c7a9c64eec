"""The configuration of a codec's training. Defaults are the paper's where it gives them (section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from transfusion.config import RunConfig, Section
from transfusion.config.sections import Decay, FilePath, ShardPaths


class NetworkConfig(Section):
    """AutoencoderKL or VQModel of diffusers. The defaults give the usual 84 M parameters, with 8 latent channels."""

    widths: list[PositiveInt] = Field(
        [128, 256, 512, 512], description="channels of the blocks, of which all but the last halve the image"
    )
    layers: PositiveInt = Field(2, description="residual blocks per width")
    latent_channels: PositiveInt = Field(8, description="channels of the latents, for vq before the codebook")
    groups: PositiveInt = Field(32, description="groups of each GroupNorm, a divisor of every width")
    attention: bool = Field(True, description="self-attention in the middle block")
    codebook_size: PositiveInt = Field(16_384, description="entries of the codebook (vq)")
    code_width: PositiveInt = Field(8, description="dimensions of a codebook entry (vq)")

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.widths) - 1)

    @model_validator(mode="after")
    def _groups_divide(self) -> NetworkConfig:
        if not self.widths or any(width % self.groups for width in self.widths):
            raise ValueError(
                f"network.widths {self.widths} must be multiples of network.groups {self.groups}, at least one"
            )
        return self


class ImagesConfig(Section):
    shards: ShardPaths = Field("", description="globs or brace ranges of .tar shards with images")
    validation: ShardPaths = Field(
        "", description="shards for validation; empty: the first 64 images of shards"
    )
    channels: Literal[1, 3] = Field(3, description="1: grey images, 3: colour")
    image_size: PositiveInt = Field(256, description="side of the square image, in pixels")
    flip: bool = Field(True, description="mirror half of the images")
    workers: PositiveInt = Field(2, description="threads that decode images")


class LossConfig(Section):
    """Weights of the paper's losses. 0 turns one off."""

    reconstruction: Literal["l1", "l2"] = Field("l1", description="loss of the pixels, with weight 1")
    perceptual: NonNegativeFloat = Field(
        1.0, description="weight of the perceptual loss, a distance between features"
    )
    perceptual_features: Literal["vgg16", "random", "none"] = Field(
        "random",
        description="vgg16: from perceptual_weights; random: a fixed random network; none: no such loss",
    )
    perceptual_weights: FilePath = Field(
        "", description="state dict of torchvision's VGG16, for LPIPS with its lin layers"
    )
    identity: NonNegativeFloat = Field(
        0.2, description="weight of the identity loss, a distance between features"
    )
    identity_features: Literal["resnet50", "random", "none"] = Field(
        "none", description="resnet50: from identity_weights, in the paper those of MoCo v2"
    )
    identity_weights: FilePath = Field("", description="state dict of a ResNet-50, from torchvision or MoCo")
    adversarial: NonNegativeFloat = Field(0.5, description="weight of the patch discriminator")
    adversarial_from: NonNegativeInt = Field(50_000, description="first step with the discriminator")
    adaptive: bool = Field(
        True,
        description="also scale the discriminator by the ratio of both gradients at the last layer (Esser et al.)",
    )
    kl: NonNegativeFloat = Field(
        1e-6, description="weight of the KL term, summed over an image's latents (kl)"
    )
    commitment: NonNegativeFloat = Field(0.25, description="weight of the commitment loss (vq)")
    revive_every: NonNegativeInt = Field(
        250,
        description="steps after which unused codebook entries are set to encoded patches; 0: never (vq)",
    )

    def _misfits(self) -> Iterator[str]:
        for name, of_weights in (("perceptual", "vgg16"), ("identity", "resnet50")):
            features, weights = getattr(self, f"{name}_features"), getattr(self, f"{name}_weights")
            if features == of_weights and not weights:
                yield f"loss.{name}_features={of_weights} needs loss.{name}_weights, the file to read them from"
            if features != of_weights and weights:
                yield f"loss.{name}_weights is set; set loss.{name}_features={of_weights} to use it"


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = Field(
        1e-4, description="peak learning rate of the codec and the discriminator"
    )
    warmup_steps: NonNegativeInt = Field(1000, description="steps of linear warm-up")
    decay_steps: NonNegativeInt = Field(
        0, description="last steps, over which the learning rate falls to a hundredth"
    )
    betas: tuple[Decay, Decay] = Field((0.5, 0.9), description="Adam betas")
    gradient_clip: PositiveFloat = Field(1.0, description="maximum norm of the codec's gradient")
    ema_decay: Decay = Field(
        0.999, description="decay of the averaged weights, which are saved; 0: the raw weights are saved"
    )


class CodecTrainConfig(Section):
    """The training of a codec."""

    run: RunConfig = RunConfig(name="codec")
    kind: Literal["kl", "vq"] = Field("kl", description="kl: latents, vq: tokens")
    start: str = Field(
        "", description="folder of an autoencoder to start from: weights of the same name and shape are taken"
    )
    network: NetworkConfig = NetworkConfig()
    images: ImagesConfig = ImagesConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: PositiveInt = Field(1_000_000, description="optimiser steps")
    batch: PositiveInt = Field(32, description="images per step")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="type of the activations, weights are fp32"
    )
    threads: NonNegativeInt = Field(0, description="CPU threads; 0: all cores")
    checkpoint_every: PositiveInt = Field(1000, description="steps between checkpoints")
    log_every: PositiveInt = Field(50, description="steps between lines of metrics.jsonl")

    def _misfits(self) -> Iterator[str]:
        if not self.images.shards:
            yield "images.shards is empty; name shards with images, such as data/train/*.tar"
        if self.images.image_size % self.network.downscale:
            yield (
                f"images.image_size {self.images.image_size} must be a multiple of {self.network.downscale},"
                " the factor that network.widths scale down by"
            )
