"""From records of finished cells to means, laws, parity and a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transfusion.errors import UserError
from transfusion.scaling.plot import draw
from transfusion.scaling.results import as_dict, compare, laws, metrics_of, read_records, table

BUDGETS = {"s": 1e12, "m": 4e12, "l": 1.6e13}
WOBBLE = (0.97, 1.0, 1.03)


def records() -> list[dict[str, Any]]:
    """Two models with known laws: `bits` falls as flops^-0.5, twice as high for the other; `f1` rises."""
    found = []
    for model, factor in (("ours", 1.0), ("other", 2.0)):
        for size, flops in BUDGETS.items():
            for seed, wobble in enumerate(WOBBLE):
                metrics = {
                    "bits": 1e6 * factor * flops**-0.5 * wobble,
                    "f1": 0.001 / factor * flops**0.2 * wobble,
                }
                found.append(
                    {
                        "cell": f"{model}/{size}",
                        "axes": {"model": model, "size": size},
                        "seed": seed,
                        "flops": flops,
                        "parameters": 2_000_000,
                        "metrics": metrics,
                        "higher_is_better": {"bits": False, "f1": True},
                    }
                )
    return found


def test_laws_and_parity_come_out_of_the_records() -> None:
    bits, f1 = compare(records(), "model", ["bits", "f1"])
    assert list(bits.series) == ["ours", "other"]
    assert bits.series["ours"].law is not None and bits.series["ours"].law.exponent == pytest.approx(-0.5)
    # Half the error at exponent -1/2 takes a fourth of the FLOPs; half the score at 1/5 a thirty-second.
    (of_bits, _), (of_f1, _) = bits.pairs["ours", "other"], f1.pairs["ours", "other"]
    assert of_bits.ratio == pytest.approx(0.25) and of_f1.ratio == pytest.approx(2.0**-5)
    assert of_bits.interval is not None and of_bits.interval[0] < 0.25 < of_bits.interval[1]
    plain = json.loads(json.dumps(as_dict([bits, f1])))
    [pair] = plain[0]["pairs"]
    assert (pair["first"], pair["second"]) == ("ours", "other")
    assert pair["parity"]["ratio"] == pytest.approx(0.25) and plain[0]["laws"]["ours"]["points"] == 9
    assert plain[0]["laws"]["other"]["coefficient"] == pytest.approx(2e6, rel=0.01)


def test_a_point_without_a_logarithm_is_left_out_and_counted() -> None:
    changed = records()
    changed[0]["metrics"]["f1"], changed[1]["metrics"]["f1"] = 0.0, None
    series = compare(changed, "model", ["f1"])[0].series["ours"]
    assert series.left_out == 2 and len(series.values) == 7


def test_tables_hold_means_and_deviations() -> None:
    text = table(records(), ["bits", "f1"])
    first = text.splitlines()[2]
    assert first.startswith("| ours/s | 3 | 1e+12 | 2 M | 1 ± 0.03 |")
    lines = laws(compare(records(), "model", ["bits"]), records(), "model").splitlines()
    assert lines[2] == "| ours at 1.6e+13 FLOPs | 0.25 ± 0.0075 |"
    assert lines[-2].startswith("| parity FLOP ratio, ours to other | 0.25 [0.2")
    assert lines[-1] == "| ours and other cross at FLOPs | none near |"


def test_laws_cross_where_both_give_the_same() -> None:
    changed = records()
    for record in changed:
        if record["axes"]["model"] == "other":
            # Flat, and as low as the other model at 4e12 FLOPs.
            record["metrics"]["bits"] = 0.5
    found = compare(changed, "model", ["bits"])
    _, flops = found[0].pairs["ours", "other"]
    assert flops == pytest.approx(4e12, rel=0.02)
    lines = laws(found, changed, "model").splitlines()
    assert lines[-2:] == [lines[-2], f"| ours and other cross at FLOPs | {flops:.3g} |"]


def test_the_figure_is_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    comparisons = compare(records(), "model", ["bits", "f1"])
    draw(comparisons, tmp_path / "a.svg", title="both")
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text and len(text) > 20_000
    draw(comparisons, tmp_path / "a.png")
    draw(comparisons, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="must end in"):
        draw(comparisons, tmp_path / "a.txt")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scaling run"):
        read_records(tmp_path)
    with pytest.raises(UserError, match="no axis 'shape'; it has model, size"):
        compare(records(), "shape", ["bits"])
    with pytest.raises(UserError, match="'fid'; there are bits, f1"):
        metrics_of(records(), ["fid"])
