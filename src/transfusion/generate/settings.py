"""How answers and images are asked for, as keyword arguments of `Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from transfusion.errors import UserError
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.sequence.sizes import Size
from transfusion.tokens import MAX_SAMPLING_SEED


class ImageSettings(TypedDict, total=False):
    """How images are drawn. Each may be left out.

    Attributes:
        guidance: Scale of classifier-free guidance, at least 0. 1 is the model itself. Any other value needs a model
            that was trained with `data.caption_dropout` above 0. Default 3.
        guidance_interval: Guidance is applied while the timestep, as a share of those of training, lies in it. 1 is
            noise alone, 0 the image. A smaller interval calls the model less. Default (0, 1).
        guidance_rescale: From 0 to 1, how far a guided prediction takes the deviation of the conditional one, so that
            strong guidance does not burn images out. Default 0.
        negative_prompt: What guidance leads away from. Default "": an image without a caption.
        steps: Sampler steps of an image, from 1 to `diffusion.steps`. Each calls the model once. With heun it is twice,
            except in the last. A Chameleon model draws token by token, whatever the steps and the sampler. Default 25.
        sampler: "ddim", "ddpm" or "dpmpp_2m", for prediction of flow or x "euler", "heun" or "dpmpp_2m". Default
            "auto": ddim, or euler.
        size: Height and width in pixels, one of the model's sizes. Default None: the first, or in an answer the one
            that the model chooses.
    """

    guidance: float
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    negative_prompt: str
    steps: int
    sampler: str
    size: Size | tuple[int, int] | None


class AnswerSettings(ImageSettings, total=False):
    """How a prompt is answered. Each may be left out.

    Attributes:
        max_tokens: Maximum of new text tokens, at least 1. Default 256.
        max_images: Maximum of new images. 0 writes text alone. Default 4.
        temperature: Of the softmax over the next token, at least 0. 0 takes the likeliest token. Default 0.
        top_p: In (0, 1]. Only the likeliest tokens whose probabilities together reach it are drawn. Default 1: all.
        modalities: What an answer may have beside text: "image", and names of further modalities. They count as images.
            Default ("image",).
    """

    max_tokens: int
    max_images: int
    temperature: float
    top_p: float
    modalities: Sequence[str]


def image_sampling(settings: ImageSettings, seed: int) -> ImageSampling:
    """Settings as the engine takes them, not checked yet.

    Raises:
        UserError: For a size or an interval that is no pair.
    """
    size, interval = settings.get("size"), settings.get("guidance_interval", (0.0, 1.0))
    for name, pair in {"size": size, "guidance_interval": interval}.items():
        is_pair = isinstance(pair, Size) or (isinstance(pair, Sequence) and len(pair) == 2)
        if pair is not None and not is_pair:
            what = "height and width" if name == "size" else "two shares of the timesteps"
            raise UserError(f"{name} must be {what}, got {pair!r}")
    plain = {
        **settings,
        "size": size if size is None or isinstance(size, Size) else Size(*size),
        "guidance_interval": tuple(interval),
    }
    return ImageSampling(seed=seed, **plain)  # type: ignore[arg-type]


def check_at_least(least: int, **counts: int) -> None:
    """Raise UserError for a count below the least."""
    for name, count in counts.items():
        if count < least:
            raise UserError(f"{name} {count} must be at least {least}")


def check_seeds(seed: int, count: int) -> None:
    """Raise UserError unless so many images or answers, numbered from `seed` on, have seeds."""
    last = seed + max(count - 1, 0)
    if not 0 <= seed <= last <= MAX_SAMPLING_SEED:
        seeds = f"seed {seed}" if last == seed else f"seeds {seed} to {last}"
        raise UserError(f"{seeds} must lie in [0, {MAX_SAMPLING_SEED}]")


def check_text(text: str) -> None:
    """Raise UserError for what is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"a prompt is not Unicode text: {ascii(text)[:60]}; give it as UTF-8") from None
