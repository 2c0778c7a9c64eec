"""Prepared digits and reference text, a tokenizer, and ways to compare batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from transfusion.config import Config
from transfusion.data.prepare.prepare import prepare
from transfusion.data.shards import scan
from transfusion.data.shards.webdataset import expand
from transfusion.schema import Batch
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits/ and docs/, prepared."""
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder / "digits")
    prepare("python-docs", folder / "docs")
    return folder


@pytest.fixture(scope="session")
def texts(data: Path) -> list[str]:
    return list(scan.Texts(expand(f"{data}/*/train/*.tar")))


@pytest.fixture(scope="session")
def tokenizer(data: Path, texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, data / "tokenizer.model", vocabulary=1024)


@pytest.fixture(scope="session")
def make_config(data: Path) -> MakeConfig:
    """A small configuration over both sources; keywords change section data, `sections` the others."""

    def make(sections: dict[str, Any] | None = None, **changes: Any) -> Config:
        def source(name: str, part: str) -> dict[str, str]:
            return {"name": name, "shards": f"{data}/{name}/{part}/*.tar"}

        section: dict[str, Any] = {
            # The smaller part serves for training too: every loader of every rank indexes it anew.
            "sources": [source("digits", "validation"), source("docs", "validation")],
            "validation": [source("digits", "validation"), source("docs", "validation")],
            "sequence_length": 256,
            "global_batch_size": 8,
            **changes,
        }
        return Config.model_validate(
            {"codec": {"channels": 1, "image_size": 8}, "data": section, **(sections or {})}
        )

    return make


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Sequence[Batch]], list[list[torch.Tensor]]]:
    """All that a step holds, row by row, whatever batches it came in."""

    def explode(batches: Sequence[Batch]) -> list[list[torch.Tensor]]:
        return [
            tensors
            for batch in batches
            for tensors in map(row, [batch] * len(batch.token_ids_BS), range(10**6))
        ]

    def row(batch: Batch, number: int) -> list[torch.Tensor]:
        tensors = [
            batch.token_ids_BS,
            batch.modality_BS,
            batch.position_BSA,
            batch.target_ids_BS,
            batch.text_weight_BS,
            batch.mask.first_key,
            batch.mask.end_key,
        ]
        length = batch.token_ids_BS.shape[1]
        found = [tensor[number] for tensor in tensors]
        for group in batch.media:
            real = group.image_weight_I > 0
            here = (group.patch_slot_IP[:, 0] // length == number) & real
            values = group.values if group.value_I is None else group.values[group.value_I]
            fields = (
                values,
                group.timestep_I,
                group.noise_key_I,
                group.patch_slot_IP - number * length,
            )
            found += [field[here] for field in fields]
        return found

    return explode


@pytest.fixture(scope="session")
def same() -> Callable[[Sequence[Sequence[torch.Tensor]], Sequence[Sequence[torch.Tensor]]], bool]:
    """Bit for bit the same rows."""

    def equal(one: Sequence[Sequence[torch.Tensor]], other: Sequence[Sequence[torch.Tensor]]) -> bool:
        def images(row: Sequence[torch.Tensor]) -> int:
            return len(row[7])

        return len(one) == len(other) and all(
            # A row without images has no image fields of its own; the batch's stand-in is no part of it.
            all(torch.equal(a, b) for a, b in zip(left[:7], right[:7], strict=True))
            and images(left) == images(right)
            and (not images(left) or all(map(torch.equal, left[7:], right[7:])))
            for left, right in zip(one, other, strict=True)
        )

    return equal
