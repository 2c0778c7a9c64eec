"""Checkpoints between ranks and engines (scenarios: worker.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Findings = Callable[[str], list[Any]]

pytestmark = [pytest.mark.dist, pytest.mark.slow]

KINDS = ["defaults", "nothing kept", "bf16", "stage 2", "uneven", "tied, bf16"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_resume_bit_for_bit(pair: Findings, kind: str) -> None:
    for found in pair(f"checkpoints: {kind}"):
        assert found["state"]
        assert found["updates"] == 2
        assert found["loaded bit for bit"]
        assert found["goes on the same"]
        assert found["ends the same"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_loads_what_two_saved(pair: Findings, kind: str) -> None:
    for found in pair(f"checkpoints: {kind}"):
        assert found["plain engine loads the same"]


def test_two_ranks_load_what_one_saved(pair: Findings) -> None:
    for found in pair("from one rank"):
        assert found["state"]
        assert found["same"]
        assert found["updates"] == 4
        assert found["next loss"] < 1e-6


def test_a_finished_save_leaves_nothing_else_behind(pair: Findings) -> None:
    files = pair("checkpoints: defaults")[0]["files"]
    each = ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    assert files == sorted(["latest", *each, *each])


def test_an_error_of_one_rank_reaches_all(pair: Findings) -> None:
    """Each failure is one of the second rank alone, and both tell it in the same words."""
    for found in pair("failures"):
        assert "No space left on device" in found["begin"]
        assert "No space left on device" in found["save"]
        assert found["nothing counts as saved"]
        assert found["fill"] == "Input/output error (rank_00000.safetensors)"
        assert "rank_00001.safetensors has" in found["load"]


def test_all_ranks_resume_what_the_first_finds(pair: Findings) -> None:
    assert all(found["all resume what the first finds"] for found in pair("failures"))
