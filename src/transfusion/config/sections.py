"""The sections of a configuration: frozen models with the defaults of the paper.

Plain values only. Nothing here builds anything. Each field's description is its help text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from transfusion.config.codec_folder import KINDS
from transfusion.config.objectives import STRAIGHT, PredictionName
from transfusion.sequence.sizes import IMAGE, OtherSizes, Resize, Size
from transfusion.tokens import MAX_SAMPLING_SEED, MAX_SEED
from transfusion.urls import redacted_plain

Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
SamplingSeed = Annotated[int, Field(ge=0, le=MAX_SAMPLING_SEED)]
Probability = Annotated[float, Field(ge=0, le=1)]


# Between the problems of one ValueError. The loader prints one a line. A problem may hold a semicolon.
PROBLEM_SEPARATOR = "\n"


SECTION_OF_SIZES = {"sizes": "sample_grid", "image_sizes": "codec", "shapes": "modalities"}


def _as_sizes(value: Any, info: ValidationInfo) -> Any:
    """Sizes as they are written. A single one needs no list."""
    values = [value] if isinstance(value, str) else value
    section = SECTION_OF_SIZES[info.field_name or ""]
    key = f"{section}.{info.field_name}"
    try:
        if isinstance(values, list | tuple) and len(set(map(Size.parse, map(str, values)))) < len(values):
            raise ValueError("a size is given twice")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return values


def _at_home(value: str | list[str]) -> str | list[str]:
    """With the home folder in place of ~, which no shell opens behind `key=` or in a file."""
    return os.path.expanduser(value) if isinstance(value, str) else list(map(os.path.expanduser, value))


FilePath = Annotated[str, AfterValidator(_at_home)]
ShardPaths = Annotated[str | list[str], AfterValidator(_at_home)]
Sizes = Annotated[tuple[str, ...], BeforeValidator(_as_sizes)]


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation allows, those of entries included."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _kinds(argument)


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = list(_kinds(cls.model_fields[info.field_name or ""].annotation))
        values = value if isinstance(value, list | tuple) else [value]
        if (
            bool not in kinds
            and (int in kinds or float in kinds)
            and any(isinstance(v, bool) for v in values)
        ):
            raise ValueError(f"{info.field_name} must be a number, got {value!r}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if problems := list(self._misfits()):
            raise ValueError(PROBLEM_SEPARATOR.join(problems))
        return self

    def _misfits(self) -> Iterable[str]:
        """What does not fit together, one line each, once every value is well by itself."""
        return ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to config.yaml and config.json: no credentials."""
        return self.model_dump(mode="json")


class RunConfig(Section):
    name: str = Field("run", description="name of the run, shown in reports")
    dir: FilePath = Field("", description="folder of the run; empty: runs/<name>")
    seed: Seed = Field(0, description="one seed for weights, data order, noise and caption dropout")

    @property
    def folder(self) -> str:
        return self.dir or f"runs/{self.name}"


class UNetConfig(Section):
    """The U-Net around the transformer: two blocks down and two blocks up (paper, section 3.2).

    The defaults have 0.27 B parameters, whatever the model width and the patch size.
    """

    widths: tuple[PositiveInt, PositiveInt] = Field((832, 1344), description="channels of the two blocks")
    layers: PositiveInt = Field(2, description="residual and self-attention layers per block")
    head_dim: PositiveInt = Field(64, description="dimensions of a self-attention head")


class RopeScalingConfig(Section):
    """How the frequencies of the rotary embedding are lowered, under the names of transformers."""

    type: Literal["none", "linear", "llama3"] = Field(
        "none",
        description="none; linear: every frequency is divided by `factor`; llama3: low frequencies are, high ones stay",
    )
    factor: PositiveFloat = Field(1.0, description="what frequencies are divided by")
    low_freq_factor: PositiveFloat = Field(
        1.0,
        description="llama3: a wave that turns at most so often in the original length is divided in full",
    )
    high_freq_factor: PositiveFloat = Field(
        4.0, description="llama3: a wave that turns at least so often in the original length stays"
    )
    original_max_position_embeddings: PositiveInt = Field(8192, description="llama3: the original length")

    def _misfits(self) -> Iterator[str]:
        needs = {"factor": ("linear", "llama3")} | dict.fromkeys(
            ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ("llama3",)
        )
        for name, types in needs.items():
            given = getattr(self, name)
            if self.type not in types and given != type(self).model_fields[name].default:
                yield (
                    f"model.rope_scaling.{name}={given:g} does nothing without model.rope_scaling.type="
                    f"{' or '.join(types)}"
                )
        if self.low_freq_factor >= self.high_freq_factor:
            yield (
                f"model.rope_scaling.low_freq_factor {self.low_freq_factor:g} must be below"
                f" model.rope_scaling.high_freq_factor {self.high_freq_factor:g}"
            )


