"""The attention table on the CPU: every line is there, and what is wrong is called wrong and never timed."""

from __future__ import annotations

import itertools
import json
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import attention
import cpu_attention
import verify
from attention_table import apart
from attention_table.cases import Case, Inputs, transfusion_mix
from attention_table.measure import Options
from attention_table.providers import Provider
from transfusion_kernels.verification.testing import exact_attention, relative_error

CPU = torch.device("cpu")


def options(**changed: Any) -> Options:
    plain: dict[str, Any] = {
        "device": CPU,
        "dtype": "fp32",
        "lengths": [128],
        "head_dims": [16],
        "families": ["transfusion"],
        "tokens": 256,
        "width": 32,
        "seconds": 60.0,
        "call_seconds": 0.0,
    }
    return Options(**(plain | changed))


def test_the_table_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    record = attention.run(options(families=list(attention.FAMILIES)), out=out)
    assert json.loads(out.read_text()) == record
    results = {(result["family"], result["provider"]): result for result in record["results"]}
    assert len(results) == len(attention.FAMILIES) * len(attention.PROVIDERS) == len(record["results"])
    for (family, provider), result in results.items():
        runs = provider in ("ours-cpu", "sdpa-dense") or (provider, family) == ("sdpa-flash-causal", "causal")
        assert result["status"] == ("ok" if runs else "unsupported"), result
        assert bool(result["reason"]) != runs
        if runs:
            assert result["errors"].keys() == {"out", "dq", "dk", "dv"}
            assert max(result["errors"].values()) < 1e-6
            assert all(
                result[part][key] > 0 for part in ("forward", "backward") for key in ("ms", "tflops", "share")
            )
    assert results["transfusion", "ours-cpu"]["mask_ms"] > 0
    assert record["limits"]["gemm_tflops"]["fp32"] > 0 and "visible pairs" in record["formulas"]["forward"]
    assert attention.exit_code(record) == 0
    assert capsys.readouterr().out.count("ours-cpu") == len(attention.FAMILIES)


