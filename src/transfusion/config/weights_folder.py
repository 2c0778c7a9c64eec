"""Published weights: the safetensors files that a folder means, and the tensors in them by their headers alone.

Everything here raises ValueError with a reason. The caller says whose folder it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# What can be read as it stands. Numbers of other types mean nothing without a scale.
FLOATS = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """dtype: in the words of safetensors, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def index_name(stem: str) -> str:
    """Of the file that says which tensor is in which part."""
    return f"{stem}.safetensors.index.json"


def weight_files(folder: Path, stem: str) -> list[Path]:
    """STEM.safetensors, or the parts that STEM.safetensors.index.json names. A folder that holds both is refused."""
    single, index = f"{stem}.safetensors", index_name(stem)
    names = {single}
    if (folder / index).is_file():
        names = set(_weight_map(folder / index).values())
    for name in sorted(names):
        if not (folder / name).is_file():
            pickled = ", and pickles are not loaded" if any(folder.glob("*.bin")) else ""
            raise ValueError(f"{name} is missing{pickled}; copy the folder again")
    form = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors")
    present = {path.name for path in folder.iterdir() if form.fullmatch(path.name)}
    if others := sorted(present - names):
        raise ValueError(
            f"it holds {others[0]} beside {min(names)}, and only one of them can be meant; delete the former files"
            + (f", {index} included" if single in others else "")
        )
    return [folder / name for name in sorted(names)]


def stored_tensors(files: Sequence[Path], stem: str) -> dict[str, StoredTensor]:
    """Every tensor of these files of one folder by its name. Types that need a scale are refused."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in found:
                        raise ValueError(
                            f"{name} is in both {found[name].file.name} and {file.name}; copy it again"
                        )
                    part = opened.get_slice(name)
                    found[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            if _begin(file).startswith(b"version https://git-lfs"):
                raise ValueError(f"{file.name} is a pointer of Git LFS; run `git lfs pull`") from None
            raise ValueError(f"{file.name} cannot be read ({error}); copy it again") from None
    index = files[0].with_name(index_name(stem))
    if index.is_file():
        places = {name: tensor.file.name for name, tensor in found.items()}
        if wrong := sorted(places.items() ^ _weight_map(index).items()):
            raise ValueError(
                f"{index.name} does not fit: {wrong[0][0]} and {wrong[0][1]}; copy the folder again"
            )
    for name, tensor in sorted(found.items()):
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} is stored as {tensor.dtype}, and only {', '.join(FLOATS)} can be read;"
                " take the weights that are not quantised"
            )
    return found


def check_tensors(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Shapes by name: nothing may be missing, left over or of another shape."""
    for problem, names in (
        ("missing", wanted.keys() - found.keys()),
        ("left over", found.keys() - wanted.keys()),
    ):
        if names:
            raise ValueError(f"{min(names)} is {problem} ({len(names)} such tensors)")
    for name, shape in sorted(wanted.items()):
        if list(found[name]) != list(shape):
            raise ValueError(f"{name} has shape {list(found[name])} instead of {list(shape)}")


def _begin(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(64)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {str(name): str(part) for name, part in parts.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index.name} cannot be read; copy the folder again") from None
    if not found:
        raise ValueError(f"{index.name} names no weights; copy the folder again")
    return found