class ModelConfig(Section):
    """Llama blocks, with a patch embedder before and after them (paper, section 3)."""

    vocabulary: NonNegativeInt = Field(
        0,
        description="rows of the embedding; 0: the size of the tokenizer, plus one for each further image size",
    )
    family: str = Field(
        "transfusion",
        description="transfusion: images are latents; chameleon: tokens of a codebook, with defaults of its own",
    )
    layers: PositiveInt = Field(16, description="transformer blocks")
    hidden_size: PositiveInt = Field(768, description="model width")
    heads: PositiveInt = Field(12, description="query heads")
    num_kv_heads: NonNegativeInt = Field(0, description="key and value heads; 0: as many as query heads")
    head_dim: NonNegativeInt = Field(0, description="dimensions of a head; 0: hidden_size divided by heads")
    ffn_size: NonNegativeInt = Field(
        0, description="SwiGLU width; 0: 8/3 of hidden_size, up to a multiple of 64"
    )
    norm_epsilon: PositiveFloat = Field(1e-5, description="epsilon of RMSNorm")
    rope_theta: PositiveFloat = Field(10_000.0, description="base of the rotary embedding")
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    attention_bias: bool = Field(False, description="biases on queries, keys and values, as Qwen2 has them")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys, per head, before they are turned")
    tie_embeddings: bool = Field(
        False, description="whether the text head is the embedding's own weight, not a matrix apart from it"
    )
    modality_weights: Literal["shared", "ffn", "all"] = Field(
        "shared",
        description="what patches have of their own in each block: nothing, the feed-forward with its norm, or all"
        " weights (Mixture-of-Transformers)",
    )
    norm_placement: Literal["pre", "post"] = Field(
        "pre", description="where RMSNorm stands: before attention and feed-forward, or after them"
    )
    image_attention: Literal["bidirectional", "causal"] = Field(
        "bidirectional", description="what a patch attends to in its image: all patches, or only earlier ones"
    )
    position: Literal["1d", "2d"] = Field(
        "1d", description="rotary positions of patches: one running index, or row and column"
    )
    patch_position: Literal["none", "sincos", "learned"] = Field(
        "sincos",
        description="position embedding added to a patch: none, sines and cosines of row and column, or a learned"
        " vector of each",
    )
    timestep_embedding: Literal["projected", "patch"] = Field(
        "projected",
        description="where the timestep is added: to the projected patch, or to the raw patch vector",
    )
    patch_size: PositiveInt = Field(2, description="side of a patch, in latent pixels")
    patch_embed: Literal["linear", "unet"] = Field(
        "linear",
        description="what turns patches into vectors of the network and back: one matrix, or a U-Net",
    )
    unet: UNetConfig = UNetConfig()

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_size or -(-self.hidden_size * 8 // 3 // 64) * 64

    def _misfits(self) -> Iterator[str]:
        if self.head_dim % 2:
            yield f"model.head_dim {self.head_dim} must be even, since dimensions are turned in pairs"
        elif not self.head_dim and (self.hidden_size % self.heads or self.head_width % 2):
            yield (
                f"model.hidden_size {self.hidden_size} must be an even multiple of model.heads {self.heads}, or"
                " model.head_dim be set"
            )
        if self.heads % self.kv_heads:
            yield f"model.heads {self.heads} must be a multiple of model.num_kv_heads {self.kv_heads}"
        if self.position == "2d" and self.head_width < 8:
            yield f"model.position=2d needs heads of at least 8 dimensions, got {self.head_width}"
        if self.patch_embed == "linear":
            return
        if self.patch_size & (self.patch_size - 1):
            yield f"model.patch_size {self.patch_size} must be a power of two for model.patch_embed=unet, which halves"
        if any(width % self.unet.head_dim for width in self.unet.widths):
            yield (
                f"model.unet.widths {list(self.unet.widths)} must be multiples of model.unet.head_dim"
                f" {self.unet.head_dim}"
            )
        if self.timestep_embedding != "projected":
            yield (
                f"model.timestep_embedding={self.timestep_embedding} is for model.patch_embed=linear; the U-Net takes"
                " the timestep in each of its layers"
            )


# What each `codec.kind` makes of images. The codecs themselves are in `codec.CODECS`.
CODEC_KINDS: dict[str, Literal["latents", "tokens"]] = {"pixels": "latents", "kl": "latents", "vq": "tokens"}


class CodecConfig(Section):
    """How images become latents, and latents become images.

    Values that come from an autoencoder's folder are read when a configuration is loaded, and stored with the run.
    """

    kind: str = Field(
        "pixels",
        description="pixels: the scaled pixels are the latents; kl: an autoencoder of latents; vq: of tokens",
    )
    channels: Literal[1, 3] = Field(3, description="1: grey images, 3: colour")
    image_size: PositiveInt = Field(32, description="side of the square image, in pixels")
    image_sizes: Sizes = Field(
        (),
        description="several HEIGHTxWIDTH, in place of image_size. Each image gets that of the nearest aspect ratio",
    )
    resize: Resize = Field(
        "crop",
        description="how an image of another shape comes to its size. crop takes its middle, pad all of it on white,"
        " fit stretches it",
    )
    folder: FilePath = Field(
        "", description="folder of the autoencoder, in the layout of diffusers, not for pixels"
    )
    latent_channels: NonNegativeInt = Field(
        0, description="channels of the latents; 0: from the folder, or for pixels those of the image"
    )
    downscale: NonNegativeInt = Field(
        0, description="side of the square of pixels behind one latent; 0: from the folder, or for pixels 1"
    )
    scale: tuple[PositiveFloat, ...] = Field(
        (),
        description="latents are (encoded - shift) x scale: one number, or one per channel; empty: from the folder",
    )
    shift: tuple[float, ...] = Field((), description="see scale")
    codebook_size: NonNegativeInt = Field(0, description="codebook entries of vq; 0: from the folder")
    fingerprint: str = Field("", description="hash of the weights, scale and shift; empty: from the folder")

    @field_validator("scale", "shift", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @property
    def depth(self) -> int:
        """Channels of the latents."""
        return self.latent_channels or self.channels

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes that images take. The first is drawn where no other is asked for."""
        return tuple(map(Size.parse, self.image_sizes)) or (Size(self.image_size, self.image_size),)

    @property
    def stored_channels(self) -> int:
        """Channels of what `codec encode` stores: those of the latents, or 1 for tokens."""
        return 1 if self.makes == "tokens" else self.depth

    @property
    def makes(self) -> Literal["latents", "tokens"]:
        """What the network reads of images."""
        return CODEC_KINDS[self.kind]

    @property
    def is_autoencoder(self) -> bool:
        """Whether it is an autoencoder in diffusers' layout, whose folder a run and its export keep."""
        return self.kind in KINDS.values()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of the latents of an image of height x width pixels."""
        step = self.downscale or 1
        return self.depth, height // step, width // step

    def named_sizes(self) -> list[tuple[Size, str]]:
        """Each size with the key and value that say so, for messages."""
        if not self.image_sizes:
            return [(self.sizes[0], f"image_size {self.image_size}")]
        return [(size, f"image_sizes: {size}") for size in self.sizes]

    def _misfits(self) -> Iterator[str]:
        if self.kind not in CODEC_KINDS:
            yield f"codec.kind={self.kind} does not exist; choose {' or '.join(CODEC_KINDS)}"
            return
        if self.kind == "pixels":
            for name in type(self).model_fields:
                if name not in ("kind", "channels", "image_size", "image_sizes", "resize") and getattr(
                    self, name
                ):
                    yield f"codec.{name} belongs to an autoencoder; set codec.kind=kl or vq, or remove it"
        elif self.is_autoencoder and not self.folder:
            yield f"codec.kind={self.kind} needs codec.folder, the folder of an autoencoder"
        elif not (self.latent_channels and self.downscale):
            yield "codec.latent_channels and codec.downscale must be those of the codec"
        else:
            for size, name in self.named_sizes():
                if size.height % self.downscale or size.width % self.downscale:
                    yield f"codec.{name} must be a multiple of codec.downscale {self.downscale}"
        for name in ("scale", "shift"):
            if (given := len(getattr(self, name))) not in (0, 1, self.depth):
                yield f"codec.{name} must be one number or {self.depth}, one per channel, got {given}"


class DiffusionConfig(Section):
    """How noise is added to images, and what the network predicts. The defaults are the paper's (section 3.1)."""

    prediction: PredictionName = Field(
        "epsilon",
        description="what the network predicts: noise or v (cosine schedule), the velocity of a rectified flow, or on"
        " its path the clean image x",
    )
    steps: PositiveInt = Field(1000, description="training timesteps T")
    timestep_sampling: Literal["uniform", "logit-normal"] = Field(
        "uniform",
        description="how timesteps are drawn; logit-normal: mostly from the middle, not for epsilon",
    )
    logit_mean: FiniteFloat = Field(
        0.0,
        description="for timestep_sampling=logit-normal: mean of the logit of the noise level, above 0 for more noise",
    )
    logit_std: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0, description="for timestep_sampling=logit-normal: standard deviation of the logit"
    )
    timestep_shift: PositiveFloat = Field(
        1.0,
        description="for flow and x, in training and sampling: above 1 shifts towards more noise; 1: none",
    )
    image_loss_weight: PositiveFloat = Field(5.0, description="lambda, the weight of the image loss")
    loss_weight: Literal["none", "min-snr"] = Field(
        "none", description="weight of each image by its timestep; min-snr: for epsilon and v"
    )
    min_snr_gamma: PositiveFloat = Field(
        5.0, description="for loss_weight=min-snr: signal-to-noise ratio above which images weigh less"
    )
    max_timestep_before_caption: NonNegativeInt = Field(
        500,
        description="images that come before their caption get timesteps below this; 0: no limit. For context=noisy",
    )
    context: Literal["noisy", "clean"] = Field(
        "noisy",
        description="what reads an image that something follows: the noised image itself, or a clean copy of it, beside"
        " which the noised one is learned",
    )

    @property
    def is_straight(self) -> bool:
        """Whether images become noise on a straight path, and not by the cosine schedule."""
        return self.prediction in STRAIGHT

    def problems(self) -> Iterator[str]:
        """Values that do not fit together, one line each. `Config` asks, so that other sections are heard too."""
        if self.max_timestep_before_caption > self.steps:
            yield "diffusion.max_timestep_before_caption must not exceed diffusion.steps"
        if self.timestep_sampling == "logit-normal" and self.prediction == "epsilon":
            yield (
                "diffusion.timestep_sampling=logit-normal rarely draws the highest timesteps, where sampling begins and"
                " predicted noise says least about the image; use it with diffusion.prediction=v, flow or x"
            )
        if self.timestep_shift != 1 and not self.is_straight:
            yield (
                f"diffusion.timestep_shift={self.timestep_shift:g} is for diffusion.prediction=flow or x;"
                f" {self.prediction} takes 1"
            )
        if self.loss_weight == "min-snr" and self.is_straight:
            yield (
                "diffusion.loss_weight=min-snr is for diffusion.prediction=epsilon or v;"
                f" {self.prediction} weighs by diffusion.timestep_sampling and diffusion.timestep_shift"
            )
        for name, owner, value in (
            ("min_snr_gamma", "loss_weight", "min-snr"),
            ("logit_mean", "timestep_sampling", "logit-normal"),
            ("logit_std", "timestep_sampling", "logit-normal"),
        ):
            given = getattr(self, name)
            if getattr(self, owner) != value and given != type(self).model_fields[name].default:
                yield f"diffusion.{name}={given:g} does nothing without diffusion.{owner}={value}"


# What each `modalities.kind` is. The codecs themselves are in `codec.MEDIA_CODECS`.
MEDIA_KINDS = ("latents", "mel")
# Files of sound are brought to this rate, and belong to the modality of this name.
SAMPLE_RATE, SOUND = 16_000, "sound"
# Of kind=mel: samples from one frame to the next, and bands of a frame.
MEL_HOP, MEL_BANDS = 256, 80
_NOT_MODALITIES = (IMAGE, "text", "latent", "tokens", "patch", "padding")


class ModalityConfig(Section):
    """A modality beside text and images, learned by diffusion as images are: an array [channels, height, width]."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,30}$")] = Field(
        description="its name in shards (KEY.NAME.npy), losses and logs: small letters and underscores"
    )
    kind: str = Field(
        "latents",
        description="latents: arrays of a codec of your own, stored in the shards; mel: sound of 16 kHz, learned as"
        " log-mel spectrograms",
    )
    channels: PositiveInt = Field(1, description="channels of an array")
    shapes: Sizes = Field(
        description="HEIGHTxWIDTH of the arrays, one or several. Each has a token that begins it. For mel 1xSAMPLES: a"
        " sound takes the shortest that holds it, with silence behind",
    )
    patch: str = Field(
        "1x1",
        description="HEIGHTxWIDTH of the block of values that stands at one position. For mel a multiple of 1x256",
    )
    scale: PositiveFloat = Field(
        1.0, description="the network reads (array - shift) x scale, of about unit variance"
    )
    shift: FiniteFloat = Field(0.0, description="see scale")
    diffusion: DiffusionConfig = DiffusionConfig()

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return Size.parse(self.patch).sides

    @property
    def patch_values(self) -> int:
        """Values of a patch, as the network reads it."""
        height, width = self.block
        if self.kind == "mel":
            return MEL_BANDS * width // MEL_HOP
        return self.channels * height * width

    @property
    def sizes(self) -> OtherSizes:
        """Its shapes, and how they are cut."""
        sizes = tuple(Size.parse(shape)._replace(modality=self.name) for shape in self.shapes)
        return OtherSizes(self.name, sizes, self.block)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, H, W] of what the network reads of such an array: its patches, each one latent."""
        return self.patch_values, *self.sizes.grid(size)

    def _misfits(self) -> Iterator[str]:
        named = f"modalities.{self.name}"
        if self.name in _NOT_MODALITIES:
            yield f"{named}: choose another name than {', '.join(_NOT_MODALITIES)}"
        if self.kind not in MEDIA_KINDS:
            yield f"{named}.kind={self.kind} does not exist; choose {' or '.join(MEDIA_KINDS)}"
        if not self.shapes:
            yield f"{named}.shapes must name at least one HEIGHTxWIDTH"
        try:
            height, width = self.block
        except ValueError as error:
            yield f"{named}.patch: {error}"
            return
        if self.kind == "mel" and (self.channels != 1 or height != 1 or width % MEL_HOP):
            yield (
                f"{named}.kind=mel takes channels 1 and a patch of 1 x a multiple of {MEL_HOP} samples, got"
                f" {self.channels} and {self.patch}"
            )
        for size in map(Size.parse, self.shapes):
            if size.height % height or size.width % width:
                yield f"{named}.shapes: {size} must be a multiple of {named}.patch {self.patch}"
        if self.diffusion.context != "noisy":
            yield f"{named}.diffusion.context is that of images; set diffusion.context"
        for problem in self.diffusion.problems():
            yield problem.replace("diffusion.", f"{named}.diffusion.")


class WeightFrom(Section):
    """One entry of a schedule of weights."""

    from_step: NonNegativeInt = Field(description="first step with this weight")
    weight: NonNegativeFloat = Field(
        description="share of the tokens, relative to the other sources; 0: none"
    )


# How a weight may be written. Pydantic names these words where a mistake is.
WEIGHT_FORMS = ("constant weight", "schedule of weights")
WeightOrSchedule = Annotated[
    Annotated[PositiveFloat, Tag(WEIGHT_FORMS[0])] | Annotated[list[WeightFrom], Tag(WEIGHT_FORMS[1])],
    Discriminator(lambda value: WEIGHT_FORMS[isinstance(value, list)]),
]


Verify = Literal["none", "sha256"]
SourceKind = Literal["auto", "pairs", "texts", "interleaved", "mixed"]


class SourceConfig(Section):
    """One stream of documents."""

    name: str = Field(description="name in logs and counters")
    shards: ShardPaths = Field(
        description="globs or brace ranges of .tar shards or of .jsonl files of text, or URLs with brace ranges"
    )
    shuffle_window: PositiveInt = Field(
        8, description="shards whose samples are shuffled together, for a source with URLs only"
    )
    latent_channels: NonNegativeInt = Field(
        0, description="channels of precomputed latents (KEY.latent.npy, KEY.npy); 0: those of the codec"
    )
    kind: SourceKind = Field(
        "auto",
        description="what the shards hold. Other samples are left out as faults. auto: a shard with more pairs than"
        " texts holds no texts, so that a caption whose image is gone is none",
    )
    verify: Verify = Field(
        "none",
        description="sha256: leave out images and captions that do not match `sha256` and `caption` in KEY.json",
    )
    weight: WeightOrSchedule = Field(
        1.0,
        description="share of the tokens, relative to the other sources, or a list of {from_step, weight} that"
        " begins with step 0",
    )

    @field_serializer("shards", when_used="json")
    def _without_credentials(self, shards: str | list[str]) -> str | list[str]:
        return redacted_plain(shards)

    @field_validator("weight")
    @classmethod
    def _in_order(cls, weight: float | list[WeightFrom]) -> float | list[WeightFrom]:
        steps = [part.from_step for part in weight] if isinstance(weight, list) else [0]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"data.sources.weight: from_step must begin with 0 and rise, got {steps}")
        return weight

    @property
    def schedule(self) -> tuple[tuple[int, float], ...]:
        """(first step, weight) in order, whichever way the weight is written."""
        if isinstance(self.weight, list):
            return tuple((part.from_step, part.weight) for part in self.weight)
        return ((0, self.weight),)


