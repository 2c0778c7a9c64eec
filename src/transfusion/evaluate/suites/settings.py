"""What each suite of `transfusion eval` measures, and how: the sections of a file of suites, with their defaults."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from transfusion.config import Section, SourceConfig
from transfusion.config.sections import FilePath, SamplingSeed, Seed


class SuiteConfig(Section):
    """One suite."""

    data: list[SourceConfig] = Field(
        default_factory=list, description="what is measured, as in data.validation; empty: that of the model"
    )

    @field_validator("data")
    @classmethod
    def _has_names_of_their_own(cls, data: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in data]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two sources of a suite's data are named {twice[0]}, which their figures would share; rename one"
            )
        return data

    @property
    def reads_data(self) -> bool:
        """Whether `data`, or the model's own, is what is measured."""
        return True


class OwnDataSuite(SuiteConfig):
    """A suite that measures what it brings, so that `data` stays empty."""

    @property
    def reads_data(self) -> bool:
        """Whether `data`, or the model's own, is what is measured."""
        return False


class DrawingSuite(SuiteConfig):
    """A suite that draws images."""

    count: PositiveInt = Field(1000, description="images that are drawn, of the captions in turn")
    sampler: str = Field(
        "", description="sampler; empty: the quick one of the model's prediction, ddim or euler"
    )
    steps: PositiveInt = Field(25, description="steps of the sampler, at most diffusion.steps")
    guidance: PositiveFloat | None = Field(
        None, description="scale of guidance; null: 3, and 1 for a model that knows no dropped captions"
    )
    seed: SamplingSeed = Field(0, description="seed of the first image")
    batch: PositiveInt = Field(128, description="images that are drawn at once")


class DescribingSuite(SuiteConfig):
    """A suite that captions images."""

    max_tokens: PositiveInt = Field(32, description="tokens of a caption at most")
    caption_batch: PositiveInt = Field(256, description="images that are captioned at once")


class ValidationSuite(SuiteConfig):
    """Losses on each source."""


class DenoiseSuite(SuiteConfig):
    """The clean image that a model sees in a noisy one, by level of noise."""

    levels: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.1, 0.3, 0.5, 0.7, 0.9, 0.99],
        description="levels of noise, each its deviation over the root of its square plus that of the signal",
    )
    seed: Seed = Field(0, description="seed of the noise, the same for every model")
    limit: NonNegativeInt = Field(0, description="documents of each source, the same ones each time; 0: all")


class SamplesSuite(DrawingSuite, DescribingSuite):
    """A look at a few images and captions."""

    count: PositiveInt = Field(16, description="images that are drawn, of captions that are evenly spread")
    captions: PositiveInt = Field(128, description="images that are captioned, evenly spread")


class DigitsSuite(DrawingSuite, DescribingSuite):
    """Handwritten digits, drawn and named."""

    count: PositiveInt = Field(20, description="images of each of the ten digits")
    sampler: str = Field("", description="sampler; empty: ddpm, or euler where the prediction is flow or x")
    steps: PositiveInt = Field(50, description="steps of the sampler")
    batch: PositiveInt = Field(200, description="images that are drawn at once")


class SpokenDigitsSuite(DrawingSuite, DescribingSuite):
    """Spoken digits, said and written down."""

    count: PositiveInt = Field(8, description="sounds of each of the ten digits")


class CaptionsSuite(DescribingSuite):
    """Captions of all images."""


class NearestSuite(DrawingSuite):
    """Whether images are copies."""

    count: PositiveInt = Field(64, description="images that are drawn, of captions that are evenly spread")


class EditSuite(DrawingSuite):
    """Images behind an image and a text."""

    count: PositiveInt = Field(64, description="documents, the first ones")
    guidance: PositiveFloat | None = Field(
        1.0, description="scale of guidance; training drops no text of such documents, so 1 is what is learnt"
    )
    draws: PositiveInt = Field(32, description="timesteps and noises at which each last image is scored")


