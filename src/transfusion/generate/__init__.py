"""Text and images from one model: language mode and diffusion mode over one cached row."""

from transfusion.generate.images import ImageSampling
from transfusion.generate.language import TextSampling
from transfusion.generate.pipeline import Part, Pipeline, SampledImage

__all__ = ["ImageSampling", "Part", "Pipeline", "SampledImage", "TextSampling"]
