"""What a probe computes: it passes what is right, and tells what is wrong, by name. The simulator plays the GPU."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from transfusion_kernels import dispatch
from transfusion_kernels.probe import child
from transfusion_kernels.probe.child import CASES, Case, Wrong, check_case, compare, error_of, make_mask
from transfusion_kernels.probe.process import MARK

CPU = torch.device("cpu")
SMALL = Case(150, length=143, batch=2, heads=4, key_heads=2, repetitions=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    """With room to spare: no error comes near the threshold."""
    for case in (SMALL, dataclasses.replace(CASES[0], repetitions=1)):
        check_case("cpu", 64, dtype, CPU, case)
    halved = {key: value / 2 for key, value in child.THRESHOLDS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "THRESHOLDS", halved)
        check_case("cpu", 64, dtype, CPU, SMALL)


def test_the_masks_of_all_cases_have_partial_full_and_empty_parts() -> None:
    for case in (*CASES, *child.INTERPRETED_CASES):
        mask = make_mask(case, CPU)
        mask.validate()
        assert mask.first_key.unique().numel() >= 2 and mask.num_queries == case.positions
        position = torch.arange(case.positions)
        assert int((mask.end_key[0] > position + 1).sum()) > case.positions // 3
        assert (mask.end_key[0] == mask.first_key[0]).sum() == case.positions - case.length


def test_one_wrong_row_among_thousands_is_found() -> None:
    exact = torch.randn(1, 2, 2048, 64, dtype=torch.float64)
    rounded = exact.bfloat16()
    assert error_of("out", rounded, exact) < 5e-3
    rounded[0, 1, 77] = 0
    assert error_of("out", rounded, exact) > 0.1
    rounded[0, 1, 77, 5] = math.nan
    with pytest.raises(Wrong, match="out by nan at noon"):
        compare({"out": rounded}, {"out": exact}, 2e-2, "at noon")


def test_a_query_that_sees_nothing_must_say_so() -> None:
    exact = torch.tensor([0.5, -math.inf], dtype=torch.float64)
    assert error_of("lse", torch.tensor([0.5, -math.inf]), exact) == 0
    assert error_of("lse", torch.tensor([0.5, 0.0]), exact) == math.inf
    assert math.isnan(error_of("lse", torch.tensor([math.nan, -math.inf]), exact))


def test_runs_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(range(100))
    backward = child.Inputs.backward

    def unsteady(self: child.Inputs, out: torch.Tensor) -> dict[str, torch.Tensor]:
        found = backward(self, out)
        return found | {"dk": found["dk"] + 1e-6 * (next(runs) == 1)}

    monkeypatch.setattr(child.Inputs, "backward", unsteady)
    with pytest.raises(Wrong, match="dk from run to run at 150 positions, fused backward"):
        check_case("cpu", 32, torch.float32, CPU, SMALL)


def test_a_mask_that_is_made_wrongly_is_found() -> None:
    wrong = make_mask(SMALL, CPU)
    wrong.end_query[0, 3] += 1
    with pytest.raises(Wrong, match="end_query of the mask at 150 positions"):
        child.check_mask(wrong, make_mask(SMALL, CPU))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Wrong("dq by 0.3"), ("wrong", "dq by 0.3")),
        (ImportError("no gluon\nand more"), ("failed", "ImportError: no gluon, waiting for it")),
        (
            RuntimeError("CUDA error: an illegal"),
            ("failed", "RuntimeError: CUDA error: an illegal, waiting for it"),
        ),
        (torch.OutOfMemoryError("no room"), ("undecided", "OutOfMemoryError: no room")),
        (
            OSError(28, "No space left on device"),
            ("undecided", "OSError: [Errno 28] No space left on device"),
        ),
        (
            RuntimeError("Failed to find C compiler."),
            ("undecided", "RuntimeError: Failed to find C compiler."),
        ),
    ],
)
def test_what_is_raised(error: Exception, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: object) -> None:
        child.stage("waiting for it")
        raise error

    monkeypatch.setattr(child, "check_case", check)
    assert child.verdict("triton", 64, torch.float32, CPU) == expected


def test_a_device_that_cannot_be_used_says_nothing_of_the_kernels() -> None:
    outcome, detail = child.verdict("triton", 64, torch.float32, torch.device("cuda:77"))
    assert outcome == "undecided" and detail


def test_stages_are_told_in_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    print("half a line", end="")
    child.stage("waiting for it")
    assert json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(MARK)) == {
        "stage": "waiting for it"
    }


class TestHopper:
    """The probe of the Hopper kernels, as they are shipped and changed."""

    @pytest.fixture(autouse=True)
    def on_any_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setattr(dispatch, "_hopper_problem", lambda q: "")

    @staticmethod
    def check(change: str = "", of: str = "FORWARD_MUTANTS") -> None:
        import hopper_cases

        changes = [getattr(hopper_cases, of)[change]] if change else []
        with hopper_cases.simulated(changes=changes, small_tiles=False):
            check_case("hopper", 64, torch.bfloat16, CPU, CASES[0], deterministic=(False,))

    def test_passes_what_is_shipped(self) -> None:
        self.check()

    def test_finds_a_wrong_mask(self) -> None:
        with pytest.raises(Wrong, match="out by"):
            self.check("the mask's end is off by one")

    def test_finds_a_wrong_gradient(self) -> None:
        with pytest.raises(Wrong, match=r"^dk by [\d.]+ at 300 positions, fused backward$"):
            self.check("the keys' gradient is not scaled", of="BACKWARD_MUTANTS")

    def test_finds_a_deadlock(self) -> None:
        from gluon_simulator import Fault

        with pytest.raises(Fault, match="deadlock"):
            self.check("nobody starts the turns")
