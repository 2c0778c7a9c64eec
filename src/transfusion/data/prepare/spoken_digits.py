"""Ten words, spoken by the speech synthesiser of the system: sound with its text, without a download."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from transfusion.data.prepare.digits import DIGIT_WORDS
from transfusion.data.prepare.folders import Collection, image_sample
from transfusion.data.shards.webdataset import Sample
from transfusion.errors import UserError

SPOKEN_DIGITS = "spoken-digits"
_PROGRAM = "espeak-ng"
# An accent, and what makes the voice another person's. The last one is held out.
_VOICES = ("en-gb", "en-us+f2", "en-gb-scotland+m3", "en-029+f3", "en-gb-x-rp+m5")
_HELD_OUT = ("en-gb-x-gbclan+f4",)
# Words a minute, and pitch from 0 to 99.
_SPEEDS, _PITCHES = (150, 170, 190, 210), (30, 45, 55, 70)


def collect_spoken_digits() -> Collection:
    """Each word by five voices at four speeds and four pitches, and by a sixth voice for validation.

    Raises UserError where the synthesiser is missing.
    """
    if shutil.which(_PROGRAM) is None:
        raise UserError(f"{_PROGRAM} is not installed, which speaks the digits: apt-get install {_PROGRAM}")
    version = subprocess.run([_PROGRAM, "--version"], capture_output=True, text=True, check=False).stdout
    identity = {
        "kind": SPOKEN_DIGITS,
        "synthesiser": version.split("Data at")[0].strip(),
        "voices": [_VOICES, _HELD_OUT],
        "speeds": _SPEEDS,
        "pitches": _PITCHES,
    }
    return Collection(identity, _spoken(_VOICES), _spoken(_HELD_OUT))


def _spoken(voices: Sequence[str]) -> Iterator[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "word.wav"
        for voice, speed, pitch, word in itertools.product(voices, _SPEEDS, _PITCHES, DIGIT_WORDS):
            settings = ["-v", voice, "-s", str(speed), "-p", str(pitch)]
            made = subprocess.run(
                [_PROGRAM, *settings, "-w", str(path), word], capture_output=True, check=False
            )
            if made.returncode or not path.exists():
                told = made.stderr.decode(errors="replace").strip()
                raise UserError(
                    f"{_PROGRAM} cannot speak with the voice {voice} ({told}); install its voices"
                )
            yield image_sample(path.read_bytes(), "wav", word, voice=voice, speed=speed, pitch=pitch)
