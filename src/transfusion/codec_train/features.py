"""Networks whose features tell how alike two images look: VGG16 (LPIPS), ResNet-50, or a fixed random one.

Weights come from files that the user names, in torchvision's names of parameters; nothing is downloaded.
I images, C channels, h/w height and width of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.config.weights_folder import check_tensors
from transfusion.errors import UserError

# Mean and deviation of ImageNet's pixels, of [0, 1].
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
# The channel weights of LPIPS, one for each layer that is compared.
_LIN = {
    f"lin{number}.model.1.weight": (1, width, 1, 1) for number, width in enumerate((64, 128, 256, 512, 512))
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_RANDOM_WIDTHS, _RANDOM_SEED = (32, 64, 128), 20_240_820


class FeatureDistance(nn.Module):
    """Mean squared distance of unit features over all layers, as LPIPS has it; frozen.

    lin: for each layer a weight for each channel; without, all count alike.
    """

    mean_C11: Tensor
    deviation_C11: Tensor

    def __init__(self, layers: nn.Module, lin: list[Tensor] | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("mean_C11", torch.tensor(_MEAN).view(-1, 1, 1))
        self.register_buffer("deviation_C11", torch.tensor(_DEVIATION).view(-1, 1, 1))
        self.lin = [] if lin is None else lin
        self.eval().requires_grad_(False)

    def forward(self, one_ICHW: Tensor, other_ICHW: Tensor) -> Tensor:
        """Distance of each pair of images in [-1, 1], grey or colour: [I]. Gradients flow to both."""
        pairs = zip(self._features(one_ICHW), self._features(other_ICHW), strict=True)
        distance_I = one_ICHW.new_zeros(len(one_ICHW))
        for number, (a_IChw, b_IChw) in enumerate(pairs):
            square_IChw = (_unit(a_IChw) - _unit(b_IChw)).square()
            if self.lin:
                square_IChw = square_IChw * self.lin[number].to(square_IChw)
            distance_I = distance_I + square_IChw.sum(1).mean((1, 2))
        return distance_I

    def _features(self, value_ICHW: Tensor) -> list[Tensor]:
        colour_ICHW = value_ICHW.expand(-1, 3, -1, -1)
        features: list[Tensor] = self.layers(((colour_ICHW + 1) / 2 - self.mean_C11) / self.deviation_C11)
        return features


class VGG16(nn.Module):
    """The convolutions of torchvision's VGG16; gives the five layers before each pooling that LPIPS compares."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = []
        before = 3
        for width in _VGG16:
            features += (
                [nn.MaxPool2d(2)] if not width else [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            )
            before = width or before
        self.features = nn.Sequential(*features)

    def forward(self, value_ICHW: Tensor) -> list[Tensor]:
        """Features [I, C, h, w] of each of five scales."""
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(value_ICHW)
            value_ICHW = layer(value_ICHW)
        return [*found, value_ICHW]


class _Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or before != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, value_ICHW: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(value_ICHW)))
        inner = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(inner)))))
        return F.relu(inner + self.downsample(value_ICHW))


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without its head; gives the features after each of its four parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        before = 64
        for number, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            part = []
            for block in range(blocks):
                part.append(_Bottleneck(before, width, 2 if number > 1 and block == 0 else 1))
                before = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*part))

    def forward(self, value_ICHW: Tensor) -> list[Tensor]:
        """Features [I, C, h, w] of each of four scales."""
        value_ICHW = F.max_pool2d(F.relu(self.bn1(self.conv1(value_ICHW))), 3, 2, padding=1)
        found = []
        for number in range(1, 5):
            value_ICHW = self.get_submodule(f"layer{number}")(value_ICHW)
            found.append(value_ICHW)
        return found


class RandomFeatures(nn.Module):
    """A few convolutions with fixed random weights: edges and colours at three scales, nothing learnt."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(_RANDOM_SEED)
        self.convolutions = nn.ModuleList()
        for before, width in itertools.pairwise((3, *_RANDOM_WIDTHS)):
            convolution = nn.Conv2d(before, width, 3, 2, padding=1, bias=False)
            nn.init.orthogonal_(convolution.weight, gain=2**0.5, generator=generator)
            self.convolutions.append(convolution)

    def forward(self, value_ICHW: Tensor) -> list[Tensor]:
        """Features [I, C, h, w] of each of three scales."""
        found = []
        for convolution in self.convolutions:
            value_ICHW = F.leaky_relu(convolution(value_ICHW), 0.2)
            found.append(value_ICHW)
        return found


def feature_distance(kind: str, weights: str) -> FeatureDistance | None:
    """The distance that `kind` names (vgg16, resnet50, random, none). Raises UserError for weights that do not fit."""
    if kind == "none":
        return None
    if kind == "random":
        return FeatureDistance(RandomFeatures())
    state = _read_state(Path(weights))
    if kind == "resnet50":
        return FeatureDistance(_loaded(ResNet50(), state, weights, head="fc.", beside={}))
    lin = _LIN if state.keys() & _LIN.keys() else {}
    network = _loaded(VGG16(), state, weights, head="classifier.", beside=lin)
    return FeatureDistance(network, [state[name].float().view(-1, 1, 1) for name in lin])


def _loaded(
    network: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    head: str,
    beside: Mapping[str, Sequence[int]],
) -> nn.Module:
    """The network with all of `state` but its head and what training counted. beside: what else must be there."""
    counts = "num_batches_tracked"
    mine = {name: value.shape for name, value in network.state_dict().items() if not name.endswith(counts)}
    given = {
        name: each for name, each in state.items() if not name.startswith(head) and not name.endswith(counts)
    }
    try:
        check_tensors({name: each.shape for name, each in given.items()}, {**mine, **beside})
        for name, each in sorted(given.items()):
            if each.dtype not in _FLOATS:
                raise ValueError(
                    f"{name} is stored as {each.dtype}, which is no floating point that can be read"
                )
    except ValueError as error:
        raise UserError(
            f"{source} is not a state dict of {type(network).__name__}: {error}; name a file with the parameters of"
            " torchvision and no others"
        ) from None
    network.load_state_dict({name: given[name].float() for name in mine}, strict=False)
    return network


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name; prefixes of wrappers such as Moco's `module.encoder_q.` are taken off."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {error.strerror or error}") from None
    except Exception as error:
        # Whatever a torn file or another pickle makes safetensors and torch raise.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a file of weights: {reason}; save it as .safetensors") from None
    prefix = "module.encoder_q."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix).removeprefix("module."): value for name, value in tensors.items()}


def _unit(feature_IChw: Tensor) -> Tensor:
    return feature_IChw / (feature_IChw.square().sum(1, keepdim=True) + 1e-10).sqrt()
