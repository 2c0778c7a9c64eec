"""Our safetensors writer, read back by the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transfusion.checkpoint.layout import file_digest
from transfusion.checkpoint.stream import write_tensors

TENSORS = {
    "weight/a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "b": torch.tensor(float("-inf")),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {name: tensor.shape for name, tensor in TENSORS.items()}
    record = write_tensors(path, shapes, TENSORS.__getitem__, metadata={"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert record.bytes == path.stat().st_size
    assert record.blake2b == file_digest(path)


def test_as_large_as_the_librarys_own_file(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "theirs")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    ours = write_tensors(tmp_path / "ours", shapes, tensors.__getitem__)
    assert abs(ours.bytes - (tmp_path / "theirs").stat().st_size) <= 16


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: got 3 elements"):
        write_tensors(tmp_path / "x", {"a": (2,)}, lambda name: torch.zeros(3))
