"""Inception's features and the figures taken of them equal those of torch-fidelity. See fidelity.py to run this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fidelity import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from transfusion.evaluate.features.inception import Inception
from transfusion.evaluate.features.readers import open_readers
from transfusion.evaluate.features.resize import resize_like_tensorflow1
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.evaluate.metrics.kernel_distance import kernel_distance
from transfusion.evaluate.metrics.precision_recall import precision_recall

fidelity = torch_fidelity()

CPU = torch.device("cpu")


def features(count: int, seed: int, dimension: int = 48) -> Tensor:
    """As Inception's are: none below zero, and far from independent."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count, dimension)) @ random.normal(size=(dimension, dimension))
    return torch.from_numpy(np.abs(mixed / dimension**0.5 + 0.1 * seed))


@pytest.mark.parametrize(("drawn", "real"), [(300, 300), (200, 411)])
def test_figures_of_the_same_features(drawn: int, real: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, theirs = (features(drawn, 0), features(real, 1)), {}
    theirs |= fid_statistics_to_metric(*map(fid_features_to_statistics, ours), verbose=False)
    theirs |= kid_features_to_metric(*ours, kid_subset_size=100, verbose=False)
    theirs |= prc_features_to_metric(*ours, verbose=False)
    left, right = (each.numpy() for each in ours)
    distance = frechet_distance(gaussian_of(left), gaussian_of(right))
    assert distance == pytest.approx(theirs[fidelity.KEY_METRIC_FID], rel=1e-10)
    kernel = kernel_distance(left, right, subsets=100, size=100)
    assert kernel.mean == pytest.approx(theirs[fidelity.KEY_METRIC_KID_MEAN], rel=1e-10)
    assert kernel.deviation == pytest.approx(theirs[fidelity.KEY_METRIC_KID_STD], rel=1e-10)
    found = precision_recall(left, right)
    # Theirs are means in fp32. Each is of the same number of images.
    assert found.precise_N.sum() == round(theirs[fidelity.KEY_METRIC_PRECISION] * drawn)
    assert found.recalled_M.sum() == round(theirs[fidelity.KEY_METRIC_RECALL] * real)


@pytest.mark.parametrize(
    ("height", "width", "side"), [(8, 8, 299), (300, 500, 299), (32, 64, 224), (299, 299, 299)]
)
def test_the_resize(height: int, width: int, side: int) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    pixels = torch.randint(0, 256, (2, 3, height, width)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(pixels, (side, side), align_corners=False)
    assert torch.equal(resize_like_tensorflow1(pixels, side), theirs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published one is, with random weights, since nothing is downloaded."""
    generator = torch.Generator().manual_seed(0)
    state = Inception().state_dict()
    for name, each in state.items():
        if name.endswith("conv.weight"):
            each.normal_(std=(2 / each[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            each.uniform_(0.5, 1.5, generator=generator)
        elif each.is_floating_point():
            each.normal_(std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    classes = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save({**state, **classes}, path)
    return path


def test_features_of_one_file_are_the_same_bits(weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    [ours] = open_readers(CPU, inception=str(weights))
    pixels = torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8)
    assert np.array_equal(ours(list(pixels), [""] * 3), theirs(pixels)[0].numpy())


class Images(Dataset[Tensor]):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> Tensor:
        return self.pixels[number]


def alive(path: Path, features: int) -> Path:
    """The same weights with so many features that are not always 0, so that as many images make them a full rank."""
    state = torch.load(path, weights_only=True)
    for name in state:
        if name.startswith("Mixed_7c.") and name.endswith(("bn.weight", "bn.bias")):
            first = features if name.startswith("Mixed_7c.branch1x1.") else 0
            is_last = any(part in name for part in ("branch1x1", "_2a", "_2b", "_3a", "_3b", "branch_pool"))
            if is_last:
                state[name][first:] = 0.0
    found = path.with_name("alive.pth")
    torch.save(state, found)
    return found


@pytest.mark.slow
def test_figures_of_the_same_images_through_the_whole_pipeline(weights: Path) -> None:
    """Their kernel distance is summed in fp32. In fp64 it is ours, as the test above shows.

    Weights with fewer living features than images: of more, both Fréchet distances have eigenvalues that are rounding
    alone, whose roots move each of them by 1e-4 of itself from the one of singular values. Their means are of fp32 too,
    so that the two sets are far apart.
    """
    generator = torch.Generator().manual_seed(0)
    shade = torch.randint(0, 120, (48, 3, 1, 1), generator=generator)
    pixels = (torch.randint(0, 136, (48, 3, 32, 32), generator=generator) + shade).to(torch.uint8)
    pixels[:24] //= 4
    path = str(alive(weights, features=8))
    settings: dict[str, Any] = {"kid_subset_size": 8, "kid_subsets": 10, "cuda": False, "cache": False}
    theirs = fidelity.calculate_metrics(
        input1=Images(pixels[:24]),
        input2=Images(pixels[24:]),
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=path,
        save_cpu_ram=True,
        verbose=False,
        **settings,
    )
    [reader] = open_readers(CPU, inception=path)
    left, right = (reader(list(part), [""] * 24) for part in pixels.split(24))
    assert (left.std(0) > 0).sum() == 8
    distance = frechet_distance(gaussian_of(left), gaussian_of(right))
    assert distance == pytest.approx(theirs[fidelity.KEY_METRIC_FID], rel=1e-6)
    kernel = kernel_distance(left, right, subsets=10, size=8)
    assert kernel.mean == pytest.approx(theirs[fidelity.KEY_METRIC_KID_MEAN], rel=1e-5)
    found = precision_recall(left, right)
    assert found.precise_N.mean() == pytest.approx(theirs[fidelity.KEY_METRIC_PRECISION])
    assert found.recalled_M.mean() == pytest.approx(theirs[fidelity.KEY_METRIC_RECALL])
