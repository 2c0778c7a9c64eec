"""The parts of both calls, on a GPU and in a rehearsal.

The first call finds out which kernels are right, how fast attention and two steps are, and runs the tests. The second
sweeps variants of the kernels, or looks into those that were wrong, and trains.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check import fakes
from gpu_check.record import Record, read_json
from gpu_check.runner import Part, Runner, Skip
from gpu_check.verdicts import Verdicts

SECONDS = {1: 400.0, 2: 310.0}
# A machine on which this is rehearsed may be busy with other tests.
REHEARSAL_SLACK = 6.0
# What is probed before all else, and before the tests.
HEADLINE_KERNELS = [
    (name, width, "bfloat16") for name in ("hopper", "triton", "decode") for width in (128, 64)
]
FLOAT32_KERNELS = [("triton", width, "float32") for width in (32, 64, 96, 128, 256)]
PROBE_SECONDS = 40
# Of a step of configs/train/emoji-gpu.yaml, where it could not be measured.
GUESSED_STEP_MS = 160.0
# What a training takes besides its steps: to start, to draw, to measure and to save. And the share of the rest to plan.
AROUND_TRAINING_SECONDS, PLANNED_SHARE = 45.0, 0.9
# What an export, a report and an evaluation after it need.
AFTER_TRAINING_SECONDS = 32.0
MAX_TRAINING_STEPS = 4000
# Of the second call, at most.
SWEEP_SECONDS, TRAINING_SECONDS = 44, 200.0
# The rehearsal's sizes.
TINY_STEP = (
    "model.layers=1", "model.hidden_size=32", "model.heads=2", "model.ffn_size=64", "model.vocabulary=512",
    "codec.image_size=8", "data.sequence_length=128", "data.global_batch_size=2", "data.micro_batch_size=2",
    "train.precision=fp32", "train.compile=false", "train.threads=1",
)  # fmt: skip
TINY_TRAINING = (
    "model.layers=1", "model.hidden_size=32", "model.heads=2", "model.ffn_size=64", "codec.image_size=16",
    "data.sequence_length=128", "data.global_batch_size=4", "data.micro_batch_size=4", "data.workers=0",
    "data.validation_limit=4", "train.precision=fp32", "train.compile=false", "train.threads=1", "log.every=1",
    "sample_grid.per_prompt=1", "sample_grid.steps=2",
)  # fmt: skip
TINY_ATTENTION = (
    "--device", "cpu", "--lengths", "64", "--head-dims", "16", "--tokens", "64", "--width", "32",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Where a call finds things and what it is.

    Attributes:
        python: What runs the parts.
        root: The checkout.
        work: Its working folder, which a second call on the same machine finds again.
        carried: What `launch/gpu_wheels.sh` has made: `wheels/` and `emoji/`.
        cpu: Whether this is a rehearsal.
        fakes: Parts that are stood in for, and by what (`fakes.KINDS`).
    """

    python: str
    root: Path
    work: Path
    carried: Path
    cpu: bool
    fakes: dict[str, str]

    @property
    def site(self) -> Path:
        """Where carried wheels are installed."""
        return self.work / "site"

    @property
    def kernels(self) -> Path:
        """The records of probes."""
        return self.work / "kernels"

    @property
    def run(self) -> Path:
        """The folder of the training."""
        return self.work / "run"

    @property
    def model(self) -> Path:
        """What the training is exported to."""
        return self.work / "export"

    def variables(self, environment: dict[str, str]) -> dict[str, str]:
        """The environment of all parts, made from that of this process."""
        paths = [self.site, *(self.root / name for name in ("kernels", "src", "benchmarks"))]
        found = {
            **environment,
            "PYTHONPATH": ":".join(map(str, paths)),
            "PYTHONUNBUFFERED": "1",
            "DS_BUILD_OPS": "0",
            "WANDB_MODE": "offline",
            "HF_HUB_OFFLINE": "1",
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
            "TRANSFUSION_CACHE": str(self.kernels),
            # Only what the probes have found counts. No other part may hang on a kernel to find out.
            "TRANSFUSION_PROBE": "0",
        }
        found.pop("TRANSFUSION_ATTENTION", None)
        if self.cpu:
            found |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(self.work / "triton")}
            found["OMP_NUM_THREADS"] = "1"
        return found


