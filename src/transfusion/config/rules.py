"""What must fit together across the sections of a configuration, each rule with its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transfusion.config.families import FAMILY_SETTINGS
from transfusion.config.objectives import SAMPLERS
from transfusion.config.sections import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    ModalityConfig,
    ModelConfig,
    SampleGridConfig,
    TrainConfig,
)
from transfusion.sequence.sizes import MAX_ASPECT, MediaSizes, Size


def family_problems(
    model: ModelConfig, codec: CodecConfig, diffusion: DiffusionConfig, train: TrainConfig
) -> Iterator[str]:
    """What a family of models cannot do."""
    name = f"model.family={model.family}"
    family = FAMILY_SETTINGS.get(model.family)
    if family is None:
        yield f"{name} does not exist; choose {' or '.join(FAMILY_SETTINGS)}"
        return
    for key, value in family.needs.items():
        if getattr(model, key) != value:
            yield f"model.{key} must be {value} for {name}, {family.why}"
    if train.sequence_parallel > 1 and not family.shares_rows:
        others = " or ".join(other for other, settings in FAMILY_SETTINGS.items() if settings.shares_rows)
        yield f"train.sequence_parallel={train.sequence_parallel} is for model.family={others}; set it to 1"
    if diffusion.context == "clean" and family.reads == "tokens":
        yield f"diffusion.context=clean does nothing for {name}, whose images have no noise; remove it"
    if codec.makes == "tokens" and family.reads == "latents":
        yield f"codec.kind={codec.kind} makes tokens, and {name} learns latents: set codec.kind=kl"
    if codec.makes == "latents" and family.reads == "tokens":
        yield f"{name} needs tokens, and codec.kind={codec.kind} makes latents: set codec.kind=vq"


def size_problems(
    codec: CodecConfig,
    data: DataConfig,
    diffusion: DiffusionConfig,
    sample: SampleGridConfig,
    sizes: MediaSizes,
) -> Iterator[str]:
    """What keeps images from being cut into patches and put into rows."""
    copies = 2 if diffusion.context == "clean" else 1
    step = sizes.downscale * sizes.patch_size
    downscale = f" / codec.downscale {codec.downscale}" if codec.downscale else ""
    for size, name in codec.named_sizes():
        if size.height % step or size.width % step:
            yield f"codec.{name}{downscale} must be a multiple of model.patch_size {sizes.patch_size}"
        elif (patches := sizes.patches(size)) * copies + 4 > data.sequence_length:
            twice = ", twice for diffusion.context=clean," if copies == 2 else ""
            yield (
                f"data.sequence_length {data.sequence_length} is too short for an image of"
                f" {patches} patches{twice} and its four control tokens"
            )
        if max(size.sides) > MAX_ASPECT * min(size.sides):
            yield (
                f"codec.{name} has an aspect ratio above {MAX_ASPECT}; images beyond that are left out, so"
                " choose a smaller one"
            )
    for text in sample.sizes:
        if Size.parse(text) not in codec.sizes:
            yield f"sample_grid.sizes: {text} is not a size of this model's images; choose {sizes.named()}"


def modality_problems(
    modalities: Sequence[ModalityConfig],
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    sizes: MediaSizes,
) -> Iterator[str]:
    """What keeps further modalities from being learned with the others."""
    if not modalities:
        return
    names = [modality.name for modality in modalities]
    if len(set(names)) != len(names):
        yield f"modalities: two have the same name among {', '.join(names)}"
    if model.family != "transfusion":
        yield f"modalities are for model.family=transfusion, not {model.family}; remove them"
    if train.sequence_parallel > 1:
        yield "train.sequence_parallel shares rows of texts and images alone; set it to 1, or remove modalities"
    for size in sizes.all[len(sizes.sizes) :]:
        if (patches := sizes.patches(size)) + 4 > data.sequence_length:
            yield (
                f"data.sequence_length {data.sequence_length} is too short for {size} of {patches} patches and its"
                " four control tokens"
            )


def sampling_problems(
    sample: SampleGridConfig, diffusion: DiffusionConfig, data: DataConfig
) -> Iterator[str]:
    """What keeps the training grid from being drawn."""
    fitting = SAMPLERS[diffusion.prediction]
    if sample.sampler not in ("auto", *fitting):
        yield (
            f"sample_grid.sampler={sample.sampler} cannot draw with diffusion.prediction={diffusion.prediction};"
            f" choose {' or '.join(fitting)}"
        )
    if sample.prompts and sample.steps > diffusion.steps:
        yield f"sample_grid.steps {sample.steps} must not exceed diffusion.steps {diffusion.steps}"
    if sample.prompts and sample.guidance != 1 and data.caption_dropout == 0:
        yield (
            f"sample_grid.guidance {sample.guidance:g} needs an unconditional branch, which data.caption_dropout=0"
            " does not train; set sample_grid.guidance=1"
        )


def freeze_problems(model: ModelConfig, train: TrainConfig) -> Iterator[str]:
    """What cannot be left untrained."""
    if not train.freeze:
        return
    name = f"train.freeze={train.freeze}".replace("'", "")
    if model.family != "transfusion":
        yield f"{name} is for model.family=transfusion; remove it"
    elif model.modality_weights == "shared":
        yield f"{name} leaves patches nothing to learn with; set model.modality_weights=all"
    for key, needed in (("stage", 3), ("offload_parameters", "none"), ("hpz_partition_size", 1)):
        if train.engine != "local" and getattr(train.zero, key) != needed:
            yield f"{name} needs train.zero.{key}={needed}"


def source_problems(data: DataConfig) -> Iterator[str]:
    """What the sources lack together."""
    schedules = [source.schedule for source in data.sources]
    for step in sorted({first for schedule in schedules for first, _ in schedule}):
        if not any([weight for first, weight in schedule if first <= step][-1] for schedule in schedules):
            yield f"data.sources: from step {step} on all sources have weight 0"
    names = [source.name for source in data.sources]
    if len(set(names)) != len(names):
        yield "data.sources: two sources have the same name"


def division_problems(model: ModelConfig, data: DataConfig, train: TrainConfig) -> Iterator[str]:
    """What keeps rows and heads from being shared by train.sequence_parallel ranks, in one sentence."""
    ranks = train.sequence_parallel
    shared = {
        "model.heads": model.heads,
        "model.num_kv_heads": model.kv_heads,
        "data.sequence_length": data.sequence_length,
    }
    uneven = [f"{name} {value}" for name, value in shared.items() if value % ranks]
    if uneven:
        yield f"train.sequence_parallel {ranks} must divide {', '.join(uneven)}"