class CacheConfig(Section):
    """Copies of the shards that sources name by URL. Without such a source nothing is downloaded or written."""

    folder: FilePath = Field(
        "",
        description="folder of the copies, on a local disk if possible; empty: cache/ in the run folder",
    )
    gigabytes: PositiveFloat = Field(50.0, description="maximum size of the folder, in 10^9 bytes")
    connections: PositiveInt = Field(4, description="shards that a process downloads at once")
    attempts: PositiveInt = Field(5, description="attempts at a shard before its samples count as bad")
    timeout: PositiveFloat = Field(30.0, description="seconds without a byte after which an attempt ends")
    pause: NonNegativeFloat = Field(
        1.0, description="seconds before the second attempt, doubled before each further one"
    )


class DataConfig(Section):
    sources: list[SourceConfig] = Field(default_factory=list, description="what to train on")
    validation: list[SourceConfig] = Field(default_factory=list, description="what to evaluate on")
    validation_limit: NonNegativeInt = Field(
        1000,
        description="documents of `validation` that training measures at a checkpoint, the same ones each time. 0 takes"
        " all, as `transfusion eval` always does",
    )
    tokenizer: FilePath = Field(
        "",
        description="a sentencepiece model of `transfusion tokenizer train`, or a published tokenizer.json",
    )
    index: FilePath = Field(
        "",
        description="folder of `transfusion data index`; empty: an index beside each shard, or in the run folder",
    )
    cache: CacheConfig = CacheConfig()
    sequence_length: PositiveInt = Field(4096, description="tokens and patches in a sequence")
    global_batch_size: PositiveInt = Field(
        512, description="sequences in a global batch, over all ranks and micro-batches"
    )
    micro_batch_size: NonNegativeInt = Field(
        0, description="sequences a rank computes at once; 0: all of its share"
    )
    packing_buffer: PositiveInt = Field(16, description="sequences that the packer keeps open")
    caption_first: Probability = Field(
        0.8, description="share of captioned pairs whose caption comes before the image"
    )
    caption_dropout: Probability = Field(
        0.1, description="share of pairs trained without their caption, for guidance"
    )
    workers: NonNegativeInt = Field(
        0, description="loader processes per rank; 0: load in the training process"
    )
    max_bad_fraction: Probability = Field(0.05, description="share of bad samples above which a run stops")


