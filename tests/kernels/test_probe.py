"""Probes whose kernels hang, fault or are wrong: the verdict, its record, and what runs in their place.

No GPU is needed. The process of a probe is played by others, and in `slow` tests by the true one, which runs Triton's
interpreter.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion_kernels import IntervalMask, dispatch, explain, interval_attention, probe
from transfusion_kernels.probe import Subject, Verdict, records, verdict_on
from transfusion_kernels.probe import __main__ as command_line
from transfusion_kernels.probe import process as running
from transfusion_kernels.probe.process import MARK, run_child

KERNELS = Path(__file__).parents[2] / "kernels" / "transfusion_kernels"
SUBJECT = Subject("triton", 64, "bfloat16", "NVIDIA H200", "9.0", "580.1", "2.13.0", "3.7.1", "0123")
WAITING = "waiting for forward at 300 positions"
PROLOGUE = f"""
import json, os, signal, subprocess, sys, time
mark = {MARK!r}
def tell(**told):
    print("\\n" + mark + json.dumps(told), flush=True)
def end(outcome, detail=""):
    tell(outcome=outcome, detail=detail)
    sys.exit()
"""
WAIT = f"tell(stage={WAITING!r})\n"
HANG = WAIT + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)"
# What a child does, and what is made of it. Whatever the limit is for the child of a test, it is longer than a start.
CHILDREN = {
    "end('right')": "right",
    "end('wrong', 'dq by 0.3 at 300 positions')": "wrong: dq by 0.3 at 300 positions",
    "end('failed', 'CompilationError: no')": "failed: CompilationError: no",
    WAIT
    + "print('nonsense', file=sys.stderr)\nprint('CUDA error: bad', file=sys.stderr, flush=True)\nos.abort()": (
        f"died: signal 6, SIGABRT, {WAITING}: CUDA error: bad"
    ),
    WAIT + "os.kill(os.getpid(), signal.SIGSEGV)": f"died: signal 11, SIGSEGV, {WAITING}",
    WAIT
    + "raise ValueError('so it is')": f"died: exit code 1 without a verdict, {WAITING}: ValueError: so it is",
    WAIT + "sys.exit()": f"died: exit code 0 without a verdict, {WAITING}",
    # A verdict, and then a fault.
    WAIT + "tell(outcome='right', detail='')\nos.abort()": f"died: signal 6, SIGABRT, {WAITING}",
    # What the machine does to it says nothing of the kernels.
    WAIT + "os.kill(os.getpid(), signal.SIGKILL)": f"undecided: signal 9, SIGKILL, {WAITING}",
    "sys.exit('no torch')": "undecided: exit code 1 without a verdict: no torch",
    # Lines that mean nothing, some of them nearly something.
    "sys.stdout.buffer.write(bytes(range(256)) * 999)\nfor text in ('', '{', '[1]', 'null'):\n"
    "    print(mark + text, flush=True)\ntell(outcome='fine'); tell(outcome=1, detail=2, stage=3)\n"
    "tell(outcome='right', detail=1)": "undecided: exit code 0 without a verdict",
    # More on both streams than any pipe holds.
    "sys.stderr.write('x' * 5_000_000); sys.stdout.write('y' * 5_000_000 + '\\n'); end('right')": "right",
    # One that leaves another process behind, which keeps the streams open.
    "subprocess.Popen(['sleep', '20']); end('right')": "right",
}


def test_a_stream_is_closed_when_it_ends_however_late() -> None:
    """What a child left behind holds it open, for longer than anyone waits."""
    reading, writing = os.pipe()
    lines = running._Lines(os.fdopen(reading, "rb"))
    lines.close()
    assert not lines._stream.closed
    os.close(writing)
    lines._thread.join(10)
    assert lines._stream.closed


def child(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", PROLOGUE + code]


@pytest.mark.parametrize("code", CHILDREN)
def test_what_a_child_comes_to(code: str) -> None:
    verdict = run_child(child(code), 20)
    assert str(verdict) == CHILDREN[code]
    assert verdict.right == (CHILDREN[code] == "right")
    assert abs(time.time() - verdict.time) < 20


def test_a_child_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    """One that takes no notice of SIGTERM, and has started another."""
    started = tmp_path / "started"
    code = f"open({str(started)!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))\n{HANG}"
    begin = time.monotonic()
    assert str(run_child(child(code), 4)) == f"hung: no end after 4 s, {WAITING}"
    assert time.monotonic() - begin < 10
    state = Path(f"/proc/{started.read_text()}/stat")

    def ended() -> bool:
        """Gone, or dead and waiting for whoever collects what has no parent."""
        try:
            return state.read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # A signal takes a moment to arrive.
    while not ended() and time.monotonic() - begin < 20:
        time.sleep(0.01)
    assert ended()


def test_a_child_that_is_slow_is_not_taken_for_one_that_hangs() -> None:
    assert str(run_child(child("time.sleep(1000)"), 0.5)) == "undecided: still starting after 0.5 s"
    launching = "tell(stage='launching forward at 300 positions')\ntime.sleep(1000)"
    assert str(run_child(child(launching), 0.5)) == (
        "undecided: still launching forward at 300 positions after 0.5 s"
    )


def test_no_process_can_be_started() -> None:
    assert str(run_child(["/no/python"], 1)).startswith("undecided: no process could be started: [Errno 2]")
    # As of a Python that runs inside of another program.
    assert run_child(["", "-c", ""], 1).outcome == "undecided"


class Children:
    """Commands for `verdict_on`, counted."""

    def __init__(self, code: str, folder: Path) -> None:
        self._code, self._started = code, folder / "started"

    def __call__(self, subject: Subject, device: str, seconds: float) -> list[str]:
        return child(f"open({str(self._started)!r}, 'a').write('x')\n{self._code}")

    @property
    def count(self) -> int:
        return len(self._started.read_text()) if self._started.exists() else 0


@pytest.fixture
def children(tmp_path: Path) -> Callable[[str], Children]:
    return lambda code: Children(code, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just started."""
    monkeypatch.setattr(probe, "_kept", {})
    monkeypatch.setattr(dispatch, "_decided", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    for name in (dispatch.ENVIRONMENT_VARIABLE, dispatch.PROBE_VARIABLE, dispatch.CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_one_probe_a_machine(
    children: Callable[[str], Children], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = children("end('wrong', 'dq by 0.3')")
    assert (
        verdict_on(SUBJECT, "cuda:0", folder, probes=False, command=command) is None and not folder.exists()
    )
    first = verdict_on(SUBJECT, "cuda:0", folder, command=command)
    assert str(first) == "wrong: dq by 0.3"
    (told,) = capsys.readouterr().err.splitlines()
    assert told == (
        "transfusion_kernels: trying the attention kernels (triton, head_dim 64, bfloat16) on NVIDIA H200 in a process"
        " of their own, once a machine, for at most 40 s"
    )
    for probes in (False, True):
        assert verdict_on(SUBJECT, "cuda:1", folder, probes=probes, command=command) == first
    assert command.count == 1 and capsys.readouterr().err == ""
    assert verdict_on(SUBJECT, "cuda:0", folder, again=True, command=children("end('right')")).right  # type: ignore[union-attr]
    assert verdict_on(SUBJECT, "cuda:0", folder, probes=False).right  # type: ignore[union-attr]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Subject)])
def test_a_record_counts_for_its_own_subject_alone(
    field: str, children: Callable[[str], Children], folder: Path
) -> None:
    """Such as for another hash of the kernels."""
    verdict_on(SUBJECT, "cuda:0", folder, command=children("end('right')"))
    other = dataclasses.replace(SUBJECT, **{field: 128 if field == "head_dim" else "other"})
    assert verdict_on(other, "cuda:0", folder, probes=False) is None
    # Even under its name.
    shutil.copy(folder / SUBJECT.file_name, folder / other.file_name)
    assert verdict_on(other, "cuda:0", folder, probes=False) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\0" * len(text),
        lambda text: text.replace('"right"', '"perfect"'),
        lambda text: text.replace('"detail": ""', '"detail": null'),
        lambda text: text.replace('"time": ', '"time": "today", "was": '),
        lambda text: text.replace('"verdict"', '"judgement"'),
    ],
)
def test_a_spoilt_record_is_none(
    spoil: Callable[[str], str], children: Callable[[str], Children], folder: Path
) -> None:
    command = children("end('right')")
    verdict_on(SUBJECT, "cuda:0", folder, command=command)
    path = folder / SUBJECT.file_name
    path.write_text(spoil(path.read_text()))
    assert verdict_on(SUBJECT, "cuda:0", folder, command=command).right and command.count == 2  # type: ignore[union-attr]
    assert verdict_on(SUBJECT, "cuda:0", folder, probes=False).right  # type: ignore[union-attr]


def test_no_verdict_is_sought_again_after_a_while(folder: Path) -> None:
    for age, counts in ((0, True), (records.UNDECIDED_SECONDS + 1, False)):
        records.write(folder, SUBJECT, Verdict("undecided", "no memory", time.time() - age, 1.0))
        assert (records.read(folder, SUBJECT) is not None) == counts
    records.write(folder, SUBJECT, Verdict("hung", "", time.time() - 10 * records.UNDECIDED_SECONDS, 1.0))
    assert records.read(folder, SUBJECT) is not None


def cannot_be_written(folder: Path) -> None:
    folder.parent.write_text("a file")


def is_read_only(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder.mkdir(parents=True)
    folder.chmod(0o500)


@pytest.mark.parametrize("spoil", [cannot_be_written, is_read_only, None])
def test_without_a_folder_a_verdict_lasts_as_long_as_the_process(
    spoil: Callable[[Path], None] | None,
    children: Callable[[str], Children],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if spoil:
        spoil(folder)
    place = folder if spoil else None
    command = children("end('right')")
    for _ in range(2):
        assert verdict_on(SUBJECT, "cuda:0", place, command=command).right  # type: ignore[union-attr]
    assert command.count == 1
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and (f"since {folder} cannot be written" if spoil else "no home folder") in lines[1]
    )


def ask(command: Children, folder: Path) -> None:
    assert verdict_on(SUBJECT, "cuda:0", folder, command=command).right  # type: ignore[union-attr]


def test_of_several_processes_one_probes(children: Callable[[str], Children], folder: Path) -> None:
    command = children("time.sleep(0.5); end('right')")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask, args=(command, folder)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4 and command.count == 1


def test_a_lock_that_is_never_let_go_is_waited_for_in_vain(
    children: Callable[[str], Children], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_PATIENCE_SECONDS", -19.5)
    folder.mkdir(parents=True)
    with (folder / f"{SUBJECT.file_name}.lock").open("a") as held:
        records.fcntl.flock(held, records.fcntl.LOCK_EX)
        begin = time.monotonic()
        verdict = verdict_on(SUBJECT, "cuda:0", folder, seconds=20, command=children("end('right')"))
        assert verdict is not None and verdict.right and time.monotonic() - begin < 5


def test_a_file_system_without_locks(
    children: Callable[[str], Children], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(records.fcntl, "flock", flock)
    command = children("end('right')")
    for _ in range(2):
        assert verdict_on(SUBJECT, "cuda:0", folder, command=command).right  # type: ignore[union-attr]
    assert command.count == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRANSFUSION_CACHE": "/a/b"}, "/a/b"),
        ({"TRANSFUSION_CACHE": "~/b", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/h/b"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/transfusion/kernels"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/transfusion/kernels"),
    ],
)
def test_where_records_are(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dispatch.cache_folder() == Path(expected)


class Gpu:
    """A made-up GPU: what `auto` chooses on it, given what the children of its probes do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.codes: dict[str, str] = {}
        self.probed: list[str] = []
        self.capability = (9, 0)
        self.captures = False

    def run(self, command: list[str], seconds: float, variables: dict[str, str]) -> Verdict:
        implementation = command[-4]
        self.probed.append(implementation)
        assert variables[dispatch.PROBE_VARIABLE] == "0" and command[-1] == "cuda:0"
        return run_child(
            child(self.codes[implementation]), min(seconds, 1 if "sleep" in str(self.codes) else 20)
        )

    def restart(self) -> None:
        """As another process would find it."""
        dispatch._decided.clear()
        dispatch._warned.clear()
        self.probed.clear()

    def choose(
        self, width: int = 64, dtype: torch.dtype = torch.bfloat16, backend: str = "auto", cache: bool = False
    ) -> dispatch.Choice:
        with FakeTensorMode():
            q = torch.empty(1, 2, 8, width, dtype=dtype, device="cuda")
            return (dispatch.choose_for_cache if cache else dispatch.choose)(backend, q)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Gpu]:
    made_up = Gpu(monkeypatch)
    monkeypatch.setenv(dispatch.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_has_gpu", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: made_up.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made_up.captures)
    monkeypatch.setattr(records, "_device", lambda device: ("NVIDIA H200", "9.0"))
    monkeypatch.setattr(probe, "run_child", made_up.run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield made_up


def test_what_is_right_runs(gpu: Gpu) -> None:
    gpu.codes = {"hopper": "end('right')"}
    today = time.strftime("%Y-%m-%d")
    pytest.importorskip("triton")
    for _ in range(2):
        text = str(gpu.choose())
        assert text.startswith(
            f"hopper: tensors on cuda, head_dim 64, torch.bfloat16; proved right here on {today};"
        )
    assert gpu.probed == ["hopper"]
    gpu.restart()
    assert str(gpu.choose()) == text and gpu.probed == []


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (HANG, rf"the probe hung \(no end after 1 s, {WAITING}\)"),
        (WAIT + "os.abort()", rf"the probe died \(signal 6, SIGABRT, {WAITING}\)"),
        ("end('wrong', 'dq by 0.3')", r"the probe found them wrong \(dq by 0.3\)"),
        ("end('failed', 'ImportError: gluon')", r"the probe failed \(ImportError: gluon\)"),
        ("end('undecided', 'OutOfMemoryError')", r"the probe came to no verdict \(OutOfMemoryError\)"),
    ],
)
def test_the_next_plainer_runs_where_kernels_are_not_right(
    gpu: Gpu, code: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.codes = {"hopper": code, "triton": "end('right')"}
    again = "--again --implementation hopper --head-dim 64 --dtype bfloat16"
    refusal = rf"not hopper: {sentence}; probe by `python -m transfusion_kernels.probe {again}`"
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=f"^attention runs on Triton's portable kernels: {refusal}$") as told:
        choice = gpu.choose()
    assert time.monotonic() - begin < 10
    assert choice.implementation == "triton" and gpu.probed == ["hopper", "triton"]
    assert choice.reason.startswith("tensors on cuda, head_dim 64, torch.bfloat16; proved right here on 20")
    assert choice.reason.endswith(refusal.replace("\\", ""))
    assert len(told) == 1 and len(capsys.readouterr().err.splitlines()) == 2
    # Once a process, and for another width too.
    assert gpu.choose() == choice and gpu.choose(width=128).implementation == "triton"
    gpu.restart()
    with pytest.warns(UserWarning, match="Triton's portable kernels"):
        assert gpu.choose() == choice
    assert gpu.probed == []


def test_where_nothing_is_right_the_reference_runs_and_says_so(gpu: Gpu) -> None:
    gpu.codes = {"hopper": HANG, "triton": "end('wrong', 'out by 1')"}
    with pytest.warns(UserWarning, match="attention runs on the dense reference: not hopper: the probe hung"):
        choice = gpu.choose()
    assert choice.implementation == "reference"
    assert "this one builds all scores, which takes much memory" in choice.reason
    assert "not triton: the probe found them wrong (out by 1)" in choice.reason
    assert choice.reason.count("`") == 2 and "--implementation hopper triton --head-dim 64" in choice.reason


def test_what_no_hopper_kernel_takes_is_probed_in_triton_alone(gpu: Gpu) -> None:
    gpu.codes = {"triton": "end('right')"}
    for arguments, reason in (
        ({"width": 96}, "head_dim is 96"),
        ({"dtype": torch.float32}, "the dtype is torch.float32"),
    ):
        choice = gpu.choose(**arguments)  # type: ignore[arg-type]
        assert choice.implementation == "triton" and f"not hopper: {reason}" in choice.reason
    for gpu.capability in ((8, 0), (10, 0)):
        gpu.restart()
        assert "not hopper: the compute capability is" in gpu.choose().reason
    assert set(gpu.probed) <= {"triton"}


def test_records_alone_count_where_probing_is_off(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.PROBE_VARIABLE, "0")
    gpu.codes = {"hopper": "end('right')"}
    with pytest.warns(
        UserWarning, match="dense reference: not hopper: no probe has been made here; not triton: no"
    ):
        choice = gpu.choose()
    assert choice.implementation == "reference" and gpu.probed == []
    assert choice.reason.endswith(
        "`python -m transfusion_kernels.probe --implementation hopper triton --head-dim 64 --dtype bfloat16`"
    )
    monkeypatch.setenv(dispatch.PROBE_VARIABLE, "1")
    pytest.importorskip("triton")
    assert gpu.choose().implementation == "hopper"
    gpu.restart()
    monkeypatch.setenv(dispatch.PROBE_VARIABLE, "0")
    assert gpu.choose().implementation == "hopper" and gpu.probed == []
    monkeypatch.setenv(dispatch.PROBE_VARIABLE, "no")
    with pytest.raises(ValueError, match="TRANSFUSION_PROBE: got 'no', takes 0 or 1"):
        gpu.choose()


def test_nothing_is_probed_while_a_graph_is_captured(gpu: Gpu) -> None:
    gpu.codes = {"hopper": "end('right')"}
    gpu.captures = True
    with pytest.warns(UserWarning, match="dense reference"):
        assert gpu.choose().implementation == "reference"
    assert gpu.probed == []
    gpu.captures = False
    pytest.importorskip("triton")
    assert gpu.choose().implementation == "hopper"
    gpu.restart()
    gpu.captures = True
    assert gpu.choose().implementation == "hopper" and gpu.probed == []


def test_what_is_asked_for_by_name_is_not_probed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("hopper", "triton", "reference"):
        assert gpu.choose(backend=backend).implementation == backend
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, backend)
        assert gpu.choose().implementation == backend
        monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE)
    assert gpu.choose(backend="triton", cache=True).implementation == "triton" and gpu.probed == []


def test_tensors_on_the_cpu_need_no_probe(gpu: Gpu) -> None:
    start = torch.zeros(1, 8, dtype=torch.int32)
    q = torch.randn(1, 2, 8, 64)
    mask = IntervalMask.from_spans(start, start)
    interval_attention(q, q, q, mask)
    assert str(explain(q, q, q, mask)) == "cpu: tensors on the CPU" and gpu.probed == []


@pytest.mark.parametrize("right", [True, False])
def test_attention_to_a_cache_has_a_probe_of_its_own(gpu: Gpu, right: bool) -> None:
    pytest.importorskip("triton")
    gpu.codes = {
        "hopper": "end('right')",
        "decode": "end('right')" if right else "end('wrong', 'lse by inf')",
    }
    if right:
        choice = gpu.choose(cache=True)
        assert choice.implementation == "triton" and "the Hopper kernels take no cache" in choice.reason
    else:
        with pytest.warns(UserWarning, match="dense reference: not decode: the probe found them wrong"):
            assert gpu.choose(cache=True).implementation == "reference"
    assert gpu.probed == ["hopper", "decode"]


def test_a_compiler_that_traces_gets_the_choice(gpu: Gpu) -> None:
    gpu.codes = {"hopper": WAIT + "os.abort()", "triton": "end('right')"}

    def choose(x: torch.Tensor) -> tuple[torch.Tensor, str]:
        implementation, _ = dispatch._proved(torch.device("cuda:0"), x.dtype, 64, ("hopper", "triton"))
        return x + 1, implementation

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, implementation = torch.compile(choose, fullgraph=True, backend="aot_eager")(
            torch.zeros(2).bfloat16()
        )
    assert implementation == "triton" and gpu.probed == ["hopper", "triton"]


def test_a_choice_for_another_machine_probes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_has_gpu", lambda: False)
    with FakeTensorMode():
        choice = dispatch.choose("auto", torch.empty(1, 2, 8, 32, device="cuda"))
    assert choice.implementation == "triton" and "not tried, for there is no GPU here" in choice.reason


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(dispatch.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(dispatch, "interprets", lambda: True)
    wrong: set[str] = set()

    def run(command: list[str], seconds: float, variables: dict[str, str]) -> Verdict:
        assert seconds == 7
        head_dim = command[-3]
        return Verdict("wrong" if head_dim in wrong else "right", "", time.time(), 1.5)

    monkeypatch.setattr(probe, "run_child", run)
    options = ["--device", "cpu", "--seconds", "7", "--dtype", "float32", "--jobs", "3"]
    assert command_line.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(dispatch.TRITON_HEAD_DIMS)
    assert f"decode, head_dim 96, float32: right (1.5 s, {time.strftime('%Y-%m-%d')})" in lines
    wrong.add("96")
    assert command_line.main(options) == 0
    some = [*options, "--implementation", "triton", "--head-dim", "64", "96", "--again"]
    assert command_line.main(some) == command_line.NOT_RIGHT == 3
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "triton, head_dim 64, float32: right",
        "triton, head_dim 96, float32: wrong",
    ]
    assert command_line.main([*options, "--head-dim", "17"]) == command_line.NO_DEVICE == 2
    monkeypatch.setattr(dispatch, "interprets", lambda: False)
    assert command_line.main(options) == 2
    if not torch.cuda.is_available():
        assert command_line.main([]) == 2
        assert "PyTorch finds no GPU here" in capsys.readouterr().err


def test_all_that_is_shipped_can_be_probed(gpu: Gpu) -> None:
    device = torch.device("cuda:0")
    assert len(list(dispatch.shipped(device))) == 4 + 2 * 15
    gpu.capability = (8, 0)
    assert len(list(dispatch.shipped(device))) == 2 * 15
    assert all(verdict is None for _, verdict in dispatch.on_record(device)) and gpu.probed == []


def interpreted(package: Path, cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The true probe of Triton's kernels, in the interpreter."""
    variables = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFUSION_CACHE": str(cache),
        "PYTHONPATH": str(package.parent),
    }
    command = [sys.executable, "-m", "transfusion_kernels.probe", "--device", "cpu", "--head-dim", "32"]
    command += ["--dtype", "float32", *options]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_the_true_probe_finds_the_kernels_right(folder: Path) -> None:
    pytest.importorskip("triton")
    ended = interpreted(KERNELS, folder, "--seconds", "100")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line.split(" (")[0] for line in ended.stdout.splitlines()] == [
        "triton, head_dim 32, float32: right",
        "decode, head_dim 32, float32: right",
    ]
    (path,) = folder.glob("triton-32-float32-*.json")
    assert json.loads(path.read_text())["verdict"]["outcome"] == "right"


CHANGES = {
    "wrong: out by": ("scale * LOG2_E,\n            GROUP", "scale * LOG2_E * 1.1,\n            GROUP"),
    "hung: no end after 12 s, waiting for forward at 77 positions": (
        "    padded_width = triton.next_power_of_2(width)\n",
        "    padded_width = triton.next_power_of_2(width)\n    import time\n    time.sleep(1000)\n",
    ),
    "died: signal 11, SIGSEGV, waiting for forward at 77 positions": (
        "    padded_width = triton.next_power_of_2(width)\n",
        "    padded_width = triton.next_power_of_2(width)\n    import ctypes\n    ctypes.string_at(0)\n",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("expected", CHANGES)
def test_the_true_probe_finds_kernels_that_were_broken(expected: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    package = tmp_path / "site" / "transfusion_kernels"
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
    old, new = CHANGES[expected]
    source = package / "attention" / "forward.py"
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    begin = time.monotonic()
    ended = interpreted(package, folder, "--implementation", "triton", "--seconds", "12")
    assert ended.returncode == 3 and time.monotonic() - begin < 45
    assert ended.stdout.startswith(f"triton, head_dim 32, float32: {expected}"), ended.stdout + ended.stderr
