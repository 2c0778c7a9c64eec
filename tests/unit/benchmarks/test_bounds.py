"""The model of the kernels' speed: its arithmetic on loops that were made up, and one kernel as compiled."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import bounds
from bounds import Kernel, Launch, Signal, Step
from transfusion_kernels import IntervalMask
from transfusion_kernels.verification.sass import Way, read_ways

SCORES = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
VALUES = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXPONENTIAL = "MUFU.EX2 R10, R11"
NONE = 7


def listing(*body: str, stall: int = 1) -> str:
    """A loop as nvdisasm prints it with `-hex`: every instruction holds its warp for `stall` cycles."""
    lines = ["MOV R1, R2", ".L_x_1:", *body, "@P0 BRA `(.L_x_1)", "EXIT"]
    bits = f"        /* 0x{stall << 41 | NONE << 46 | NONE << 49:016x} */"
    return "\n".join(
        line
        if line.startswith(".L")
        else f"        /*{16 * number:04x}*/    {line} ;  /* 0x{0:016x} */\n{bits}"
        for number, line in enumerate(lines)
    )


def way(*body: str, stall: int = 1) -> Way:
    ((shortest, _),) = read_ways(listing(*body, stall=stall))
    return shortest


def test_the_branch_of_a_mask_and_retries_stand_on_no_shortest_way() -> None:
    ((shortest, longest),) = read_ways(
        listing(
            "MOV R2, R3",
            ".L_x_2:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2",
            "@!P1 BRA `(.L_x_2)",
            SCORES,
            WAIT,
            "@P2 BRA `(.L_x_3)",
            "FSEL R10, R11, R12, P3",
            "LDS.64 R10, [R12]",
            ".L_x_3:",
            EXPONENTIAL,
            stall=3,
        )
    )
    assert longest.loop.size - shortest.loop.size == 2
    assert "FSEL" not in shortest.loop.instructions and longest.loop.instructions["FSEL"] == 1
    assert (shortest.loop.shared_bytes, longest.loop.shared_bytes) == (0, 256)
    assert {order.stall for order in longest.orders} == {3} and not longest.orders[0].waits
    assert shortest.loop.exposed == 1


def test_a_product_on_a_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="products on a branch"):
        read_ways(listing("@P2 BRA `(.L_x_3)", SCORES, ".L_x_3:", EXPONENTIAL))


def test_cycles_of_units() -> None:
    one = way(
        SCORES, VALUES, WAIT, *[EXPONENTIAL] * 10, "F2FP.BF16.PACK_AB R10, R11, R12", "STS.128 [R2], R84"
    )
    found = bounds.units([one, one], moved=2560)
    assert found["tensor"] == 2 * (32 + 64)
    assert found["exponential"] == 2 * 10 * 8
    assert found["half rate"] == 2 * 2
    assert found["issue"] == 2 * one.loop.size == 2 * 16
    # Of the first product 64 rows and 64 columns, of the second 128 columns, all by 16 of depth and 2 bytes.
    assert found["shared"] == (2 * (16 * 2 * (64 + 64 + 128) + 4 * 512) + 2560) / 128
    assert bounds.combined([3, 4], 2) == 5
    assert bounds.combined(found.values(), 4) > max(found.values())


def test_one_warpgroup_waits_for_its_products_and_two_share_them() -> None:
    quick, slow = way(SCORES, WAIT), way(SCORES, WAIT, *["FADD R10, R11, R12"] * 20, stall=5)
    alone = bounds.simulate([slow])
    # The product, what follows when a wait is over, and twenty additions of five cycles.
    assert 32 + 20 * 5 < alone < 32 + 25 * 5 + bounds.OTHER_LATENCY
    # One's additions run beside the other's products.
    assert bounds.simulate([slow, slow]) == pytest.approx(alone, abs=40)
    many = way(*[SCORES] * 8, WAIT)
    assert bounds.simulate([many, many]) == pytest.approx(16 * 32, rel=0.01)
    assert bounds.simulate([quick]) < alone


def test_exponentials_of_two_warps_share_the_unit() -> None:
    softmax = way(SCORES, WAIT, *[EXPONENTIAL] * 64)
    assert bounds.simulate([softmax, softmax]) >= 2 * 64 * 8


def test_warpgroups_that_meet_go_as_fast_as_the_slower() -> None:
    quick, slow = way(SCORES, WAIT, "BAR.SYNC 0x0"), way(SCORES, WAIT, "BAR.SYNC 0x0", *["MOV R2, R3"] * 300)
    meeting = Signal(2, 2, (0, 0))
    assert bounds.simulate([quick, slow], [meeting]) > 300 > bounds.simulate([quick, slow])
    with pytest.raises(ValueError, match="wait for each other"):
        bounds.simulate([quick, quick], [Signal(3, 0, (0, 0))])


def test_programs_go_to_the_processor_that_is_free_first() -> None:
    assert bounds.finish([4, 3, 2, 1], 2) == 5
    assert bounds.finish([1, 2, 3, 4], 2) == 6


def test_steps_of_tiles() -> None:
    causal = bounds.mask_of("causal", 512, 1)
    # Longest first: the last queries see all keys, those in their own tile in part.
    assert bounds.tile_steps(causal, "queries", 128) == [(3, 0, 1), (2, 0, 1), (1, 0, 1), (0, 0, 1)]
    assert bounds.tile_steps(causal, "keys", 64) == [(6, 2, 0), (4, 2, 0), (2, 2, 0), (0, 2, 0)]
    full = bounds.mask_of("full", 512, 2)
    assert bounds.tile_steps(full, "queries", 128) == [(4, 0, 0)] * 8
    assert full.visible_pairs() == 2 * 512 * 512
    packed = IntervalMask(
        *(torch.tensor([[0] * 64 + [64] * 64, [64] * 64 + [128] * 64], dtype=torch.int32)[:, None])
    )
    assert bounds.tile_steps(packed, "queries", 64) == [(0, 1, 1)]


def test_a_step_bound_by_products_gives_their_share_of_the_peak() -> None:
    one = way(*[SCORES] * 64, WAIT)
    step = Step((one, one), (), 0, {"tensor": 4096.0}, 4096.0)
    # 128 queries by 128 keys by heads of 128 are 2,048 cycles of products: here each step takes twice as long.
    kernel = Kernel(
        "made up", 128, "forward", (Launch("made up", 128, "queries", (step, step, step), 1),), False
    )
    found = bounds.speed(kernel, "full", 8192, 66)
    assert found["helpers"] == 0 and found["masked"] == 0
    expected = bounds.GEMM_TFLOPS / 2 * (1 - found["outside_steps"]) * found["balance"]
    assert found["tflops"] == pytest.approx(expected)
    assert found["balance"] == pytest.approx(1)


def test_heads_that_fit_the_cache_run_before_the_others() -> None:
    one = way(SCORES, WAIT)
    step = Step((one, one), (), 0, {"tensor": 1.0}, 1.0)
    steps = (step, step, step)
    all_at_once = Launch("made up", 128, "queries", steps, 1).in_order([3, 1], 8, 16384)
    by_four = Launch("made up", 128, "queries", steps, 1, walked=4 * 128).in_order([3, 1], 8, 16384)
    assert all_at_once == [3] * 8 + [1] * 8 and by_four == [3, 3, 3, 3, 1, 1, 1, 1] * 2


@pytest.mark.slow
def test_the_hopper_kernels_as_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bounds, "portable_kernels", lambda: iter(()))
    monkeypatch.setattr(sys, "argv", ["bounds.py", "--out", str(tmp_path / "bounds.json")])
    assert bounds.main() == 0
    (entry,) = json.loads((tmp_path / "bounds.json").read_text(encoding="utf-8"))["triton"].values()
    lines = {line["kernel"]: line for line in entry["kernels"]}
    forward, backward = (lines[f"hopper {way}, head_dim 128"] for way in ("forward", "backward"))
    assert forward["products"] == [16, 16] and forward["exponentials"] == [66, 66]
    assert forward["cycles"]["tensor"] == 2048 and forward["limit"] == "tensor"
    assert backward["cycles"]["tensor"] == 2560 and backward["limit"] == "shared"
    assert not any(sum(line["exposed"]) for line in lines.values())
    assert all(line["expected"] >= line["at_least"] for line in entry["expected"] if "at_least" in line)
