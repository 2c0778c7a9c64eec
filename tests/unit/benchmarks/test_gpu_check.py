"""launch/gpu_check.sh, tiny and on the CPU: both calls, with a kernel that hangs and an illegal access, and killed."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from triton.runtime.jit import JITFunction

from gpu_check import compile_ahead, processes, pytest_plugin, summary
from gpu_check.calls import PLANNED_SHARE, digest_of_tests, training_steps
from gpu_check.record import Record, read_json
from gpu_check.runner import Part, Runner, Skip
from gpu_check.verdicts import Verdicts, restore
from transfusion.data.shards.webdataset import write_shards
from transfusion.sequence.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "launch" / "gpu_check.sh"
# What the machine takes with it has limits: so many files come back.
MAX_FILES = 8
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}


def command(out: Path, *arguments: str) -> list[str]:
    return ["bash", str(SCRIPT), "--cpu", "--work", str(out.parent / "work"), *arguments, str(out)]


def check(out: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """The exit code of a call, what it printed, and what it found."""
    ended = subprocess.run(
        command(out, "--seconds", "1400", *arguments),
        capture_output=True,
        text=True,
        timeout=1500,
        env=ENVIRONMENT,
    )
    return ended.returncode, ended.stdout + ended.stderr, json.loads((out / "results.json").read_text())


def carry(folder: Path) -> Path:
    """What launch/gpu_wheels.sh makes: a wheel, captioned images, texts, a tokenizer."""
    random_ = np.random.default_rng(0)
    words = ["red heart", "cat face", "flag of Japan", "smiling face with sunglasses"]
    emoji = folder / "emoji"
    for name in ("train", "val"):
        samples = []
        for number in range(12):
            stream = io.BytesIO()
            Image.fromarray(random_.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(stream, format="PNG")
            samples.append({"png": stream.getvalue(), "txt": words[number % 4].encode()})
        write_shards(samples, emoji / "images" / name)
    texts = [f"{words[number % 4]} number {number} of the texts" for number in range(40)]
    (emoji / "text" / "train").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for path in (emoji / "text" / "train" / "00000.jsonl", emoji / "text_validation.jsonl"):
        path.write_text(lines)
    train_tokenizer([*texts, *words] * 20, emoji / "tokenizer.model", vocabulary=300)
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / "carried_along-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along.py", "HERE = True\n")
        wheel.writestr(
            "carried_along-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1\n"
        )
        wheel.writestr(
            "carried_along-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("carried_along-1.dist-info/RECORD", "")
    return folder


@pytest.mark.slow
def test_both_calls_with_a_kernel_that_hangs_and_an_illegal_access(tmp_path: Path) -> None:
    """All that the faulty parts do not make themselves is there. Some parts whose like runs too are stood in for."""
    carried = str(carry(tmp_path / "carried"))
    first, second = tmp_path / "first", tmp_path / "second"
    alike = [f"--fake={name}=grow" for name in ("rivals-64", "flex-128", "cudnn-flex-128", "tests-32")]
    faults = ["--fake=probes=hang", "--fake=attention-64=hang", "--fake=step-0.76b=abort"]
    code, printed, found = check(first, "--carried", carried, *alike, *faults)
    parts = found["parts"]
    failed = {
        name: part["status"] for name, part in parts.items() if part["status"] not in ("passed", "skipped")
    }
    assert failed == {
        "probes": "failed",
        "probes-float32": "failed",
        "attention-64": "out of time",
        "step-0.76b": "failed",
    }, printed
    assert code == 3 and found["finished"] and not found["passed"] and found["call"] == 1
    # What the faulty ones had written by then.
    assert parts["attention-64"]["result"] == parts["step-0.76b"]["result"] == {"figures": [0, 1, 2, 3]}
    assert (
        parts["step-0.76b"]["signal"] == "SIGABRT" and "illegal memory access" in parts["step-0.76b"]["tail"]
    )
    (kernel,) = found["kernels"]
    assert (kernel["subject"]["implementation"], kernel["verdict"]["outcome"]) == ("triton", "hung")
    # All else.
    assert parts["wheels"]["status"] == "passed" and (tmp_path / "work/site/carried_along.py").exists()
    assert parts["environment"]["result"]["imports"].keys() >= {"torch", "triton"}
    assert parts["compile"]["result"]["done"] == parts["compile"]["result"]["of"]
    assert parts["nccl"]["result"]["right"]
    statuses = {line["provider"]: line["status"] for line in parts["attention-128"]["result"]["results"]}
    assert statuses == {"ours-cpu": "ok"}
    assert any(line["status"] == "ok" for line in parts["rivals-128"]["result"]["results"])
    assert parts["step-1.4b"]["result"]["step"]["tokens_per_second"] > 0
    assert parts["tests"]["result"]["skipped"] > 100 and parts["tests"]["result"]["failed"] == 0
    assert found["next"]["command"] in printed and "looks into triton-32" in printed
    files = {path.name for path in first.iterdir()}
    assert files == {"results.json", "log.txt", "tests.jsonl"} and len(files) <= MAX_FILES

    shutil.rmtree(tmp_path / "work")  # as on a fresh machine
    grown = ["--fake=compile=grow", "--fake=nccl=grow"]
    code, printed, found = check(second, "--call", "2", "--after", str(first), "--carried", carried, *grown)
    parts = found["parts"]
    failed = {
        name: part["status"] for name, part in parts.items() if part["status"] not in ("passed", "skipped")
    }
    assert failed == {"probes": "failed"} and code == 3, printed
    steps = parts["diagnosis"]["result"]["steps"]
    assert [step["found"]["stage"] for step in steps] == ["done"] * 3
    assert all(result["right"] for result in steps[1]["found"].values() if isinstance(result, dict))
    assert {line["status"] for line in parts["sweep"]["result"]["results"]} == {"ok"}
    assert [line["plain_ms"] > 0 for line in parts["tick"]["result"]["results"]] == [True, True]
    assert parts["step-emoji"]["result"]["step"]["step_ms"] > 0
    assert "text_loss_nats_per_token" in parts["evaluation"]["result"]
    assert "caption_token_f1" in parts["captions"]["result"]
    lines = read_json(second / "metrics.jsonl")
    assert max(line["step"] for line in lines if "step" in line) == 4
    files = {path.name for path in second.iterdir()}
    assert files == {"results.json", "log.txt", "metrics.jsonl", "grid.png", "report.html", "config.yaml"}
    assert len(files) <= MAX_FILES


@pytest.mark.slow
def test_killed_at_any_second_it_has_what_it_found(tmp_path: Path) -> None:
    """The parts are stood in for, so that there are many in a short time."""
    random_ = random.Random(0)
    for number, seconds in enumerate([0.5, *(random_.uniform(1, 9) for _ in range(5))]):
        out = tmp_path / f"{number}" / "out"
        process = subprocess.Popen(
            command(out, "--fake=all=grow"), stdout=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate()[0].decode()
        if not (out / "results.json").exists():
            assert seconds < 1 and printed == ""
            continue
        found = json.loads((out / "results.json").read_text())
        ended = [line.split()[2].removesuffix(":") for line in printed.splitlines() if "passed" in line]
        assert not found["finished"] and set(ended) <= found["parts"].keys()
        for name in ended:
            part = found["parts"][name]
            assert part["status"] == "passed", name
            assert part["result"] == {"figures": [0, 1, 2, 3]}, name
        # What still ran is ended too.
        deadline = time.monotonic() + 10
        while left := processes.marked(f"{process.pid}-"):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def test_bad_arguments_are_told(tmp_path: Path) -> None:
    lost = ["--call", "2", "--after", str(tmp_path), "--work", str(tmp_path / "work"), str(tmp_path / "out")]
    for arguments in (
        ["--nonsense"],
        [],
        ["--seconds"],
        ["--seconds", "soon", "out"],
        ["--call", "3", "out"],
        lost,
    ):
        ended = subprocess.run(
            ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=ENVIRONMENT
        )
        assert ended.returncode == 2 and ended.stderr.startswith("usage: ")
    for arguments in ([], ["a", "b"], ["--help"]):
        ended = subprocess.run(
            ["bash", str(ROOT / "launch/gpu_wheels.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert ended.returncode == 2 and ended.stderr.startswith("usage: ")


def runner(out: Path, seconds: float = 60.0) -> Runner:
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    return Runner(Record(out, {}), seconds=seconds, root=ROOT, variables=variables, mark=f"test-{out}")


def python(program: str) -> list[str]:
    return [sys.executable, "-S", "-c", program]


def test_parts_end_at_their_limits_with_all_they_started(tmp_path: Path) -> None:
    run = runner(tmp_path)
    orphan = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(99)'], start_new_session=True); "
        "print('begun', flush=True); "
    )
    wrote = tmp_path / "wrote.json"
    begin = time.monotonic()
    run.run(
        [
            Part("leaves one behind", 30, lambda: python(orphan)),
            Part("beside", 4, lambda: python("import time; time.sleep(99)"), beside=True),
            Part(
                "hangs",
                3,
                lambda: python(orphan + f"open({str(wrote)!r}, 'w').write('[1]'); time.sleep(99)"),
                wrote,
            ),
            Part("fails", 30, lambda: python("raise SystemExit('a reason')")),
        ]
    )
    assert time.monotonic() - begin < 20
    found = run.record.data["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "leaves one behind": "passed",
        "beside": "out of time",
        "hangs": "out of time",
        "fails": "failed",
    }
    assert found["hangs"]["result"] == [1] and "begun" in found["hangs"]["tail"]
    assert "a reason" in found["fails"]["tail"] and found["fails"]["exit_code"] == 1
    assert processes.marked(f"test-{tmp_path}") == []
    assert json.loads((tmp_path / "results.json").read_text())["parts"] == found


def test_what_has_no_time_or_no_use_is_told(tmp_path: Path) -> None:
    def skip() -> list[str]:
        raise Skip("nothing to do")

    run = runner(tmp_path, seconds=30.0)
    run.run(
        [Part("a", 5, skip), Part("b", 5, lambda: python(""), leave=29.0), Part("c", 5, lambda: python(""))]
    )
    found = {
        name: (part["status"], part.get("reason", "")) for name, part in run.record.data["parts"].items()
    }
    assert found["a"] == ("skipped", "nothing to do") and found["c"] == ("passed", "")
    assert found["b"][0] == "no time left" and found["b"][1].endswith("of which 29 for others")


def test_a_part_waits_for_one_beside_it(tmp_path: Path) -> None:
    run = runner(tmp_path)
    path = tmp_path / "made"
    make = f"import time; time.sleep(1); open({str(path)!r}, 'w')"
    needs = f"import os; assert os.path.exists({str(path)!r})"
    run.run(
        [
            Part("makes", 20, lambda: python(make), beside=True),
            Part("needs", 20, lambda: python(needs), after="makes", patience=15),
            Part("hangs", 4, lambda: python("import time; time.sleep(99)"), beside=True),
            Part("is impatient", 20, lambda: python(""), after="hangs", patience=0.5),
        ]
    )
    statuses = {name: part["status"] for name, part in run.record.data["parts"].items()}
    assert statuses == {
        "makes": "passed",
        "needs": "passed",
        "hangs": "out of time",
        "is impatient": "passed",
    }


def test_newest_files_are_kept(tmp_path: Path) -> None:
    run = runner(tmp_path / "out")
    program = f"[open({str(tmp_path)!r} + f'/step_{{n}}.png', 'w').write(str(n)) for n in range(3)]"
    run.run([Part("draws", 20, lambda: python(program), kept={str(tmp_path / "step_*.png"): "grid.png"})])
    assert (tmp_path / "out" / "grid.png").read_text() == "2"


def verdict(folder: Path, name: str, outcome: str, at: float = 0.0) -> None:
    implementation, width, dtype = name.split("-")
    subject = {"implementation": implementation, "head_dim": int(width), "dtype": dtype}
    record = {
        "subject": subject,
        "verdict": {"outcome": outcome, "detail": "why", "time": at, "seconds": 2.0},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-{at:g}.json").write_text(json.dumps(record))


def test_verdicts_are_read_and_carried_over(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    verdict(there, "hopper-128-bfloat16", "right", at=1)
    verdict(there, "hopper-128-bfloat16", "hung", at=2)
    verdict(there, "triton-64-bfloat16", "wrong")
    verdict(there, "decode-64-bfloat16", "right")
    (there / "broken.json").write_text("{")
    restore(Verdicts(there).records, here)
    found = Verdicts(here)
    assert found.deadly() == [("hopper", 128)]
    assert sorted(found.not_right()) == [("hopper", 128, "bfloat16"), ("triton", 64, "bfloat16")]
    assert (
        found.outcome("decode", 64, "bfloat16") == "right" and found.outcome("decode", 32, "bfloat16") == ""
    )
    assert "hopper 128 bfloat16: hung, why (2 s)" in found.lines


def test_all_that_is_compiled_ahead_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have the arguments that they take. Compiling them all takes minutes."""
    compiled: list[str] = []

    class Compiled:
        def __getattr__(self, name: str) -> None:
            return None

    def compile_nothing(self: Any, key: Any, signature: Any, device: Any, *others: Any) -> Compiled:
        compiled.append(self.__name__)
        return self.device_caches[device][0].setdefault(key, Compiled())

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    for name in ("first", "tests", "sweep"):
        jobs = list(compile_ahead.SETS[name]())
        assert len(dict(jobs)) == len(jobs)
        assert {
            job: problem for job, each in jobs if (problem := compile_ahead.compile_one(each, "sm_90"))
        } == {}
    assert {"forward_kernel", "_keys_kernel", "_decode_kernel", "_bounds_kernel"} <= set(compiled)


