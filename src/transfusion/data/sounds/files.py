"""WAV and FLAC as one channel of 16 kHz, and the reason why a file is no sound.

A file is decoded whole when its shard is indexed: its header tells neither that it is cut short nor that some sample is
not finite.
"""

from __future__ import annotations

import io
import wave
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.config.sections import SAMPLE_RATE
from transfusion.data.shards.sample import SampleError
from transfusion.errors import UserError

try:
    import soundfile
    import soxr
except ImportError:
    soundfile = soxr = None

# Samples of all channels, and of one at `SAMPLE_RATE`. Ten minutes of stereo at 48 kHz are 57.6 million.
MAX_SAMPLES = 60_000_000
_RATES = (1_000, 384_000)
# Of a WAV whose length nobody knew when its header was written.
_UNKNOWN_SIZE = 0xFFFFFFFF
# What a sound begins with. Other decoders of libsndfile never see a byte: broken files make some fill the log.
SOUND_HEADS = (b"RIFF", b"RIFX", b"RF64", b"fLaC")
_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")


class SoundFacts(NamedTuple):
    """Samples of a file once it is brought to `SAMPLE_RATE`."""

    samples: int


def probe(data: bytes) -> SoundFacts:
    """Facts of a WAV or FLAC, by content. Raises SampleError: broken, cut short, or outside the limits."""
    values, rate = _decoded(data)
    return SoundFacts(_resampled_length(len(values), rate))


def decode_to(data: bytes, samples: int) -> NDArray[np.float32]:
    """The sound as float32 [1, 1, samples], mean of its channels, with silence behind it. Raises SampleError."""
    values, rate = _decoded(data)
    if rate != SAMPLE_RATE:
        values = soxr.resample(values, rate, SAMPLE_RATE)
    if len(values) > samples:
        values = values[:samples]
    return np.pad(values, (0, samples - len(values)))[None, None]


def as_wav(values: NDArray[np.float32]) -> bytes:
    """Samples [T] at `SAMPLE_RATE` as a WAV of 16 bits. What is louder than full scale is cut."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, len(values), "NONE", ""))
        file.writeframes((np.clip(values, -1, 1) * 32767).round().astype("<i2").tobytes())
    return stream.getvalue()


def _resampled_length(samples: int, rate: int) -> int:
    return -(-samples * SAMPLE_RATE // rate)


def _decoded(data: bytes) -> tuple[NDArray[np.float32], int]:
    """One channel, and its rate."""
    if soundfile is None:
        raise UserError("files of sound need soundfile and soxr: pip install 'transfusion-mm[audio]'")
    if not data:
        raise SampleError("sound_empty")
    if not data.startswith(SOUND_HEADS):
        raise SampleError("sound_corrupt")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in _FORMATS:
                raise SampleError("sound_corrupt")
            if not _RATES[0] <= file.samplerate <= _RATES[1]:
                raise SampleError("sound_rate")
            if file.frames <= 0:
                raise SampleError("sound_empty")
            stated, rate = file.frames, file.samplerate
            if max(stated * file.channels, _resampled_length(stated, rate)) > MAX_SAMPLES:
                raise SampleError("sound_too_long")
            values = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError):
        raise SampleError("sound_corrupt") from None
    if len(values) < stated or _is_cut(data):
        raise SampleError("sound_truncated")
    if not np.isfinite(values).all():
        raise SampleError("sound_not_finite")
    # A mean of one channel is that channel, to the bit.
    return values.mean(axis=1, dtype=np.float32), rate


def _is_cut(data: bytes) -> bool:
    """Whether a WAV holds fewer bytes of samples than it says: what is there would be read as the whole."""
    if data[:4] not in (b"RIFF", b"RIFX") or data[8:12] != b"WAVE":
        return False
    order, position = ("little" if data[:4] == b"RIFF" else "big"), 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], order)  # type: ignore[arg-type]
        if data[position : position + 4] == b"data":
            return size != _UNKNOWN_SIZE and position + 8 + size > len(data)
        position += 8 + size + size % 2
    return True
