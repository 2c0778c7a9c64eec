"""The doctor finds what is missing, says the command that mends it, and falls over nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from transfusion.cli import doctor
from transfusion.cli.doctor import Finding, exit_code, print_table, run_doctor
from transfusion.cli.doctor_run import look_at_run
from transfusion.config import Config
from transfusion.data.index.source_index import build_indexes
from transfusion.data.shards.webdataset import write_shards
from transfusion.sequence.tokenizer import Tokenizer
from transfusion_kernels.probe import Subject, Verdict


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No process of its own for each check, and no look into this machine's caches."""
    monkeypatch.setattr(doctor, "_problem_of", lambda command: "")
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Make modules look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in hidden else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_this_machine_can_train() -> None:
    findings = run_doctor()
    assert exit_code(findings) == 0
    assert named(findings, "torch").state == "good"
    assert named(findings, "engine").text.startswith(("local", "zero"))
    assert "could not be checked" not in "".join(finding.text for finding in findings)
    assert named(findings, "attention").text.split(":")[0] in ("cpu", "triton", "reference")


@pytest.fixture
def run_config(tmp_path: Path, tokenizer: Tokenizer) -> Config:
    write_shards([{"txt": b"some text to read"} for _ in range(4)], tmp_path / "texts")
    data = {
        "tokenizer": str(tokenizer.path),
        "sources": [{"name": "texts", "shards": f"{tmp_path}/texts/*.tar"}],
    }
    return Config.model_validate({"run": {"dir": str(tmp_path / "run")}, "data": data})


