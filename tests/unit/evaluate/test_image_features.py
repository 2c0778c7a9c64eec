"""Inception by its file, the stand-in without one, and what is told of files that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from transfusion.errors import UserError
from transfusion.evaluate.features.inception import Inception, load_inception
from transfusion.evaluate.features.readers import open_readers
from transfusion.evaluate.features.resize import resize_like_tensorflow1

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Inception:
    """With weights that are the same on every machine."""
    random = np.random.RandomState(0)
    made = Inception()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = (2 / parameter[0].numel()) ** 0.5 if name.endswith("conv.weight") else 0.1
            drawn = torch.from_numpy(scale * random.standard_normal(parameter.shape)).float()
            parameter.copy_(1 + drawn if name.endswith("bn.weight") else drawn)
    return made.eval()


@pytest.fixture
def file(network: Inception, tmp_path: Path) -> Callable[..., Path]:
    """file(name=tensor or None, ...) -> a file of the network's weights as the published one is, with these changes."""

    def write(**changes: Tensor | None) -> Path:
        weights = {
            **{name: each for name, each in network.state_dict().items() if "num_batches" not in name},
            "fc.weight": torch.zeros(1008, 2048),
            **{name.replace("__", "."): each for name, each in changes.items()},
        }
        path = tmp_path / "inception.pth"
        torch.save({name: each for name, each in weights.items() if each is not None}, path)
        return path

    return write


def test_pixels_stand_at_their_upper_left_corner_as_in_tensorflow_1() -> None:
    row = torch.tensor([0.0, 10.0]).expand(1, 1, 3, 2)
    assert resize_like_tensorflow1(row, 4)[0, 0].tolist() == [[0, 5, 10, 10]] * 4
    column = torch.arange(6.0).view(1, 1, 6, 1)
    assert resize_like_tensorflow1(column, 3)[0, 0, :, 0].tolist() == [0, 2, 4], "nothing is averaged"


def test_inception_has_the_weights_that_the_paper_has() -> None:
    """As many as torchvision's network without its classes."""
    assert sum(parameter.numel() for parameter in Inception().parameters()) == 21_785_568


def test_the_features_of_a_file_are_those_that_torch_fidelity_reads(file: Callable[..., Path]) -> None:
    """Its extractor gave these, bit for bit; tests/oracles asks it anew."""
    [reader] = open_readers(CPU, inception=str(file()))
    ramp = torch.arange(3 * 20 * 30).view(3, 20, 30) % 251
    features = reader([ramp.to(torch.uint8)], [""])
    assert features.shape == (1, 2048)
    assert features[0, :4].tolist() == pytest.approx([0.0152315, 0.0043633, 0.0069473, 0.8659680], rel=1e-3)
    assert "inception.pth (digest" in reader.source and reader.digest in reader.source


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"Mixed_7c__branch1x1__bn__bias": None}, r"Mixed_7c\.branch1x1\.bn\.bias is missing"),
        ({"more": torch.ones(1)}, "more is left over"),
        (
            {"Mixed_6a__branch3x3__bn__bias": torch.ones(3)},
            r"Mixed_6a\.branch3x3\.bn\.bias has shape \[3\] instead of \[384\]",
        ),
    ],
)
def test_weights_of_another_network_are_refused_by_name(
    file: Callable[..., Path], changes: dict[str, Tensor | None], told: str
) -> None:
    with pytest.raises(
        UserError, match=rf"inception.pth is not Inception v3 as FID has it \({told}\); copy pt_"
    ):
        load_inception(file(**changes))


def test_files_that_are_no_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing; copy pt_inception-2015-12-05-6726825d"):
        load_inception(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text.pth cannot be read .*; copy pt_inception"):
        load_inception(tmp_path / "text.pth")
    with pytest.raises(UserError, match="cannot be read"):
        load_inception(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="it holds a list, not tensors by name"):
        load_inception(tmp_path / "list.pth")


def test_damaged_weights_are_told_by_what_they_give(file: Callable[..., Path]) -> None:
    path = file(Conv2d_1a_3x3__bn__bias=torch.full((32,), float("nan")))
    [reader] = open_readers(CPU, inception=str(path))
    with pytest.raises(UserError, match=r"inception.pth .* not finite; copy its weights again"):
        reader([torch.zeros(3, 8, 8, dtype=torch.uint8)], [""])


def test_the_stand_in_is_the_same_everywhere_and_reads_any_size_grey_or_in_colour() -> None:
    [reader] = open_readers(CPU)
    ramp = (torch.arange(3 * 20 * 30).view(3, 20, 30) % 251).to(torch.uint8)
    features = reader([ramp, ramp[:1, :7]], ["", ""])
    assert reader.name == "standin" and "no FID" in reader.source and features.shape == (2, 64)
    assert features[0, :4].tolist() == pytest.approx([0.496194, 0.405441, 0.400705, 0.163084], rel=1e-4)
    grey = ramp[:1].expand(3, -1, -1)
    assert np.array_equal(reader([ramp[:1]], [""]), reader([grey], [""]))
    assert reader([], []).size == 0


def test_folders_of_transformers_that_do_not_fit_are_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")
    for kind, name in (("dinov2", "Dinov2Model"), ("clip", "CLIPModel")):
        with pytest.raises(
            UserError, match=f"holds no config.json; name a folder that transformers wrote for {name}"
        ):
            open_readers(CPU, **{kind: str(tmp_path / "nothing")})
