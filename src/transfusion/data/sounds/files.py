"""WAV and FLAC as one channel of 16 kHz, and the reason why a file is no sound.

A file is decoded whole when its shard is indexed: its header tells neither that it is cut short nor that some sample is
not finite.
"""

from __future__ import annotations

import io
import wave
from typing import Literal, NamedTuple

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

# Samples of all channels. Ten minutes of stereo at 48 kHz are 57.6 million.
MAX_SAMPLES = 60_000_000
_RATES = (1_000, 384_000)
# Beyond it sums over channels and spectrograms would not be finite in float32.
_LOUDEST = 1e30
# Of a WAV whose length nobody knew when its header was written, and what soundfile tells of such a FLAC.
_UNKNOWN_SIZE, _UNKNOWN_LENGTH = 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF
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
        # With a second that resampling looks ahead to: of a low rate the whole may be many times larger than the file.
        values = soxr.resample(values[: samples * rate // SAMPLE_RATE + rate], rate, SAMPLE_RATE)
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
            if file.frames == _UNKNOWN_LENGTH:
                raise SampleError("sound_length")
            if file.frames * file.channels > MAX_SAMPLES:
                raise SampleError("sound_too_long")
            stated, rate = file.frames, file.samplerate
            values = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError):
        raise SampleError("sound_corrupt") from None
    if len(values) < stated or _is_cut(data):
        raise SampleError("sound_truncated")
    # No comparison with NaN is true.
    if not -_LOUDEST < values.min() <= values.max() < _LOUDEST:
        raise SampleError("sound_not_finite")
    return values[:, 0] if values.shape[1] == 1 else values.mean(axis=1, dtype=np.float32), rate


def _is_cut(data: bytes) -> bool:
    """Whether a WAV holds fewer bytes of samples than it says: what is there would be read as the whole."""
    if data[:4] not in (b"RIFF", b"RIFX", b"RF64") or data[8:12] != b"WAVE":
        return False
    order: Literal["little", "big"] = "big" if data[:4] == b"RIFX" else "little"
    position, long = 12, _UNKNOWN_SIZE
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], order)
        if name == b"ds64":
            # Sizes of more than 32 bits: of all, and then of the samples.
            long = int.from_bytes(data[position + 16 : position + 24], order)
        if name == b"data":
            size = long if size == _UNKNOWN_SIZE else size
            return size != _UNKNOWN_SIZE and position + 8 + size > len(data)
        position += 8 + size + size % 2
    return True
