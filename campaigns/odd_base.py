"""What the kinds of odd inputs share: how one is judged, and small things that they are made of."""

from __future__ import annotations

import functools
import io
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from transfusion.codec.networks import new_network, save_network
from transfusion.data.shards.sample import SampleError
from transfusion.errors import UserError
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

# Sound inputs that are refused by name all the same.
LIMITS = ("image_transparency",)
# Of the process, not of the clock, so that a busy machine makes no hangs.
HANG_SECONDS = 5.0
SILENT = "is read as if nothing were odd"
# Folders that are there as long as this process.
kept: list[tempfile.TemporaryDirectory[str]] = []


class Outcome(NamedTuple):
    """what: the input, for eyes. verdict: read, refused or failed. wrong: what is wrong with that; empty: nothing."""

    what: str
    verdict: str
    wrong: str = ""


class Hang(BaseException):
    """No Exception, since readers turn those into refusals."""


def judge(
    what: str,
    check: Callable[[], str],
    *,
    sure: bool = False,
    refusals: tuple[type[Exception], ...] = (UserError, SampleError),
) -> Outcome:
    """check: reads the input and tells what is wrong with what it got. sure: to refuse the input is wrong too."""

    def stop(*_: object) -> None:
        raise Hang

    former = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
    try:
        return Outcome(what, "read", check())
    except refusals as error:
        # Of a configuration with several problems each has a line.
        told = re.sub(r"^(\d+ problems in [^\n]*:)\n|\n(?=  - )", r"\1", str(error))
        wrong = "" if told.isprintable() else f"is refused in several lines: {str(error)[:80]!r}"
        sure = sure and str(error) not in LIMITS
        return Outcome(what, "refused", f"is refused: {error}" if sure else wrong)
    except Hang:
        return Outcome(what, "failed", f"takes more than {HANG_SECONDS:.0f} s")
    except Exception as error:
        return Outcome(what, "failed", f"gives {type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


@functools.cache
def kl_folder() -> Path:
    """A tiny autoencoder, in a folder that is there as long as this process."""
    kept.append(tempfile.TemporaryDirectory(prefix="odd-inputs-codec-"))
    torch.manual_seed(0)
    network = new_network(
        "kl", channels=3, latent_channels=2, widths=(8,), layers=1, groups=4, attention=False, image_size=8
    )
    save_network(network, Path(kept[-1].name))
    return Path(kept[-1].name)


def stored(image: Image.Image, kind: str, profile: bytes, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, icc_profile=profile or None, **options)
    return stream.getvalue()


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        texts = ["a photo of a fox, some text and numbers 0123456789 {}"] * 9
        return train_tokenizer(texts, Path(folder) / "tokenizer.model", vocabulary=300)