class StepsSuite(DrawingSuite):
    """Few steps against many, by sampler."""

    count: PositiveInt = Field(16, description="images of each sampler and number of steps")
    sampler: str = Field("dpmpp_2m", description="sampler whose many steps are the goal")
    steps: PositiveInt = Field(250, description="steps of the goal, at most diffusion.steps")
    tried: list[PositiveInt] = Field(
        [4, 8, 12, 25, 50], description="numbers of steps that are compared with it"
    )


class ImagesSuite(DrawingSuite):
    """Images in the eyes of a classifier."""

    classifier: FilePath = Field("", description="file of `transfusion classifier`; --classifier sets it too")


class GuidanceSuite(ImagesSuite):
    """The same at the scale of guidance that suits the model."""

    scales: list[PositiveFloat] = Field([1.0, 2.0, 3.0, 5.0, 8.0], description="scales that are tried")
    tried: PositiveInt = Field(250, description="images of each scale")


class TextToImageSuite(DrawingSuite):
    """Images of captions against real ones, by published networks."""

    count: PositiveInt = Field(5000, description="images that are drawn, of captions that are evenly spread")
    inception: FilePath = Field(
        "",
        description="pt_inception-2015-12-05-6726825d.pth, or `published`: torch's copy of that file; empty: a"
        " stand-in, whose figures are no FID",
    )
    dinov2: FilePath = Field(
        "", description="folder of a DINOv2 of transformers, or its name on the hub; empty: no fd_dinov2"
    )
    clip: FilePath = Field(
        "", description="folder of a CLIP of transformers, or its name on the hub; empty: no clip_score"
    )
    download: bool = Field(False, description="fetch networks named so that are not on this machine")
    chunk: PositiveInt = Field(
        256, description="images of one file under evaluation/, what a killed process loses at most"
    )
    kid_subsets: PositiveInt = Field(100, description="subsets of the kernel distance")
    kid_subset_size: Annotated[int, Field(ge=2)] = Field(
        1000, description="images of each subset, at most those drawn and those of the data"
    )


class PromptsSuite(OwnDataSuite, DrawingSuite):
    """Images of the prompts of a file. They are all that is measured, and `data` stays empty."""

    prompts: FilePath = Field("", description="the file of prompts, of your own clone of the benchmark")
    limit: NonNegativeInt = Field(0, description="prompts, the first ones; 0: all")
    chunk: PositiveInt = Field(16, description="prompts that a killed process loses at most")


class GenevalSuite(PromptsSuite):
    """Images in the layout of GenEval, for its own scorer."""

    count: PositiveInt = Field(4, description="images of each prompt")


class Geneval2Suite(PromptsSuite):
    """GenEval 2, judged by Soft-TIFA."""

    count: PositiveInt = Field(1, description="images of each prompt")
    vqa: FilePath = Field(
        "",
        description="folder of a model of transformers that answers questions about images, or its name on the hub,"
        " required",
    )
    download: bool = Field(False, description="fetch the model where it is not on this machine")


class PerplexitySuite(SuiteConfig):
    """How well texts are predicted, as lm-evaluation-harness counts it."""

    texts: list[FilePath] = Field(
        default_factory=list,
        description="files to measure in place of data; a .jsonl holds a text a line, any other file is one text",
    )

    @property
    def reads_data(self) -> bool:
        """Whether `data`, or the model's own, is what is measured."""
        return not self.texts


class LanguageSuite(OwnDataSuite):
    """Tasks of lm-evaluation-harness, such as HellaSwag. They bring their data, and `data` stays empty."""

    tasks: FilePath = Field(
        "hellaswag,piqa,social_iqa,winogrande,arc_easy,arc_challenge,boolq",
        description="names of tasks of the harness, or a folder of tasks and their data",
    )
    download: bool = Field(False, description="let data that are not on this machine come from the hub")


class LmmsSuite(OwnDataSuite):
    """Tasks of lmms-eval about images, such as captions of COCO. They bring their data, and `data` stays empty."""

    tasks: FilePath = Field(
        "coco2017_cap_val_lite",
        description="names of tasks of the harness, or a folder of tasks and their data",
    )
    context: bool = Field(
        True, description="in tasks that generate, put a task's text behind its images; false: images alone"
    )
    batch: PositiveInt = Field(64, description="prompts that are answered at once")
    download: bool = Field(False, description="let data that are not on this machine come from the hub")
