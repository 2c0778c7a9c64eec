"""Text and images from one model: language mode and diffusion mode over one cached row."""

from transfusion.generate.pipeline import Part, Pipeline, SampledImage
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.text_sampling import TextSampling

__all__ = ["ImageSampling", "Part", "Pipeline", "SampledImage", "TextSampling"]
