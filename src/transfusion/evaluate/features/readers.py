"""What is read of images: the networks that a suite's settings name, each with what its figures say of it.

I images, C channels, H/W image height and width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transfusion.errors import UserError
from transfusion.evaluate.features.inception import SIDE, STAND_IN_SIDE, StandIn, load_inception
from transfusion.evaluate.features.published import Read, clip_cosines, dinov2_features, folder_digest
from transfusion.evaluate.features.resize import resized
from transfusion.evaluate.features.weights import hub_folder, inception_file
from transfusion.files import file_digest

INCEPTION, STAND_IN, DINOV2, CLIP = "inception", "standin", "dinov2", "clip"
_BATCH = 64


@dataclass(frozen=True)
class Reader:
    """One network. source: the network and its weights, as figures name them. digest: of the weights."""

    name: str
    source: str
    digest: str
    read: Read

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], captions: Sequence[str]) -> NDArray[np.float32]:
        """What it reads of uint8 images [C, H, W] of any sizes: features [I, F], or a number for each.

        Raises UserError for what is not finite, since only damaged weights give that.
        """
        found = []
        # FID's figures are those of fp32, and convolutions on GPUs would be rounded further.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, len(images), _BATCH):
                part = slice(start, start + _BATCH)
                found.append(self.read(images[part], captions[part]).float().cpu().numpy())
        values = np.concatenate(found) if found else np.empty(0, np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{self.source} gives numbers that are not finite; copy its weights again")
        return values


def open_readers(
    device: torch.device, *, inception: str = "", dinov2: str = "", clip: str = "", download: bool = False
) -> list[Reader]:
    """The named networks, and the stand-in without Inception. Raises UserError for what is missing or does not fit.

    download: fetch those that are named by what they are called and are not on this machine.
    """
    readers = [
        _inception(inception_file(inception, download=download), device) if inception else _stand_in(device)
    ]
    if dinov2:
        folder = hub_folder(dinov2, download=download)
        readers.append(
            _of_folder(DINOV2, f"DINOv2 of {_called(dinov2)}", folder, dinov2_features(folder, device))
        )
    if clip:
        folder = hub_folder(clip, download=download)
        readers.append(_of_folder(CLIP, f"CLIP of {_called(clip)}", folder, clip_cosines(folder, device)))
    return readers


def _called(name: str) -> str:
    """A folder's last part. That of the hub's cache would be a hash."""
    return Path(name).name


def identity(readers: Sequence[Reader]) -> Mapping[str, Any]:
    """The digest of each network's weights."""
    return {reader.name: reader.digest for reader in readers}


def _inception(path: Path, device: torch.device) -> Reader:
    network = load_inception(path)
    digest = file_digest(path)
    return Reader(
        INCEPTION,
        f"Inception v3 of {path.name} (digest {digest})",
        digest,
        _of_pixels(network, SIDE, device),
    )


def _stand_in(device: torch.device) -> Reader:
    source = "a stand-in, a small network with random weights: no Inception, and so no FID"
    return Reader(STAND_IN, source, "", _of_pixels(StandIn(), STAND_IN_SIDE, device))


def _of_pixels(network: nn.Module, side: int, device: torch.device) -> Read:
    network = network.to(device)
    return lambda images, captions: network(resized(images, side, device))


def _of_folder(name: str, title: str, folder: Path, read: Read) -> Reader:
    digest = folder_digest(folder)
    return Reader(name, f"{title} (digest {digest})", digest, read)
