"""Sound as log-mel spectrograms, and back to sound for listening.

I sounds, T samples, F frequencies, M bands, W frames, E values of a patch, w patches.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from transfusion.codec.interface import grey
from transfusion.config import ModalityConfig
from transfusion.config.sections import MEL_BANDS, MEL_HOP, SAMPLE_RATE

WINDOW = 1024
# What silence is taken for: log(1e-5) is -11.5.
FLOOR = 1e-5
# Of Griffin-Lim: phases are guessed so often, each time led on by the change before (Perraudin et al., 2013).
_ITERATIONS, _MOMENTUM = 32, 0.99

# Of a picture, in nats: what is 80 dB below the loudest is black, as silence is.
_SHOWN_RANGE = 9.2


class MelCodec:
    """Sound [I, 1, 1, T] at 16 kHz to latents [I, E, 1, w], and back.

    A frame is 80 bands of the HTK mel scale from 0 to 8 kHz, the natural logarithm of magnitudes of a Hann window of
    1,024 samples, each 256 samples. A latent is the frames of one patch.
    """

    def __init__(self, config: ModalityConfig) -> None:
        self._frames = config.block[1] // MEL_HOP
        self._scale, self._shift = config.scale, config.shift
        # Kept for the whole process, and so made before a plan runs the network on tensors that hold nothing.
        bands(torch.device("cpu"))

    def encode(self, values_I11T: Tensor) -> Tensor:
        """fp32 latents of about unit variance."""
        normed = (spectrogram(values_I11T) - self._shift) * self._scale
        return normed.unflatten(2, (-1, self._frames)).permute(0, 1, 3, 2).flatten(1, 2)[:, :, None]

    def decode(self, latent_IE1w: Tensor) -> Tensor:
        """Sound whose spectrogram is near to these latents: the phases are guessed (Griffin and Lim, 1984)."""
        frames = latent_IE1w.squeeze(2).unflatten(1, (MEL_BANDS, -1)).permute(0, 1, 3, 2).flatten(2)
        mel_IMW = (frames.float() / self._scale + self._shift).exp()
        # Of all spectra with these bands the least one, where it is none below zero.
        magnitude_IFW = (torch.linalg.pinv(bands(mel_IMW.device)) @ mel_IMW).clamp(min=0.0)
        return _with_phases(torch.cat((magnitude_IFW, magnitude_IFW[..., -1:]), dim=-1))[:, None, None]

    def picture(self, values_11T: Tensor) -> Tensor:
        """The spectrogram, high tones above, bright where it is loud."""
        (mel_MW,) = spectrogram(values_11T[None])
        return grey(mel_MW.clamp(min=mel_MW.max() - _SHOWN_RANGE).flip(0))


def spectrogram(values_I11T: Tensor) -> Tensor:
    """Natural logarithms of magnitudes in bands, fp32 [I, M, W]."""
    sound_IT = values_I11T.float().flatten(1)
    # The last frame, around the end, would be one more than there are hops.
    magnitude_IFW = _transform(sound_IT)[..., :-1].abs()
    return (bands(sound_IT.device) @ magnitude_IFW).clamp(min=FLOOR).log()


def _transform(sound_IT: Tensor) -> Tensor:
    """Complex [I, F, W + 1]."""
    window = torch.hann_window(WINDOW, device=sound_IT.device)
    return torch.stft(sound_IT, WINDOW, MEL_HOP, window=window, pad_mode="constant", return_complex=True)


def _with_phases(magnitude_IFW: Tensor) -> Tensor:
    """Sound [I, T] of these magnitudes. The same ones give the same sound."""
    window = torch.hann_window(WINDOW, device=magnitude_IFW.device)
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(magnitude_IFW.shape[1:], generator=generator).to(magnitude_IFW.device) * (2 * math.pi)
    phase_IFW = torch.polar(torch.ones_like(angle), angle).expand(len(magnitude_IFW), -1, -1)
    length = (magnitude_IFW.shape[-1] - 1) * MEL_HOP

    def sound() -> Tensor:
        return torch.istft(magnitude_IFW * phase_IFW, WINDOW, MEL_HOP, window=window, length=length)

    before = torch.zeros_like(phase_IFW)
    for _ in range(_ITERATIONS):
        made = _transform(sound())
        led = made + _MOMENTUM / (1 + _MOMENTUM) * (made - before)
        phase_IFW, before = led / led.abs().clamp(min=1e-12), made
    return sound()


@functools.lru_cache(maxsize=4)
def bands(device: torch.device) -> Tensor:
    """Triangles of the mel scale [M, F], each as high as 1."""

    def to_mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    corner_mel = torch.linspace(0, to_mel(SAMPLE_RATE / 2), MEL_BANDS + 2, dtype=torch.float64)
    corner_hertz = 700 * (10 ** (corner_mel / 2595) - 1)
    frequency_F = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    left, middle, right = (corner_hertz[first : first + MEL_BANDS, None] for first in range(3))
    rising, falling = (frequency_F - left) / (middle - left), (right - frequency_F) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0).float().to(device)
