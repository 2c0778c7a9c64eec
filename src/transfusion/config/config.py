"""A whole configuration: its sections, and what follows from several of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_validator

from transfusion.config import rules
from transfusion.config.families import FAMILY_SETTINGS
from transfusion.config.sections import (
    CheckpointConfig,
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    LogConfig,
    ModalityConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SampleGridConfig,
    Section,
    TrainConfig,
)
from transfusion.sequence.sizes import MediaSizes


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    codec: CodecConfig = CodecConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    modalities: list[ModalityConfig] = Field(
        default_factory=list, description="further modalities beside text and images"
    )
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample_grid: SampleGridConfig = SampleGridConfig()
    eval: EvalConfig = EvalConfig()

    def with_vocabulary(self, pieces: int) -> Config:
        """The configuration with a row of the embedding for each of the tokenizer's pieces, each size of images but the
        first, and each shape of other media, unless it asks for more."""
        size = max(self.model.vocabulary, pieces + len(self.media_sizes.all) - 1)
        return self.model_copy(update={"model": self.model.model_copy(update={"vocabulary": size})})

    @property
    def media_sizes(self) -> MediaSizes:
        """The sizes of images and all else, how they are cut into patches, and what begins them: once the vocabulary is
        known."""
        return MediaSizes(
            self.codec.sizes,
            self.codec.downscale or 1,
            self.model.patch_size,
            self.model.vocabulary,
            self.codec.resize,
            tuple(modality.sizes for modality in self.modalities),
        )

    @property
    def patches_per_image(self) -> int:
        """Patches of an image of the first size."""
        return self.media_sizes.patches(self.codec.sizes[0])

    def warnings(self) -> list[str]:
        """What can be trained but hardly learns, one line each with its remedy."""
        return [*self._narrow_patches(), *self._narrow_arrays(), *self._untrained_text()]

    def _untrained_text(self) -> Iterator[str]:
        if self.train.freeze and not self.train.init_from:
            yield (
                "train.freeze=[text] in a new run keeps text as it was drawn at random; set train.init_from to a"
                " language model's folder, or go on with a run that has learned text"
            )

    def _narrow_patches(self) -> Iterator[str]:
        values, width = self.codec.depth * self.model.patch_size**2, self.model.hidden_size
        carries = values <= width or self.diffusion.prediction == "x"
        if self.model.patch_embed != "linear" or self.model.family != "transfusion" or carries:
            return
        yield (
            f"a patch has {values} values ({self.codec.depth} channels x model.patch_size {self.model.patch_size}"
            f" squared), more than model.hidden_size {width} can carry, so even its noise is lost; set"
            f" diffusion.prediction=x, which asks for the image alone, model.hidden_size={values} or more, a smaller"
            " model.patch_size, or model.patch_embed=unet"
        )

    def _narrow_arrays(self) -> Iterator[str]:
        """As of images, of further modalities."""
        width = self.model.hidden_size
        for each in self.modalities:
            if each.patch_values > width and each.diffusion.prediction != "x":
                yield (
                    f"a patch of modalities.{each.name} has {each.patch_values} values, more than model.hidden_size"
                    f" {width} can carry, so even its noise is lost; set its diffusion.prediction=x, a smaller patch,"
                    f" or model.hidden_size={each.patch_values} or more"
                )

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        """What a family's recipe has otherwise than the sections' defaults, where the values do not say."""
        model = values.get("model") if isinstance(values, dict) else None
        name = model.get("family") if isinstance(model, dict) else None
        family = FAMILY_SETTINGS.get(name) if isinstance(name, str) else None
        if family is None:
            return values
        filled = dict(values)
        for section, defaults in family.defaults.items():
            given = filled.get(section, {})
            if isinstance(given, dict):
                filled[section] = {**defaults, **given}
        return filled

    def _misfits(self) -> Iterator[str]:
        yield from rules.family_problems(self.model, self.codec, self.diffusion, self.train)
        yield from rules.size_problems(
            self.codec, self.data, self.diffusion, self.sample_grid, self.media_sizes
        )
        yield from self.diffusion.problems()
        yield from rules.modality_problems(
            self.modalities, self.model, self.data, self.train, self.media_sizes
        )
        yield from rules.sampling_problems(self.sample_grid, self.diffusion, self.data)
        yield from rules.freeze_problems(self.model, self.train)
        if self.eval.every and not self.eval.suites and not self.data.validation:
            yield "eval.every needs data.validation, or eval.suites with data of their own; name one"
        if self.eval.every % self.checkpoint.every:
            yield (
                f"eval.every {self.eval.every} is no multiple of checkpoint.every {self.checkpoint.every}, and what is"
                " evaluated is saved before; change one of them"
            )
        yield from rules.source_problems(self.data)
        yield from rules.division_problems(self.model, self.data, self.train)
        if self.optimizer.final_learning_rate > self.optimizer.learning_rate:
            yield "optimizer.final_learning_rate must not exceed optimizer.learning_rate"
