"""Text and images from one model: language mode and diffusion mode over one cached row."""

from transfusion.generate.engine import Engine
from transfusion.generate.events import Done, Event, ImageDone, ImagePreview, ImageStart, MediaDone, TextDelta
from transfusion.generate.inspection import Inspection
from transfusion.generate.pillow_images import to_image
from transfusion.generate.pipeline import ImageLike, Pipeline, Prompt, SampledImage
from transfusion.generate.recipe import Recipe, read_recipe
from transfusion.generate.request import Part, Request
from transfusion.generate.settings import AnswerSettings, ImageSettings
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.image_scores import Score
from transfusion.inference.runner import Media
from transfusion.inference.text_sampling import TextSampling

__all__ = [
    "AnswerSettings",
    "Done",
    "Engine",
    "Event",
    "ImageDone",
    "ImageLike",
    "ImagePreview",
    "ImageSampling",
    "ImageSettings",
    "ImageStart",
    "Inspection",
    "Media",
    "MediaDone",
    "Part",
    "Pipeline",
    "Prompt",
    "Recipe",
    "Request",
    "SampledImage",
    "Score",
    "TextDelta",
    "TextSampling",
    "read_recipe",
    "to_image",
]
