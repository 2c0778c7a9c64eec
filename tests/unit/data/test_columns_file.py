"""Columns in a safetensors file: what is written comes back, any reader opens it, and damage is told."""

from __future__ import annotations

import gc
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from transfusion.data.index.columns_file import DamagedFile, map_file, read_header, write_columns

FACTS = {"samples": 3, "notes": {"bom_stripped": 1}, "shard": "ä.tar"}


def columns() -> dict[str, NDArray[Any]]:
    kinds = ["<u1", "<i8", "<u2", "<i4", "<u8", "<i1", "<i2", "<u4"]
    found = {f"column {kind}": np.arange(3 + place, dtype=kind) for place, kind in enumerate(kinds)}
    return {**found, "nothing": np.empty(0, "<u1"), "below": np.array([-5, 7], "<i4")}


@pytest.mark.parametrize("given", [columns(), {}, {"nothing": np.empty(0, np.uint8)}])
def test_what_is_written_comes_back(tmp_path: Path, given: dict[str, NDArray[Any]]) -> None:
    path = tmp_path / "a.index"
    write_columns(path, given, FACTS)
    facts, places = read_header(path.open("rb"))
    assert facts == FACTS and places.keys() == given.keys()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for name, values in given.items():
            found = places[name].values(mapped)
            assert found.dtype == values.dtype and found.tolist() == values.tolist(), name
            assert places[name].offset % values.itemsize == 0, "read where its type may be read"
            del found


def test_any_reader_of_safetensors_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    write_columns(path, columns(), FACTS)
    assert {name: values.tolist() for name, values in load_file(path).items()} == {
        name: values.tolist() for name, values in columns().items()
    }
    with safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["facts"]) == FACTS


def test_a_mapped_file_is_a_column_too(tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(np.arange(10, dtype="<u2").tobytes())
    write_columns(tmp_path / "a", {"ids": np.memmap(tmp_path / "spool", "<u2", "r")}, {})
    assert load_file(tmp_path / "a")["ids"].tolist() == list(range(10))


def test_damage_to_the_head_and_a_cut_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    write_columns(path, columns(), FACTS)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    padding = len(whole[:head]) - len(whole[:head].rstrip(b" "))
    for place in range(0, head - padding, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedFile):
            read_header(path.open("rb"))
    for length in (0, 7, 8, head - 1, head, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            read_header(path.open("rb"))
    for text in (b"[]", b"5", b'{"__metadata__": []}', b"{}"):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(DamagedFile):
            read_header(path.open("rb"))
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedFile):
        read_header(path.open("rb"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors by /proc")
def test_a_mapped_file_takes_no_descriptor_and_goes_with_its_arrays(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    def opened() -> int:
        return sum(
            str(tmp_path) in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
        )

    held = []
    for number in range(20):
        path = tmp_path / f"{number}.index"
        write_columns(path, {"a": np.arange(1000, dtype="<u2")}, {})
        with path.open("rb") as stream:
            _, columns = read_header(stream)
            held.append(columns["a"].values(map_file(stream)))
    assert all(np.array_equal(values, np.arange(1000)) for values in held)
    assert (opened(), mapped()) == (0, 20)
    with pytest.raises(ValueError, match="read-only"):
        held[0][0] = 7
    held.clear()
    gc.collect()
    assert mapped() == 0