class OptimizerConfig(Section):
    """AdamW and the cosine schedule of the paper (section 4.1)."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon for the matrices of the blocks and AdamW for all else",
    )
    learning_rate: PositiveFloat = Field(3e-4, description="peak learning rate")
    final_learning_rate: NonNegativeFloat = Field(1.5e-5, description="learning rate at the last step")
    warmup_steps: NonNegativeInt = Field(4000, description="steps of linear warm-up")
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.95), description="AdamW betas. The second is the momentum of muon too"
    )
    epsilon: PositiveFloat = Field(1e-8, description="AdamW epsilon")
    weight_decay: NonNegativeFloat = Field(0.1, description="on matrices only")
    gradient_clip: PositiveFloat = Field(1.0, description="maximum global gradient norm")
    ema_decay: Decay = Field(0.0, description="decay of the moving average of the weights; 0: none")
    ema_half_life: NonNegativeFloat = Field(
        0.0,
        description="in place of ema_decay: steps after which a weight's share of the average is halved; 0: none",
    )

    @property
    def average_decay(self) -> float:
        """Decay of the moving average in a step, however it is set. 0: there is no average."""
        return 0.5 ** (1 / self.ema_half_life) if self.ema_half_life else self.ema_decay

    def _misfits(self) -> Iterator[str]:
        if self.ema_decay and self.ema_half_life:
            yield "optimizer.ema_decay and optimizer.ema_half_life say the same in two ways; set one of them"
        if self.ema_half_life and not 0 < self.average_decay < 1:
            yield (
                f"optimizer.ema_half_life={self.ema_half_life:g} makes a decay of {self.average_decay:g}; set it to"
                " between 0.001 and 1e15 steps"
            )


class ZeroConfig(Section):
    """Settings of DeepSpeed ZeRO. Every value is written out, since its defaults change between releases."""

    stage: Literal[1, 2, 3] = Field(3, description="ZeRO stage")
    prefetch_bucket_size: PositiveInt = Field(50_000_000, description="elements gathered ahead")
    persistence_threshold: NonNegativeInt = Field(
        100_000, description="parameters with fewer elements stay gathered"
    )
    max_live_parameters: NonNegativeInt = Field(
        1_000_000_000, description="maximum number of elements kept gathered"
    )
    max_reuse_distance: NonNegativeInt = Field(
        1_000_000_000, description="parameters reused within so many elements stay gathered"
    )
    reduce_bucket_size: PositiveInt = Field(50_000_000, description="elements reduced at once")
    overlap_communication: bool = Field(True, description="reduce while the backward pass runs (CUDA)")
    hpz_partition_size: PositiveInt = Field(
        1,
        description="ranks, best of one machine, that share a second copy of the weights (hpZ); 1: none",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="where weights and moments of AdamW are kept"
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where weights are kept between uses, stage 3 only"
    )
    nvme_path: FilePath = Field("", description="folder on a local disk for what is offloaded to nvme")

    def _misfits(self) -> Iterator[str]:
        for name in ("offload_parameters", "hpz_partition_size"):
            if self.stage < 3 and getattr(self, name) != type(self).model_fields[name].default:
                yield f"train.zero.{name} needs train.zero.stage=3, got {self.stage}"
        if self.offload_parameters == "nvme" and not self.nvme_path:
            yield "train.zero.nvme_path must name a folder for what is offloaded to nvme"


class TrainConfig(Section):
    steps: PositiveInt = Field(250_000, description="optimiser steps")
    engine: Literal["auto", "local", "zero"] = Field(
        "auto", description="auto: zero with more than one process or a GPU, else local"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="type of weights and activations in the forward pass"
    )
    attention: Literal["auto", "cpu", "hopper", "triton", "reference", "flex", "cudnn"] = Field(
        "auto", description="attention implementation"
    )
    compile: bool = Field(False, description="torch.compile each block's forward")
    activation_checkpointing: Literal["none", "block", "attention"] = Field(
        "none",
        description="what is computed again in the backward pass: nothing, whole blocks, or attention only",
    )
    sequence_parallel: PositiveInt = Field(
        1, description="ranks that share each sequence, each with a slice of its positions; 1: none"
    )
    z_loss: NonNegativeFloat = Field(
        0.0, description="weight of the squared log normaliser of the text head, in the gradient only"
    )
    loss_chunk_size: PositiveInt = Field(4096, description="text targets whose logits are in memory at once")
    threads: NonNegativeInt = Field(
        0, description="CPU threads per process; 0: cores divided by local processes"
    )
    init_from: FilePath = Field(
        "",
        description="folder of a published causal language model (Llama, Mistral, Qwen2, Qwen3) whose weights a new run"
        " starts from; empty: none",
    )
    freeze: list[Literal["text"]] = Field(
        default_factory=list,
        description="what is not trained. text: embedding, text head, norm and all weights of blocks but those that"
        " patches have of their own (model.modality_weights). Such a model draws when it is told to, and does not begin"
        " an image by itself",
    )
    stall_seconds: NonNegativeFloat = Field(
        100.0,
        description="seconds in one activity after which a process writes a report into RUN/stalls; 0: never",
    )
    lost_rank_timeout: NonNegativeFloat = Field(
        110.0,
        description="seconds of waiting in a collective of a step after which a process exits with code 69;"
        " 0: ten minutes",
    )
    time_limit_minutes: NonNegativeFloat = Field(
        0.0, description="save and exit with code 75 before this time is over; 0: no limit"
    )
    spike_factor: NonNegativeFloat = Field(
        0.0,
        description="skip a step whose loss or gradient norm exceeds this multiple of the recent median; 0: never",
    )
    spike_window: PositiveInt = Field(128, description="good steps that the median is taken over")
    rollback_after_skipped: NonNegativeInt = Field(
        10, description="skipped steps in a row after which the last good checkpoint is restored; 0: never"
    )
    zero: ZeroConfig = ZeroConfig()


class CheckpointConfig(Section):
    every: PositiveInt = Field(
        1000, description="steps between checkpoints. One is always written at the end"
    )
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    archive_interval: NonNegativeInt = Field(
        0, description="checkpoints whose step is a multiple of this are never deleted; 0: none"
    )
    asynchronous: bool = Field(
        True,
        description="write during training, from a copy in host memory; false: wait, without the copy",
    )


class LogConfig(Section):
    every: PositiveInt = Field(10, description="steps between lines of metrics.jsonl")
    wandb: bool = Field(False, description="also write to wandb (offline unless WANDB_MODE says otherwise)")
    project: str = Field("transfusion", description="wandb project")
    gradient_norms: bool = Field(
        False, description="log the gradient norm of each block, and of each part outside the blocks"
    )
    profile_steps: list[PositiveInt] = Field(
        default_factory=list, description="steps whose trace torch's profiler writes into RUN/profiles"
    )
    memory_history: bool = Field(
        False,
        description="record which code allocates GPU memory, for the snapshot when memory runs out",
    )


class EvalConfig(Section):
    """Suites of `transfusion eval` in training, on all ranks together, while the clock stands still."""

    every: NonNegativeInt = Field(
        0,
        description="steps between evaluations, a multiple of checkpoint.every. One more is at the end; 0: none",
    )
    suites: FilePath = Field("", description="file of suites; empty: the default ones")


class SampleGridConfig(Section):
    """Images drawn at step 0 and at every checkpoint, always from the same seeds."""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="captions to draw; empty: no grid"
    )
    per_prompt: PositiveInt = Field(1, description="images per caption")
    sizes: Sizes = Field(
        (),
        description="HEIGHTxWIDTH of the images, each caption in every size; empty: the first size of the codec",
    )
    steps: PositiveInt = Field(50, description="sampler steps")
    sampler: str = Field(
        "auto",
        description="ddim, ddpm or dpmpp_2m, for flow and x euler, heun or dpmpp_2m. auto takes ddim, or"
        " euler",
    )
    guidance: NonNegativeFloat = Field(3.0, description="guidance scale; 1: none")
    seed: SamplingSeed = Field(0, description="seed of the first image; image k has seed + k")