class Call:
    """Makes the parts of a call. What one part finds decides what the later ones do."""

    def __init__(self, setup: Setup, record: Record, runner: Runner, former: dict[str, Any]) -> None:
        self.setup, self.record, self.runner, self.former = setup, record, runner, former

    def parts(self, number: int) -> list[Part]:
        """Those of call 1 or 2, with the stand-ins of a rehearsal in place."""
        return [self._faked(part) for part in (self.first() if number == 1 else self.second())]

    def first(self) -> list[Part]:
        """What decides first, and the broad tests last."""
        return [
            *self._begin("first", patience=25.0),
            self._module("compile-tests", "compile_ahead", "tests" if not self.setup.cpu else "rehearsal",
                         seconds=240, beside=True, after="compile", patience=60.0),
            self._attention("attention-128", 128, ["ours-hopper", "ours-triton", "ours-triton-split"], 60, silence=20),
            self._attention("rivals-128", 128, ["sdpa-cudnn-causal", "sdpa-flash-causal"], 25),
            self._attention("attention-64", 64, ["ours-hopper", "ours-triton", "ours-triton-split"], 60, silence=20),
            self._attention("rivals-64", 64, ["sdpa-cudnn-causal", "sdpa-flash-causal"], 25),
            self._attention("flex-128", 128, ["flex-tuned"], 60),
            self._attention("cudnn-flex-128", 128, ["cudnn-flex"], 45),
            self._step("step-0.76b", "configs/benchmark/0.76b.yaml", 85, leave=60),
            self._step("step-1.4b", "configs/benchmark/1.4b.yaml", 95, leave=45),
            self._probes("probes-float32", FLOAT32_KERNELS, 45, leave=30),
            self._tests("tests", "others", 130, leave=18),
            self._tests("tests-32", "32", 40),
            self._step("step-zero", "", 50, "train.engine=zero"),
        ]  # fmt: skip

    def second(self) -> list[Part]:
        """What the first call has found decides between a sweep and a diagnosis. Then the training."""
        known = bool(self.former.get("kernels"))
        return [
            *self._begin("sweep" if known else "first", patience=0.0 if known else 25.0),
            self._module("diagnosis", "diagnose", *self._device(), seconds=60, leave=175, command=self._diagnosis,
                         variables=self._interpreted()),
            self._module("sweep", "sweep", *self._device(), seconds=SWEEP_SECONDS + 4, leave=165, command=self._sweep),
            self._tick(),
            self._emoji_step(),
            self._training(),
            Part("export", 25, self._transfusion("export", self.setup.run, "--out", self.setup.model)),
            self._evaluation("evaluation", "validation", self.setup.run, 30, leave=8),
            Part("report", 20, self._transfusion("report", self.setup.run),
                 kept={str(self.setup.run / "report.html"): "report.html"}),
            self._evaluation("captions", "captions", self.setup.work / "captions", 60, least=10.0),
        ]  # fmt: skip

    def verdicts(self) -> Verdicts:
        """What the probes have found by now."""
        return Verdicts(self.setup.kernels)

    # The parts

    def _begin(self, compiled: str, patience: float) -> list[Part]:
        compiled = "rehearsal" if self.setup.cpu else compiled
        return [
            Part("wheels", 45, self._wheels),
            self._module("compile", "compile_ahead", compiled, seconds=120, beside=True),
            self._module("nccl", "nccl", seconds=60, beside=True),
            self._module("environment", "environment", seconds=60, beside=True),
            self._probes("probes", HEADLINE_KERNELS, PROBE_SECONDS + 10, after="compile", patience=patience),
        ]

    def _wheels(self) -> Sequence[str | Path]:
        wheels = sorted((self.setup.carried / "wheels").glob("*.whl"))
        if not wheels:
            raise Skip(f"no wheels in {self.setup.carried / 'wheels'}")
        pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
        options = ["--no-compile", "--no-cache-dir", "--upgrade", "--target"]
        return [self.setup.python, *pip, *options, self.setup.site, *wheels]

    def _module(
        self,
        name: str,
        module: str,
        *arguments: str | Path,
        seconds: float,
        command: Callable[[], Sequence[str | Path]] | None = None,
        **fields: Any,
    ) -> Part:
        """A module of this package that writes JSON. command: adds arguments when its turn comes."""
        out = self.setup.work / f"{name}.json"
        head = [self.setup.python, "-m", f"gpu_check.{module}", *arguments, "--out", out]
        return Part(name, seconds, lambda: [*head, *(command() if command else ())], result=out, **fields)

    def _device(self) -> list[str]:
        return ["--device", "cpu"] if self.setup.cpu else []

    def _interpreted(self) -> dict[str, str]:
        return {"TRITON_INTERPRET": "1"} if self.setup.cpu else {}

    def _probes(
        self, name: str, kernels: Sequence[tuple[str, int, str]], seconds: float, **fields: Any
    ) -> Part:
        if self.setup.cpu:
            kernels = [("triton", 32, "float32")]
        chosen = [list(dict.fromkeys(each)) for each in zip(*kernels, strict=True)]
        command = [
            self.setup.python,
            "-m",
            "transfusion_kernels.probe",
            "--seconds",
            PROBE_SECONDS,
            "--jobs",
            6,
        ]
        command += ["--implementation", *chosen[0], "--head-dim", *chosen[1], "--dtype", *chosen[2]]
        command += self._device()

        def note() -> None:
            verdicts = self.verdicts()
            self.record.data["kernels"] = verdicts.records
            for line in verdicts.lines:
                print(f"          {line}", flush=True)

        return Part(
            name, seconds, lambda: list(map(str, command)), variables=self._interpreted(), then=note, **fields
        )

    def _attention(
        self, name: str, head_dim: int, providers: list[str], seconds: float, silence: float = 0.0
    ) -> Part:
        """Lines of the attention table. silence: if not 0, each provider in a process that is ended after so long."""
        out = self.setup.work / f"{name}.json"

        def command() -> Sequence[str | Path]:
            sizes = ["--lengths", "8192", "--head-dims", str(head_dim), "--families", "causal", "transfusion"]
            chosen = providers
            if self.setup.cpu:
                sizes = [*TINY_ATTENTION, "--families", "causal", "transfusion"]
                chosen = ["ours-cpu"] if silence else ["sdpa-flash-causal"]
            elif ("hopper", head_dim) in self.verdicts().deadly():
                chosen = [each for each in providers if each != "ours-hopper"]
            budget = str(seconds - 8 if not self.setup.cpu else 5)
            isolate = (
                ["--isolate", str(silence * (self.runner.slack if self.setup.cpu else 1))] if silence else []
            )
            return [
                self.setup.python, "benchmarks/attention.py", *sizes, "--providers", *chosen, "--seconds", budget,
                *isolate, "--no-image", "--limits", self.setup.work / "attention-128.json", "--out", out,
            ]  # fmt: skip

        return Part(name, seconds, command, result=out)

    def _step(self, name: str, config: str, seconds: float, *overrides: str, leave: float = 0.0) -> Part:
        out = self.setup.work / f"{name}.json"

        def command() -> Sequence[str | Path]:
            tiny = [*TINY_STEP] if self.setup.cpu else []
            if "train.engine=zero" in overrides and self.setup.cpu:
                raise Skip("the tests train with ZeRO on the CPU")
            timing = (
                ["--steps", "15", "--seconds", "15"]
                if not self.setup.cpu
                else ["--steps", "3", "--seconds", "3"]
            )
            head = [self.setup.python, "benchmarks/step.py", *([config] if config else [])]
            return [*head, *tiny, *overrides, *timing, "--out", out]

        return Part(name, seconds, command, result=out, leave=leave)

    def _tick(self) -> Part:
        """A tick of generation, with CUDA graphs and without."""
        out = self.setup.work / "tick.json"
        few = ["--ticks", "3", "--rows", "2", "--images", "1"] if self.setup.cpu else []
        command = [self.setup.python, "benchmarks/tick.py", *few, "--out", out]
        return Part("tick", 30, lambda: command, result=out, leave=145)

    def _tests(self, name: str, width: str, seconds: float, leave: float = 0.0) -> Part:
        out = self.setup.work / f"{name}.jsonl"

        def command() -> Sequence[str | Path]:
            out.unlink(missing_ok=True)
            options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "gpu_check.pytest_plugin"]
            options += ["--gpu-check-out", str(out), "--gpu-check-width", width]
            for implementation, head_dim in self.verdicts().deadly():
                options.append(f"--gpu-check-without={implementation}-{head_dim}")
            tested = ["tests/kernels", "tests/unit/generate/test_captured.py"]
            if self.setup.cpu:
                tested = ["tests/kernels/test_hopper_gpu.py", "tests/kernels/test_public_bugs_gpu.py"]
            else:
                options += ["-n", "6" if width == "32" else "14", "--maxschedchunk", "4"]
                options += ["--timeout", "40", "--timeout-method", "thread"]
            return [self.setup.python, "-m", "pytest", *options, *tested]

        return Part(
            name, seconds, command, result=out, digest=digest_of_tests, kept={str(out): out.name}, leave=leave
        )

    def wrong(self) -> list[str]:
        """The kernels of the headline that were not found right, such as hopper-128."""
        dtypes = ("float32",) if self.setup.cpu else ("bfloat16",)
        return sorted(
            {f"{name}-{width}" for name, width, dtype in self.verdicts().not_right() if dtype in dtypes}
        )

    def _diagnosis(self) -> Sequence[str | Path]:
        if not (wrong := self.wrong()):
            raise Skip("no kernel was found wrong")
        return [*(["--dtype", "fp32", "--jobs", "2"] if self.setup.cpu else []), "--kernels", *wrong]

    def _sweep(self) -> Sequence[str | Path]:
        return ["--seconds", str(SWEEP_SECONDS), "--without", *self.wrong()]

    def _emoji_step(self) -> Part:
        overrides = ["model.vocabulary=32000"] if not self.setup.cpu else []
        return self._step("step-emoji", "configs/train/emoji-gpu.yaml", 45, *overrides, leave=120)

    def _training(self) -> Part:
        setup = self.setup
        emoji = setup.carried / "emoji"

        def command() -> Sequence[str | Path]:
            if not (emoji / "tokenizer.model").exists():
                raise Skip(f"no data in {emoji}")
            # That of an earlier call, which has copied out what it found.
            shutil.rmtree(setup.run, ignore_errors=True)
            limit = min(TRAINING_SECONDS, self.runner.left - AFTER_TRAINING_SECONDS)
            steps = training_steps(limit, read_json(setup.work / "step-emoji.json"))
            fitted = [f"train.steps={steps}", f"optimizer.warmup_steps={max(1, steps // 12)}"]
            if setup.cpu:
                fitted = [*TINY_TRAINING, "train.steps=4", "optimizer.warmup_steps=1"]
            else:
                fitted += [
                    f"train.time_limit_minutes={(limit - 12) / 60:.2f}",
                    f"checkpoint.every={-(-steps // 3)}",
                ]
            return [
                setup.python,
                "-m",
                "transfusion",
                "train",
                "configs/train/emoji-gpu.yaml",
                *self._data(),
                *fitted,
            ]

        return Part(
            "training", TRAINING_SECONDS, command, leave=AFTER_TRAINING_SECONDS, least=20.0 if setup.cpu else 50.0,
            kept={
                str(setup.run / "metrics.jsonl"): "metrics.jsonl",
                str(setup.run / "samples" / "step_*.png"): "grid.png",
                str(setup.run / "config.yaml"): "config.yaml",
            },
        )  # fmt: skip

    def _evaluation(self, name: str, suite: str, out: Path, seconds: float, **fields: Any) -> Part:
        command = self._transfusion("eval", self.setup.model, "--suite", suite, "--out", out)
        return Part(name, seconds, command, result=out / "metrics.json", **fields)

    def _data(self) -> list[str]:
        """Where configs/train/emoji-gpu.yaml finds its data here, and what it writes."""
        emoji = self.setup.carried / "emoji"
        sources = (
            f"[{{name: emoji, shards: {emoji}/images/train/*.tar, weight: 0.6}}, "
            f"{{name: text, shards: {emoji}/text/train/*.jsonl, weight: 0.4}}]"
        )
        validation = (
            f"[{{name: emoji, shards: {emoji}/images/val/*.tar}}, "
            f"{{name: validation-text, shards: {emoji}/text_validation.jsonl}}]"
        )
        return [
            f"run.dir={self.setup.run}", f"data.tokenizer={emoji}/tokenizer.model", f"data.sources={sources}",
            f"data.validation={validation}", f"data.index={self.setup.work}/index",
        ]  # fmt: skip

    def _transfusion(self, *words: str | Path) -> Callable[[], Sequence[str | Path]]:
        return lambda: [self.setup.python, "-m", "transfusion", *words]

    def _faked(self, part: Part) -> Part:
        """The part, or what stands in for it in a rehearsal."""
        kind = self.setup.fakes.get(part.name, self.setup.fakes.get("all", ""))
        if not kind:
            return part
        is_probe = part.name.startswith("probes") and kind != "grow"
        result = self.setup.work / f"{part.name}.json"
        command = [self.setup.python, "-m", "gpu_check.fakes", f"probe-{kind}" if is_probe else kind, result]
        fields = {name: getattr(part, name) for name in part.__dataclass_fields__}
        seconds = part.seconds if is_probe or kind == "grow" else fakes.LIMIT_SECONDS / self.runner.slack
        fields |= {"command": lambda: command, "seconds": seconds, "least": 0.0, "leave": 0.0}
        fields |= {} if is_probe else {"result": result, "digest": None}
        return Part(**fields)


def training_steps(seconds: float, measured: dict[str, Any] | None) -> int:
    """How many steps a training of so many seconds makes, from the measured time of one, with a tenth to spare."""
    step_ms = measured["step"]["step_ms"] if measured and "step" in measured else GUESSED_STEP_MS
    steps = PLANNED_SHARE * (seconds - AROUND_TRAINING_SECONDS) * 1000 / step_ms
    return int(min(max(steps, 10), MAX_TRAINING_STEPS))


def digest_of_tests(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How many tests ended how, and what failed why."""
    counts = {outcome: 0 for outcome in ("passed", "failed", "skipped")}
    for line in lines:
        counts[line["outcome"]] += 1
    failed = {line["test"]: line["reason"] for line in lines if line["outcome"] == "failed"}
    return {**counts, "reasons": failed}
