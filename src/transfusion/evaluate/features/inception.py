"""Inception v3 as FID has it, and a small stand-in for whoever has no weights of it.

The network is that of Szegedy et al. (2015) with the departures of the graph of 2015-12-05, with which Heusel et al.
(2017) defined FID: averages leave out the padding, and the last block pools by the maximum. Names of the parts are
those of the published file pt_inception-2015-12-05-6726825d.pth.

I images, C channels, H/W height and width, F features.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.errors import UserError

SIDE, FEATURES = 299, 2048
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
STAND_IN_SIDE, STAND_IN_FEATURES = 64, 64
_STAND_IN_SEED = 2020


class Unit(NamedTuple):
    """A convolution as the file names it. Of stride 1 it keeps the size, of stride 2 it is not padded."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# Units one after another. Those of a tuple stand side by side, and end the chain.
Chain = Sequence[Unit | tuple[Unit, ...]]
Pool = Callable[[Tensor], Tensor]

_average: Pool = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum: Pool = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve: Pool = functools.partial(F.max_pool2d, kernel_size=3, stride=2)
_WIDE, _TALL = (1, 7), (7, 1)


class Convolution(nn.Module):
    """A convolution without a bias, norm and ReLU."""

    def __init__(
        self, channels: int, width: int, kernel: tuple[int, int], *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, values_ICHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(values_ICHW)))


class Mixed(nn.Module):
    """Chains side by side, their results joined along the channels. The last chain reads the pooled values."""

    def __init__(self, channels: int, pool: Pool, *chains: Chain) -> None:
        super().__init__()
        self.pool, self.chains, self.width = pool, chains, 0
        for chain in chains:
            width = channels
            for step in chain:
                units = (step,) if isinstance(step, Unit) else step
                for unit in units:
                    part = Convolution(
                        width, unit.width, unit.kernel, stride=unit.stride, padded=unit.stride == 1
                    )
                    self.add_module(unit.name, part)
                width = sum(unit.width for unit in units)
            self.width += width

    def forward(self, values_ICHW: Tensor) -> Tensor:
        *chains, pooled = self.chains
        found = [self._follow(chain, values_ICHW) for chain in chains]
        return torch.cat([*found, self._follow(pooled, self.pool(values_ICHW))], 1)

    def _follow(self, chain: Chain, values_ICHW: Tensor) -> Tensor:
        for step in chain:
            units = (step,) if isinstance(step, Unit) else step
            parts = [self.get_submodule(unit.name)(values_ICHW) for unit in units]
            values_ICHW = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return values_ICHW


def _block_a(channels: int, pooled: int) -> Mixed:
    return Mixed(
        channels,
        _average,
        [Unit("branch1x1", 64)],
        [Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5))],
        [
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            Unit("branch3x3dbl_3", 96, (3, 3)),
        ],
        [Unit("branch_pool", pooled)],
    )


def _block_b(channels: int) -> Mixed:
    return Mixed(
        channels,
        _halve,
        [Unit("branch3x3", 384, (3, 3), 2)],
        [
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            Unit("branch3x3dbl_3", 96, (3, 3), 2),
        ],
        [],
    )


def _block_c(channels: int, inner: int) -> Mixed:
    return Mixed(
        channels,
        _average,
        [Unit("branch1x1", 192)],
        [Unit("branch7x7_1", inner), Unit("branch7x7_2", inner, _WIDE), Unit("branch7x7_3", 192, _TALL)],
        [
            Unit("branch7x7dbl_1", inner),
            Unit("branch7x7dbl_2", inner, _TALL),
            Unit("branch7x7dbl_3", inner, _WIDE),
            Unit("branch7x7dbl_4", inner, _TALL),
            Unit("branch7x7dbl_5", 192, _WIDE),
        ],
        [Unit("branch_pool", 192)],
    )


def _block_d(channels: int) -> Mixed:
    return Mixed(
        channels,
        _halve,
        [Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2)],
        [
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, _WIDE),
            Unit("branch7x7x3_3", 192, _TALL),
            Unit("branch7x7x3_4", 192, (3, 3), 2),
        ],
        [],
    )


def _block_e(channels: int, pool: Pool) -> Mixed:
    def both(name: str) -> tuple[Unit, Unit]:
        return Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1))

    return Mixed(
        channels,
        pool,
        [Unit("branch1x1", 320)],
        [Unit("branch3x3_1", 384), both("branch3x3_2")],
        [Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, (3, 3)), both("branch3x3dbl_3")],
        [Unit("branch_pool", 192)],
    )


class Inception(nn.Module):
    """The network up to the mean over places, behind which the file has 1008 classes that FID does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average)
        self.Mixed_7c = _block_e(2048, _maximum)

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """Features [I, F] of images [I, 3, 299, 299] with values from 0 to 255."""
        values_ICHW = (pixels_ICHW - 128) / 128
        for name, part in self.named_children():
            values_ICHW = part(values_ICHW)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                values_ICHW = _halve(values_ICHW)
        return F.adaptive_avg_pool2d(values_ICHW, 1).flatten(1)


class StandIn(nn.Module):
    """Three strided convolutions with fixed random weights, and the mean over places.

    It sees colours and edges, and knows no things. Its distances compare models of one set of images, roughly.
    """

    def __init__(self) -> None:
        super().__init__()
        random = np.random.RandomState(_STAND_IN_SEED)
        layers: list[nn.Module] = []
        for channels, width in ((3, 16), (16, 32), (32, STAND_IN_FEATURES)):
            layer = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            drawn = random.standard_normal(layer.weight.shape) * (2.0 / (9 * channels)) ** 0.5
            layer.weight = nn.Parameter(torch.from_numpy(drawn).float(), requires_grad=False)
            layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """Features [I, F] of images [I, 3, 64, 64] with values from 0 to 255."""
        return self.layers((pixels_ICHW - 128) / 128).mean((2, 3))


def load_inception(path: Path) -> Inception:
    """The network with the weights of a file. Raises UserError for a file that is missing, damaged or another's."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy {PUBLISHED} there, or name where it is") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} cannot be read ({reason}); copy {PUBLISHED} again") from None
    network = Inception()
    wanted = network.state_dict()
    # A count of training steps, which not every version of torch wrote.
    counted = {name for name in wanted if name.endswith("num_batches_tracked")}
    try:
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
        kept = {name: each for name, each in found.items() if not str(name).startswith("fc.")}
        for name in sorted(wanted.keys() - counted - kept.keys()):
            raise ValueError(f"{name} is missing")
        for name in sorted(kept.keys() - wanted.keys()):
            raise ValueError(f"{name} is left over")
        for name in wanted.keys() - counted:
            if kept[name].shape != wanted[name].shape:
                shapes = [list(each[name].shape) for each in (kept, wanted)]
                raise ValueError(f"{name} has shape {shapes[0]} instead of {shapes[1]}")
    except ValueError as reason:
        raise UserError(
            f"{path} is not Inception v3 as FID has it ({reason}); copy {PUBLISHED} there"
        ) from None
    network.load_state_dict({name: each for name, each in kept.items() if name not in counted}, strict=False)
    return network.requires_grad_(False).eval()