def test_steps_fit_the_time() -> None:
    assert training_steps(180.0, {"step": {"step_ms": 100.0}}) == int(PLANNED_SHARE * 135 * 10)
    assert training_steps(5.0, None) == 10 and training_steps(1e9, None) == 4000


def test_the_summary_names_what_decides() -> None:
    def line(provider: str, ms: float) -> dict[str, Any]:
        speed = {"ms": ms, "tflops": 600.0, "share": 0.76}
        return {
            "head_dim": 128, "family": "causal", "provider": provider, "status": "ok", "forward": speed,
            "backward": speed,
        }  # fmt: skip

    step = {"step_ms": 300.0, "tokens_per_second": 1e5, "peak_gib": 54.0, "rates": {"exact": {"mfu": 0.46}}}
    tests = digest_of_tests(
        [{"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "failed", "reason": "hung"}]
    )
    table = {"results": [line("ours-hopper", 1.0), line("ours-triton", 2.0), line("ours-triton-split", 3.0)]}
    parts = {"attention-128": table, "step-0.76b": {"step": step}, "tests": tests, "sweep": None}
    parts["tick"] = {"results": [{"together": 8, "what": "tokens", "plain_ms": 9.0, "graphs_ms": 1.5}]}
    told = "\n".join(
        summary.lines_of({"parts": {name: {"result": result} for name, result in parts.items()}})
    )
    assert (
        "ours-hopper: 600 (76%) + 600 (76%)" in told and "split over fused backward, 128 causal: 1.50" in told
    )
    assert "a tick of 8 tokens: plain 9.00 ms, graphs 1.50 ms" in told
    assert "MFU 46.0%" in told and "1 passed, 1 failed" in told and "b: hung" in told


def test_tests_are_ordered_and_those_that_hang_left_out() -> None:
    def item(node: str, **parameters: Any) -> Any:
        return SimpleNamespace(nodeid=node, name=node, callspec=SimpleNamespace(params=parameters))

    half = torch.bfloat16
    items = {
        "float32": item("test_gpu.py::test_equals_in_float32", width=64),
        "cache": item("test_gpu.py::test_attention_to_a_cache", width=64, dtype=half),
        "96": item("test_gpu.py::test_half", width=96, dtype=half),
        "128": item("test_gpu.py::test_half", width=128, dtype=half),
        "32": item("test_gpu.py::test_half", width=32, dtype=half),
        "hopper": item("test_hopper_gpu.py::test_exact", width=128, dtype=half),
    }

    def chosen(width: str, *without: str) -> list[str]:
        options = {"--gpu-check-width": width, "--gpu-check-without": list(without)}
        config = SimpleNamespace(
            getoption=options.__getitem__, hook=SimpleNamespace(pytest_deselected=lambda items: None)
        )
        left = list(items.values())
        pytest_plugin.pytest_collection_modifyitems(config, left)  # type: ignore[arg-type]
        return [name for each in left for name, known in items.items() if known is each]

    assert chosen("others") == ["hopper", "128", "96", "cache", "float32"]
    assert chosen("32") == ["32"]
    assert chosen("others", "hopper-128", "decode-64") == ["128", "96", "float32"]


FAULTY = """
import pytest, torch

@pytest.mark.parametrize("number", range(4))
def test_it(number, monkeypatch):
    if number == 1:
        def fault(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
        torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), fault
        fault()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_gpu_ends_the_worker_and_fails_no_other_test(tmp_path: Path, workers: int) -> None:
    shutil.copy(ROOT / "tests/kernels/conftest.py", tmp_path)
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    out = tmp_path / "out.jsonl"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    paths = [str(ROOT / name) for name in ("benchmarks", "kernels", "src")]
    ended = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_check.pytest_plugin",
            "--rootdir", str(tmp_path), "--gpu-check-out", str(out), *(["-n", str(workers)] if workers else []),
            str(tmp_path),
        ],
        capture_output=True, text=True, timeout=300, env={**variables, "PYTHONPATH": ":".join(paths)},
    )  # fmt: skip
    lines = read_json(out)
    outcomes = [(line["test"].rpartition("[")[2].removesuffix("]"), line["outcome"]) for line in lines]
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ("1", "failed") in outcomes
    if workers:
        assert {number for number, outcome in outcomes if outcome == "passed"} == {"0", "2", "3"}, outcomes
        assert {number for number, outcome in outcomes if outcome == "failed"} == {"1"}
    else:
        assert "the GPU was lost by" in ended.stdout and len(outcomes) == 2
