"""The command line: starts at once, and answers every mistake with one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from transfusion.cli.main import main
from transfusion.config import Config
from transfusion.evaluate.metrics.classifier import Classifier
from transfusion.sequence.sizes import Size

ROOT = Path(__file__).parents[3]


def transfusion(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "transfusion", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
        timeout=120,
    )


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["transfusion", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return call


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from transfusion.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'triton', 'webdataset', 'sentencepiece'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in (
        "prepare",
        "tokenizer",
        "data",
        "train",
        "export",
        "sample",
        "caption",
        "eval",
        "report",
        "doctor",
    ):
        assert command in done.stdout


def test_help_starts_in_half_a_second_of_processor_time() -> None:
    before = os.times()
    assert transfusion("--help").returncode == 0
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    # Processor time, so that a busy machine does not fail the test; twice the bar leaves room for slow ones.
    assert seconds < 1.0, f"{seconds:.2f} s"


def test_version() -> None:
    assert transfusion("--version").stdout.startswith("transfusion 0.")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")],
)
def test_no_memory_is_one_line(
    error: Exception, here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transfusion.generate.pipeline.Pipeline.from_export", fail)
    code, _, told = here("sample", "model", "--prompt", "a", "--out", "x")
    assert code == 2 and told.startswith("transfusion: out of memory; ") and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.yaml"], ["missing.yaml", "configs/train"]),
        (["train", "configs/train/quickstart.yaml", "train.stepps=3"], ["did you mean train.steps?"]),
        (
            ["train", "configs/train/quickstart.yaml", "data.tokenizer=gone.model"],
            ["gone.model", "tokenizer train"],
        ),
        (["export", "no-such-run", "--out", "x"], ["no-such-run"]),
        (["sample", "no-such-model", "--prompt", "a", "--out", "x"], ["no-such-model"]),
        (["caption", "no-such-model", "a.png"], ["no-such-model"]),
        (["eval", "no-such-model"], ["no-such-model"]),
        (["report", "no-such-run"], ["no-such-run"]),
        (["prepare", "no-such-source", "--out", "x"], ["no-such-source"]),
        (["tokenizer", "train", "no-such-*.tar", "--out", "x"], ["no-such-*.tar"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], here: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, told = here(*arguments)
    assert code == 2, told
    lines = [line for line in told.splitlines() if not line.startswith("  - ")]
    assert len(lines) == 1, told
    for word in words:
        assert word in told
    assert not (ROOT / "x").exists()


def test_usage_errors_name_the_nearest_command() -> None:
    done = transfusion("trian", "x.yaml")
    assert done.returncode == 2
    assert "train" in done.stderr and "Traceback" not in done.stderr


def test_the_argument_of_deepspeeds_launcher_is_accepted(here: Callable[..., tuple[int, str, str]]) -> None:
    assert here("--local_rank=0", "config")[0] == 0


@pytest.mark.slow
def test_only_the_first_rank_speaks_of_a_mistake() -> None:
    ranks = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    first, second = (transfusion("train", "missing.yaml", RANK=rank, **ranks) for rank in "01")
    assert first.stderr.startswith("transfusion: cannot read config missing.yaml")
    # The launcher ends the others as soon as the first has failed; one that is left alone says who it is.
    assert second.returncode == 2 and second.stderr.startswith("transfusion: rank 1: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "model", "--prompt", "a", "--out", "x", "-n", "0"],
        ["sample", "model", "--prompt", "a", "--out", "x", "--sampler", "dpm"],
        ["caption", "model"],
        ["prepare", "digits", "--out", "x", "--seed", "-1"],
        ["tokenizer", "train", "a.tar", "--out", "x", "--vocabulary", "0"],
        ["train"],
        ["--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_too(arguments: list[str], here: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, told = here(*arguments)
    assert (code, printed) == (2, "")
    assert len(told.splitlines()) == 1 and "--help" in told


def test_a_patch_of_more_values_than_the_width_is_warned_of(
    here: Callable[..., tuple[int, str, str]],
) -> None:
    wide = ["configs/train/own-data.yaml", "model.hidden_size=128", "model.heads=4", "model.patch_size=8"]
    code, _, told = here("config", *wide)
    assert code == 0
    assert told.startswith("warning: a patch has 192 values (3 channels x model.patch_size 8 squared)")
    assert "model.hidden_size=192 or more" in told and len(told.splitlines()) == 1
    for enough in (
        "model.hidden_size=192",
        "model.patch_size=4",
        "model.patch_embed=unet",
        "diffusion.prediction=x",
    ):
        assert transfusion("config", *wide, enough).stderr == ""


def test_a_published_model_of_another_network_is_told_with_what_to_set(
    tmp_path: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    """Before anything is loaded: of the folder config.json alone is read."""
    described = {
        "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 8, "intermediate_size": 3072, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    words = ["configs/train/own-data.yaml", f"train.init_from={tmp_path}"]
    code, printed, told = here("config", *words)
    assert (code, printed) == (2, "") and len(told.splitlines()) == 1
    words += [word.rstrip(";") for word in told.split() if word.startswith("model.") and "=" in word]
    code, printed, told = here("config", *words)
    assert code == 0 and told == ""
    assert {"model.qk_norm=true", "model.head_dim=128", "model.layers=28"} <= set(words)


def test_without_a_command_the_help_is_shown() -> None:
    done = transfusion()
    assert "prepare" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_what_a_terminal_cannot_show_is_spelt() -> None:
    done = transfusion("config", "configs/train/quickstart.yaml", "run.name=é中", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r'"\xE9\u4E2D"' in done.stdout
    done = transfusion("train", "fehlt-é.yaml", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and r"cannot read config fehlt-\xe9.yaml" in done.stderr


@pytest.mark.parametrize("in_run", [True, False])
def test_eval_says_where_the_evidence_is_and_what_comes_next(
    here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_run: bool
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "transfusion.evaluate.suites.run.run_suites", lambda *some, **_: asked.extend(some) or {}
    )
    monkeypatch.setattr(
        "transfusion.checkpoint.export.read_export", lambda _: SimpleNamespace(config=Config())
    )
    (tmp_path / "evaluation").mkdir()
    if in_run:
        (tmp_path / "config.yaml").touch()
    code, printed, _ = here("eval", "model", "--out", str(tmp_path))
    assert code == 0 and asked == [Path("model"), [], tmp_path]
    commands = f"`transfusion report {tmp_path}`"
    if not in_run:
        run = Config().run.folder
        commands = f"`transfusion eval model --out {run}`, then `transfusion report {run}`"
    assert printed.splitlines()[-1] == f"{tmp_path}: metrics.json and evaluation/; for the report: {commands}"


def test_report_and_classifier_say_what_was_made_and_what_to_do_with_it(
    here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").touch()
    code, printed, _ = here("report", str(tmp_path))
    assert code == 0
    assert printed == f"{tmp_path}/report.html: the page of the run; open it in a browser\n"
    made = Classifier(["red", "blue"], 3, [Size(8, 8)])
    made.images = 40
    monkeypatch.setattr("transfusion.config.load_config", lambda *_: Config())
    monkeypatch.setattr("transfusion.evaluate.metrics.classifier.train_from_config", lambda *_, **__: made)
    code, printed, _ = here("classifier", "some.yaml", "--out", str(tmp_path / "c"))
    assert code == 0 and f"{tmp_path}/c: a classifier of 40 images and 2 words" in printed
    assert f"`transfusion eval MODEL --suite images --classifier {tmp_path}/c`" in printed


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "ulimit -n 65536"),
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "that can be written"),
    ],
)
def test_an_error_of_the_system_is_one_line_with_its_file_and_what_helps(
    here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("transfusion.config.load_config", fail)
    code, _, told = here("config", "configs/train/quickstart.yaml")
    assert code == 2 and len(told.splitlines()) == 1
    assert f"{os.strerror(number)} (some/file); " in told and remedy in told


def test_two_exports_never_share_a_folder(here: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, error = here("export", "runs/x", "--out", str(tmp_path), "--text-model", f"{tmp_path}/")
    assert code == 2 and "give each a folder of its own" in error