def test_a_run_is_looked_at_before_it_starts(
    run_config: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Also a shard that was written anew with its former size and times."""
    findings = look_at_run(run_config)
    assert exit_code(findings) == 0 and "1 shards have none yet" in named(findings, "index").text
    build_indexes(run_config, run_config.data.sources, tokenizer)
    assert [finding.name for finding in look_at_run(run_config)] == ["data", "run folder"]
    (shard,) = (tmp_path / "texts").glob("*.tar")
    known, data = shard.stat(), shard.read_bytes()
    shard.write_bytes(data.replace(b"to read", b"to skip"))
    os.utime(shard, ns=(known.st_atime_ns, known.st_mtime_ns))
    stale = named(look_at_run(run_config), "index")
    assert stale.state == "note" and f"{shard}: the shard has changed since" in stale.text


def test_what_a_run_would_refuse_is_missing(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = run_config.data.model_copy(update={"tokenizer": str(tmp_path / "no.model")})
    other = run_config.model_copy(update={"data": data})
    assert "no.model" in named(look_at_run(other), "data").text and exit_code(look_at_run(other)) == 3
    monkeypatch.setattr("shutil.which", lambda name: None)
    compiled = run_config.train.model_copy(update={"compile": True})
    found = look_at_run(run_config.model_copy(update={"train": compiled}))
    assert "build-essential" in named(found, "compiler").remedy and exit_code(found) == 3
    (tmp_path / "file").write_text("")
    beyond = run_config.run.model_copy(update={"dir": str(tmp_path / "file" / "run")})
    found = look_at_run(run_config.model_copy(update={"run": beyond}))
    assert named(found, "run folder").remedy == "choose another run.dir"


@pytest.mark.parametrize("module", ["torch", "webdataset", "sentencepiece", "yaml"])
def test_a_missing_required_part_is_exit_code_3(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    hide(monkeypatch, module)
    findings = run_doctor()
    assert exit_code(findings) == 3
    missing = [finding for finding in findings if finding.state == "missing"]
    assert missing and all(finding.remedy.startswith("pip install") for finding in missing)


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "jinja2", "wandb", "triton"])
def test_a_missing_optional_part_is_a_note_with_its_command(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    before = {finding.name: finding.state for finding in run_doctor()}
    hide(monkeypatch, module)
    findings = run_doctor()
    assert exit_code(findings) == 0
    changed = [finding for finding in findings if before[finding.name] != finding.state]
    assert len(changed) == 1 and changed[0].state == "note" and "pip install" in changed[0].remedy


def test_without_deepspeed_one_cpu_process_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "deepspeed")
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    findings = run_doctor()
    assert exit_code(findings) == 0
    assert "DS_BUILD_OPS=0 pip install" in named(findings, "deepspeed").remedy
    assert named(findings, "engine").text.startswith("local in one process")


def test_nothing_at_all_installed_does_not_stop_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = ["torch", "triton", "deepspeed", *doctor.CORE.values()]
    hide(monkeypatch, *modules, *(module for module, _ in doctor.OPTIONAL.values()))
    assert doctor.main() == 3
    shown = capsys.readouterr().out
    assert "Training cannot run yet" in shown
    assert shown.count("-> ") >= len(modules)


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("libcudart.so.13: cannot open shared object file")
        yield

    monkeypatch.setattr(doctor, "LOOKS", (broken,))
    (finding,) = run_doctor()
    assert finding.name == "broken" and "libcudart" in finding.text


def test_a_torchvision_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_installed", lambda module: True)
    assert not any(finding.name == "torchvision" for finding in run_doctor())
    monkeypatch.setattr(doctor, "_problem_of", lambda command: "operator torchvision::nms does not exist")
    finding = named(run_doctor(), "torchvision")
    assert "nms" in finding.text and finding.remedy == "pip uninstall -y torchvision"


def test_only_an_old_lock_is_stale(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert not any(finding.name == "DeepSpeed lock" for finding in run_doctor())
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    finding = named(run_doctor(), "DeepSpeed lock")
    assert "2.0 hours" in finding.text and finding.remedy == f"rm '{lock}'"


def test_a_triton_without_a_compiler_names_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_problem_of", lambda command: "Failed to find C compiler")
    monkeypatch.setattr("shutil.which", lambda name: None)
    finding = named(run_doctor(), "triton")
    assert finding.state == "note" and "build-essential" in finding.remedy


def test_the_probes_of_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor._kernels()) == []
    hung = Verdict("hung", "no end after 40 s, waiting for backward at 300 positions", time.time(), 40.0)
    right = Verdict("right", "", time.time(), 9.0)
    verdicts = {("hopper", 64): right, ("hopper", 128): hung, ("triton", 128): right, ("triton", 32): None}
    record = [
        (Subject(name, head_dim, "bfloat16", "NVIDIA H200", "9.0", "", "2.13.0", "3.7.1", ""), verdict)
        for (name, head_dim), verdict in verdicts.items()
    ]
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    monkeypatch.setattr(doctor, "_is_installed", lambda module: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("transfusion_kernels.dispatch.on_record", lambda device: record)
    command = "python -m transfusion_kernels.probe"
    assert list(doctor._kernels()) == [
        Finding(
            "hopper kernels",
            "note",
            "head_dim 128 in bfloat16: hung: no end after 40 s, waiting for backward at 300 positions",
            f"{command} --again --implementation hopper --head-dim 128 --dtype bfloat16",
        ),
        Finding("hopper kernels", "good", "right here for head_dim 64 in bfloat16"),
        Finding("triton kernels", "good", "right here for head_dim 128 in bfloat16"),
        Finding("probes", "note", "not made yet: 1 of the triton kernels; each is at its first use", command),
    ]


def test_findings_are_printed_with_their_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Finding("part", "missing", "not installed", "pip install part", required=True)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MISSING", "part", "not", "installed"]
    assert lines[1].split() == ["->", "pip", "install", "part"]


def test_the_problem_of_a_command_is_its_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert doctor._problem_of([sys.executable, "-c", ""]) == ""
    assert (
        doctor._problem_of([sys.executable, "-c", "raise RuntimeError('so it is')"])
        == "RuntimeError: so it is"
    )
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.5)
    assert "no answer" in doctor._problem_of([sys.executable, "-c", "import time; time.sleep(20)"])


@pytest.mark.slow
def test_triton_is_really_tried() -> None:
    command = [sys.executable, "-c", "import sys, transfusion.cli.doctor as d; sys.exit(d.main())"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the attention kernel" in ended.stdout