def causal_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_the_right_mask(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    dense = inputs.mask.dense()[:, None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)


def without_a_gradient(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    right = with_the_right_mask(inputs)
    return lambda q, k, v: right(q, k, v.detach()) + 0 * v.sum()


def with_nan(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    right = with_the_right_mask(inputs)
    return lambda q, k, v: right(q, k, v) * torch.tensor([1.0] * 15 + [torch.nan])


def with_one_wrong_row(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    right = with_the_right_mask(inputs)
    keeps = torch.ones(inputs.q.shape[:3])
    keeps[0, 0, 77] = 0.99
    return lambda q, k, v: right(q, k, v) * keeps[..., None]


@pytest.mark.parametrize(
    "prepare",
    [lambda inputs: causal_only, without_a_gradient, with_nan, with_one_wrong_row],
    ids=["causal_only", "without_a_gradient", "with_nan", "with_one_wrong_row"],
)
def test_a_wrong_provider_is_wrong_and_not_timed(
    prepare: Callable[[Inputs], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    providers = [Provider("liar", prepare, ours=True), Provider("honest", with_the_right_mask)]
    record = attention.run(options(), providers)
    liar, honest = record["results"]
    assert liar["status"] == "wrong" and liar["reason"] and "errors" in liar
    assert not {"forward", "backward", "mask_ms"} & liar.keys()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert honest["status"] == "ok" and honest["forward"]["ms"] > 0
    assert attention.exit_code(record) == 3
    assert "liar              WRONG" in capsys.readouterr().out


def test_one_wrong_row_of_many_is_seen_where_the_whole_tensor_hides_it() -> None:
    case = Case("transfusion", 2048, 1, 1, 16, "bf16")
    inputs = case.inputs(CPU)
    exact = verify.exact_results(inputs)
    right = with_the_right_mask(inputs)
    keeps = torch.ones(inputs.q.shape[:3], dtype=torch.bfloat16)
    keeps[0, 0, 1000] = 0.5
    verdict = verify.verify(
        lambda q, k, v: right(q, k, v) * keeps[..., None], inputs, exact, "bf16", poison=False
    )
    assert max(verdict.errors.values()) < verify.MAX_ERROR["bf16"][0]
    assert verdict.worst_row > verify.MAX_ERROR["bf16"][1] and not verdict.right
    assert verify.verify(right, inputs, exact, "bf16", poison=False).right


def test_a_provider_that_fails_leaves_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(inputs: Inputs) -> Any:
        raise RuntimeError("no kernel\n  for this image")

    record = attention.run(options(), [Provider("broken", fails), Provider("honest", with_the_right_mask)])
    broken, honest = record["results"]
    assert (broken["status"], broken["reason"]) == ("failed", "RuntimeError: no kernel for this image")
    assert honest["status"] == "ok"
    assert attention.exit_code(record) == 0, "only our own failures fail the run"
    assert attention.exit_code(attention.run(options(), [Provider("broken", fails, ours=True)])) == 3


def test_out_of_time_is_said() -> None:
    for isolate in (None, 30.0):
        record = attention.run(options(seconds=0.0, isolate=isolate))
        assert len(record["results"]) == len(attention.PROVIDERS)
        assert {(result["status"], result["reason"]) for result in record["results"]} == {
            ("skipped", "out of time")
        }


def test_the_most_telling_comes_first_and_what_compiles_for_long_last() -> None:
    table = options(lengths=[8192, 1024], head_dims=[128, 64], families=list(attention.FAMILIES))
    stages = table.stages(attention.PROVIDERS)
    begin = [(case.head_dim, case.length, case.family) for case in stages[0][0]]
    assert begin == [(width, 8192, family) for width in (128, 64) for family in ("causal", "transfusion")]
    quick, slow = ([provider.name for provider in stages[stage][1]] for stage in (0, 1))
    assert quick[:3] == ["ours-hopper", "ours-triton", "ours-triton-split"]
    assert quick.index("sdpa-cudnn-causal") < quick.index("flash-attn-3")
    assert slow[:3] == ["flex", "flex-tuned", "cudnn-flex"]
    assert [cases == stages[0][0] for cases, _ in stages] == [True, True, False, False]
    every = [(case, provider.name) for cases, some in stages for case in cases for provider in some]
    assert len(every) == len(set(every)) == len(table.cases()) * len(attention.PROVIDERS)


def test_all_that_was_measured_is_on_the_disk_while_the_rest_runs(tmp_path: Path) -> None:
    out, seen = tmp_path / "attention.json", []

    def looks(inputs: Inputs) -> Any:
        right, calls = with_the_right_mask(inputs), itertools.count()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if next(calls) % 3 == 0:
                seen.append(json.loads(out.read_text())["results"][-1])
            return right(q, k, v)

        def build() -> None:
            seen.append(json.loads(out.read_text())["results"][-1])

        builds.append(build)
        return attend

    builds: list[Callable[[], None]] = []
    provider = Provider("looking", looks, lambda inputs: builds[-1]())
    attention.run(options(), [provider], out)
    assert seen[0]["status"] == "running" and "errors" not in seen[0]
    assert any("errors" in each and "forward" not in each for each in seen)
    assert {"forward", "backward"} <= seen[-1].keys() and seen[-1]["status"] == "running"


# Stands for a process that measures: what it leaves behind and how it ends is told by the name of the provider.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[2]).read_text())
lines = [{**case, "provider": job["provider"], "ours": True} for case in job["cases"]]
def write(*statuses):
    results = [line | {"status": status, "reason": ""} for line, status in zip(lines, statuses)]
    Path(job["results"] + "~").write_text(json.dumps({"results": results}))
    os.replace(job["results"] + "~", job["results"])
if job["provider"] == "hangs":
    write("unsupported", "running")
    time.sleep(600)
if job["provider"] == "crashes":
    write("running")
    os.abort()
if job["provider"] == "takes-its-time":
    for count in range(1, len(lines) + 1):
        time.sleep(0.7)
        write(*["unsupported"] * count)
write(*["unsupported"] * len(lines))
"""


def test_what_hangs_or_crashes_loses_its_own_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-S", str(tmp_path / "stand_in.py")))
    providers = [
        Provider(name, with_the_right_mask, ours=True) for name in ("hangs", "crashes", "takes-its-time")
    ]
    families, out = ["causal", "tiny", "captions", "document"], tmp_path / "attention.json"
    record = attention.run(options(families=families, isolate=1.5), providers, out)
    assert json.loads(out.read_text()) == record
    found = {(each["provider"], each["family"]): each["status"] for each in record["results"]}
    assert len(found) == len(record["results"]) == 12
    # A process for the headline, causal, and one for the rest, which lasts longer than the limit but is never silent.
    assert [found["takes-its-time", family] for family in families] == ["unsupported"] * 4
    assert [found["hangs", family] for family in families] == [
        "unsupported",
        "unsupported",
        "hung",
        "skipped",
    ]
    assert [found["crashes", family] for family in families] == ["failed", "skipped", "skipped", "skipped"]
    reasons = {each["status"]: each["reason"] for each in record["results"]}
    assert reasons["hung"] == "no new figure for 1.5 s" and reasons["skipped"] == "crashes failed before"
    assert reasons["failed"] == f"its process ended with {-signal.SIGABRT}"
    assert attention.exit_code(record) == 3
    assert "HUNG: no new figure" in capsys.readouterr().out


def test_a_process_of_its_own_measures_the_same(tmp_path: Path) -> None:
    chosen = [provider for provider in attention.PROVIDERS if provider.name == "ours-cpu"]
    record = attention.run(options(families=["causal"], isolate=60.0), chosen, tmp_path / "attention.json")
    (result,) = record["results"]
    assert result["status"] == "ok" and result["mask_ms"] > 0 and max(result["errors"].values()) < 1e-6
    for way in ("forward", "backward"):
        share = result[way]["tflops"] / record["limits"]["gemm_tflops"]["fp32"]
        assert result[way]["share"] == pytest.approx(share)


@pytest.mark.parametrize("family", attention.FAMILIES)
def test_the_reference_is_the_definition(family: str) -> None:
    inputs = Case(family, 300, 2, 2, 16, "fp32").inputs(CPU)
    out, _, gradients = exact_attention(inputs.q, inputs.k, inputs.v, inputs.mask, inputs.grad_out)
    for blocked, plain in zip(verify.exact_results(inputs, block=64), (out, *gradients), strict=True):
        assert relative_error(blocked, plain) < 1e-13


@pytest.mark.parametrize("family", attention.FAMILIES)
@pytest.mark.parametrize("size", [64, 256, 1024, 8192])
def test_families_fill_their_rows(family: str, size: int) -> None:
    for seed in range(5):
        documents, images = attention.FAMILIES[family](size, random.Random(seed))
        assert [start for start, _ in documents] == [0, *(end for _, end in documents[:-1])]
        assert documents[-1][1] == size
        for first, end in images:
            assert any(start <= first < end <= stop for start, stop in documents)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(images))


def test_the_image_shows_what_was_timed(tmp_path: Path) -> None:
    record = attention.run(options(lengths=[64, 128], families=["transfusion", "causal"]))
    attention.draw(record, tmp_path / "attention.png")
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width > 500 and image.height > 400
    attention.draw(record | {"results": []}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_the_bars_of_the_cpu_are_judged_on_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "LENGTH", 1024)
    for family, bars in cpu_attention.BARS.items():
        found = cpu_attention.compare(family, rounds=1)
        assert found["right"] and found["bars"] == bars
        times = found["milliseconds"]
        assert found["ratios"]["under dense"] == pytest.approx(times["dense"] / times["ours"])
        assert found["ratios"]["over causal"] == pytest.approx(times["ours"] / times["causal"])
        assert found["reached"]["under dense"] == (found["ratios"]["under dense"] >= bars["under dense"])
    assert cpu_attention.median_ratio([3.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == 3.0


def test_the_mix_is_half_images() -> None:
    found = [transfusion_mix(8192, random.Random(seed)) for seed in range(50)]
    share = sum(end - first for _, images in found for first, end in images) / (50 * 8192)
    assert 0.4 < share < 0.6
    lengths = [end - first for documents, _ in found for first, end in documents[:-1]]
    assert min(lengths) >= 2048 and max(lengths) <= 4096
