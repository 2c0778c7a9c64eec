"""What a prompt names as a file, and what becomes of sounds and other arrays: sounds as WAV, arrays as NumPy files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfusion.config import Config, ModalityConfig
from transfusion.config.sections import SAMPLE_RATE
from transfusion.data.images.latents import read_latent
from transfusion.data.shards.sample import SampleError
from transfusion.data.sounds.files import SOUND_HEADS, as_wav, decode_to, probe
from transfusion.errors import UserError
from transfusion.generate.pillow_images import read_image
from transfusion.inference.runner import Media

_ARRAY = b"\x93NUMPY"
# What a user is told of a file that is no sound, as `read_image` tells of images.
_UNFIT = {
    "sound_empty": "it holds no sound; give a longer one",
    "sound_truncated": "it is cut short; give the whole file",
    "sound_rate": "its rate is none that a sound has; give 1 to 384 kHz",
    "sound_length": "its header does not tell its length, as of what comes from a pipe; write it anew to a file",
    "sound_too_long": "it has far too many samples; cut it",
    "sound_not_finite": "some of its samples are not finite; write it anew",
}


class MediaFile(NamedTuple):
    """A sound or an array as it is written: the ending of its name, its media type, its bytes."""

    suffix: str
    media_type: str
    data: bytes


def read_media(data: bytes, config: Config, name: str) -> Tensor | Media:
    """The bytes of a file as a part of a prompt, told by what they are: an image, a sound or an array, as in training.

    Args:
        data: JPEG, PNG, WebP, WAV, FLAC, or a NumPy file of an array that has one of its modality's shapes.
        config: The model's.
        name: Of the file. As in shards, an array's says whose it is (KEY.MODALITY.npy), where there are several.

    Returns:
        uint8 [C, H, W] of an image, or the array of another modality. A sound is resampled, with silence behind it.

    Raises:
        UserError: For what is none of these, or of a modality that the model does not have. It begins with the name.
    """
    if data.startswith(_ARRAY):
        return read_as(_of_array(config, name), data, name)
    if data.startswith(SOUND_HEADS):
        return read_as(_of_sound(config, name), data, name)
    return read_image(data, config, name)


def read_as(modality: ModalityConfig, data: bytes, name: str) -> Media:
    """As `read_media`, for a file of which it is known what it must be."""
    values = _sound(data, modality, name) if modality.kind == "mel" else _array(data, name)
    return Media(modality.name, torch.from_numpy(values))


def as_file(media: Media, config: Config) -> MediaFile:
    """A sound as a WAV of 16 bits at 16 kHz, another array as a NumPy file of float32."""
    if _declared(config, media.modality).kind == "mel":
        return MediaFile("wav", "audio/wav", as_wav(media.values.flatten().numpy()))
    stream = io.BytesIO()
    np.save(stream, media.values.float().numpy())
    return MediaFile("npy", "application/octet-stream", stream.getvalue())


def _declared(config: Config, modality: str) -> ModalityConfig:
    return next(each for each in config.modalities if each.name == modality)


def _of_sound(config: Config, name: str) -> ModalityConfig:
    modality = next((each for each in config.modalities if each.kind == "mel"), None)
    if modality is None:
        raise UserError(f"{name} is a sound, and this model has no modality of kind mel; give text or images")
    return modality


def _of_array(config: Config, name: str) -> ModalityConfig:
    known = {each.name: each for each in config.modalities if each.kind == "latents"}
    named = Path(name).stem.rpartition(".")[2]
    if not known:
        raise UserError(
            f"{name} is an array, and this model has no modality of kind latents; give text or images"
        )
    if named not in known and len(known) > 1:
        raise UserError(f"{name}: name the file KEY.MODALITY.npy, with {' or '.join(known)} as MODALITY")
    return known.get(named) or next(iter(known.values()))


def _sound(data: bytes, modality: ModalityConfig, name: str) -> NDArray[np.float32]:
    sizes = modality.sizes
    longest = max(size.width for size in sizes.sizes)
    try:
        length = np.array([probe(data).samples])
        if length > longest:
            raise UserError(f"{name}: it is longer than {longest / SAMPLE_RATE:.2f} s; cut it")
        (number,) = sizes.numbers(np.ones_like(length), length, np.array([False]))
        return decode_to(data, sizes.sizes[number].width)
    except SampleError as error:
        unread = "it is no sound that can be read; give a WAV or FLAC file"
        raise UserError(f"{name}: {_UNFIT.get(str(error), unread)}") from None


def _array(data: bytes, name: str) -> NDArray[np.float32]:
    try:
        return read_latent(data)
    except SampleError:
        raise UserError(
            f"{name}: it is no array that can be read; give a NumPy file of float16 or float32"
        ) from None
