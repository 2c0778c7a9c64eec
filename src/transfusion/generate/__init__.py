"""Text and images from one model: language mode and diffusion mode over one cached row."""

from transfusion.generate.engine import Engine, Part, Request
from transfusion.generate.events import Done, Event, ImageDone, ImagePreview, ImageStart, TextDelta
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.text_sampling import TextSampling

__all__ = [
    "Done",
    "Engine",
    "Event",
    "ImageDone",
    "ImagePreview",
    "ImageSampling",
    "ImageStart",
    "Part",
    "Pipeline",
    "Request",
    "SampledImage",
    "TextDelta",
    "TextSampling",
]
