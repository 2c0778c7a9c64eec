"""What is here, what is missing, and the command that fixes it. Nothing that is missing may end the search."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from transfusion.errors import UserError
from transfusion.files import lock

OLDEST_PYTHON = (3, 11)
SUPPORTED_TORCH = ((2, 11), (2, 15))
# A DeepSpeed operator compiles in two minutes; a lock this old belongs to a build that was killed.
STALE_LOCK_SECONDS = 600
NEEDED_DISK_GIB = 2.0
CHECK_SECONDS = 120

# distribution -> module, for what every command needs.
CORE = {
    "numpy": "numpy",
    "pillow": "PIL",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "typer": "typer",
    "webdataset": "webdataset",
}
# distribution -> module, and what does not work without it.
OPTIONAL = {
    "scikit-learn": ("sklearn", "the digits: transfusion prepare digits, transfusion eval --suite digits"),
    "matplotlib": ("matplotlib", "transfusion report"),
    "jinja2": ("jinja2", "transfusion report"),
    "wandb": ("wandb", "log.wandb=true"),
    "diffusers": ("diffusers", "autoencoders: codec.kind=kl and vq"),
    "soundfile": ("soundfile", "files of sound"),
    "soxr": ("soxr", "files of sound"),
    "opencv-python-headless": ("cv2", "faster reading of small PNGs, with the same values"),
}
TRITON_CHECK = """
import torch
from transfusion_kernels import IntervalMask, interval_attention
device = "cuda" if torch.cuda.is_available() else "cpu"
q = torch.randn(1, 2, 32, 32, device=device)
start = torch.zeros(1, 32, dtype=torch.int32, device=device)
interval_attention(q, q, q, IntervalMask.from_spans(start, start), backend="triton").sum().item()
"""

State = Literal["good", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. "missing" with `required` means that training cannot run."""

    name: str
    state: State
    text: str
    remedy: str = ""
    required: bool = False


def run_doctor() -> list[Finding]:
    """Look at everything. A look that fails is itself a finding."""
    findings: list[Finding] = []
    for look in LOOKS:
        try:
            findings += look()
        except Exception as error:  # whatever is broken here is what the user wants to know
            findings.append(
                Finding(look.__name__.strip("_"), "note", f"could not be checked: {_short(error)}")
            )
    return findings


def main(more: Sequence[Finding] = ()) -> int:
    """Look, print, and say with the exit code whether training can run. more: what else was found."""
    findings = [*run_doctor(), *more]
    print_table(findings)
    code = exit_code(findings)
    print("\nTraining cannot run yet: see what is MISSING." if code else "\nTraining can run.")
    return code


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when training can run, 3 when something that it needs is missing."""
    return 3 if any(finding.required and finding.state == "missing" for finding in findings) else 0


def print_table(findings: Sequence[Finding]) -> None:
    """One line a finding, below it the command that fixes it."""
    marks = {"good": "ok     ", "note": "note   ", "missing": "MISSING"}
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        print(f"{marks[finding.state]}  {finding.name:<{width}}  {finding.text}")
        if finding.remedy:
            print(f"{'':7}  {'':<{width}}  -> {finding.remedy}")


def _python() -> Iterator[Finding]:
    good = sys.version_info[:2] >= OLDEST_PYTHON
    yield Finding(
        "Python",
        "good" if good else "missing",
        f"{platform.python_version()} on {platform.platform()}",
        "" if good else "install Python 3.11 or newer and make the virtual environment with it",
        required=True,
    )


def _torch() -> Iterator[Finding]:
    remedy = 'pip install "torch==2.13.0"'
    if not _is_installed("torch"):
        yield Finding("torch", "missing", "not installed", remedy, required=True)
        return
    try:
        import torch
    except Exception as error:  # a broken build raises whatever its loader raises
        yield Finding("torch", "missing", f"does not import: {_short(error)}", remedy, required=True)
        return
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"{torch.__version__}, built for {built_for}"
    if SUPPORTED_TORCH[0] <= version <= SUPPORTED_TORCH[1]:
        yield Finding("torch", "good", text)
    else:
        yield Finding("torch", "note", f"{text}; 2.11 to 2.15 are supported", remedy)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = gpu.total_memory / 2**30
            yield Finding(f"GPU {index}", "good", f"{gpu.name}, {memory:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "GPU",
            "note",
            "nvidia-smi is here, but torch sees no GPU",
            f"pip install --force-reinstall {remedy[12:]}",
        )
    else:
        yield Finding("GPU", "note", "none; training runs on the CPU")


def _core_packages() -> Iterator[Finding]:
    for distribution, module in CORE.items():
        yield _package(distribution, module)


def _deepspeed() -> Iterator[Finding]:
    remedy = 'DS_BUILD_OPS=0 pip install "deepspeed>=0.19.8,<0.20"'
    if _is_installed("deepspeed") and _is_installed("torch"):
        from transfusion.parallel.deepspeed_patches import fits

        version = _version("deepspeed")
        if fits(version):
            yield Finding("deepspeed", "good", version)
        else:
            yield Finding("deepspeed", "note", f"{version} is refused by train.engine=zero", remedy)
    elif not _is_installed("deepspeed"):
        yield Finding(
            "deepspeed",
            "missing",
            "not installed; without it only one process can train, with train.engine=local",
            remedy,
            required=_is_installed("torch") and _has_gpu(),  # where train.engine=auto means ZeRO
        )


def _triton() -> Iterator[Finding]:
    if not _is_installed("triton"):
        yield Finding("triton", "note", "not installed; only needed on a GPU", 'pip install "triton==3.7.1"')
        return
    version = _version("triton")
    if not _is_installed("torch"):
        yield Finding("triton", "note", f"{version}; cannot be tried without torch")
        return
    gpu = _has_gpu()
    verb = "compiles" if gpu else "interprets"
    # env(1) rather than a copy of this process's variables, which are read in parallel/environment alone.
    command = [*([] if gpu else ["env", "TRITON_INTERPRET=1"]), sys.executable, "-c", TRITON_CHECK]
    if problem := _problem_of(command):
        yield Finding("triton", "note", f"{version}, but it fails here: {problem}", _triton_remedy())
    else:
        yield Finding("triton", "good", f"{version}, {verb} the attention kernel")


def _triton_remedy() -> str:
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        return "apt-get install -y build-essential"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return f"apt-get install -y python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return 'pip install --force-reinstall "triton==3.7.1", or train with train.attention=reference'


def _optional_packages() -> Iterator[Finding]:
    for distribution, (module, purpose) in OPTIONAL.items():
        yield _package(distribution, module, purpose)


def _package(distribution: str, module: str, purpose: str = "") -> Finding:
    """purpose: what does not work without it; empty: training itself."""
    if _is_installed(module):
        return Finding(distribution, "good", _version(distribution))
    remedy = f"pip install {distribution}"
    if purpose:
        return Finding(distribution, "note", f"not installed; for {purpose}", remedy)
    return Finding(distribution, "missing", "not installed", remedy, required=True)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("CPU", "good", f"{cores} cores, {memory:.1f} GiB of memory")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < NEEDED_DISK_GIB:
        yield Finding(
            "disk", "note", f"{free:.1f} GiB free here", "free some space, or set run.dir to another disk"
        )
    else:
        yield Finding("disk", "good", f"{free:.0f} GiB free here")


def _file_locks() -> Iterator[Finding]:
    """Run folders, index files and caches are kept from other processes by locks, which some file systems lack."""
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        try:
            lock(file)
        except UserError:
            yield Finding(
                "file locks",
                "missing",
                "none on the file system of this folder",
                "set run.dir to a local disk, or mount with locks (Lustre: -o flock)",
                required=True,
            )
        else:
            yield Finding("file locks", "good", "held here")


def _deepspeed_locks() -> Iterator[Finding]:
    """A killed build of a DeepSpeed operator leaves a lock that every later start waits for, without a word."""
    from torch.utils.cpp_extension import get_default_build_root

    for left in sorted(Path(get_default_build_root()).glob("**/lock")):
        age = time.time() - left.stat().st_mtime
        if age > STALE_LOCK_SECONDS:
            text = (
                f"left by a build that was killed {age / 3600:.1f} hours ago; DeepSpeed may hang at its start"
            )
            yield Finding("DeepSpeed lock", "note", text, f"rm '{left}'")


def _torchvision() -> Iterator[Finding]:
    """A torchvision of another torch makes diffusers and transformers fail at import; none is better."""
    if not _is_installed("torchvision"):
        return
    if problem := _problem_of([sys.executable, "-c", "import torchvision"]):
        text = f"does not import ({problem}), which breaks diffusers and transformers; nothing here needs it"
        yield Finding("torchvision", "note", text, "pip uninstall -y torchvision")


def _choices() -> Iterator[Finding]:
    """What train.engine=auto and train.attention=auto come to on this machine."""
    import torch

    from transfusion_kernels import IntervalMask, explain

    gpu = _has_gpu()
    if not _is_installed("deepspeed"):
        engine = "local in one process, since deepspeed is not installed" + (
            "; set train.engine=local" if gpu else ""
        )
    elif gpu:
        engine = "zero: a GPU is here"
    else:
        engine = (
            "local with one process, zero with several (torchrun --nproc-per-node 2 -m transfusion train)"
        )
    yield Finding("engine", "good", engine)
    device = "cuda" if gpu else "cpu"
    q = torch.zeros(1, 2, 16, 64, device=device, dtype=torch.bfloat16)
    start = torch.zeros(1, 16, dtype=torch.int32, device=device)
    yield Finding("attention", "good", str(explain(q, q, q, IntervalMask.from_spans(start, start))))


def _kernels() -> Iterator[Finding]:
    """What is on record about the attention kernels here. Only `auto` and the command itself probe them."""
    if not (_is_installed("torch") and _is_installed("triton") and _has_gpu()):
        return
    import torch

    from transfusion_kernels import dispatch, probe

    right: dict[str, list[str]] = {}
    untried: dict[str, int] = {}
    for subject, verdict in dispatch.on_record(torch.device("cuda", torch.cuda.current_device())):
        name, inputs = f"{subject.implementation} kernels", f"head_dim {subject.head_dim} in {subject.dtype}"
        if verdict is None:
            untried[name] = untried.get(name, 0) + 1
        elif verdict.right:
            right.setdefault(name, []).append(inputs)
        else:
            yield Finding(name, "note", f"{inputs}: {verdict}", dispatch.probe_command(subject))
    for name, inputs_tried in right.items():
        yield Finding(name, "good", f"right here for {', '.join(inputs_tried)}")
    if untried:
        counts = ", ".join(f"{count} of the {name}" for name, count in untried.items())
        yield Finding("probes", "note", f"not made yet: {counts}; each is at its first use", probe.COMMAND)


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _torch,
    _core_packages,
    _deepspeed,
    _triton,
    _optional_packages,
    _machine,
    _file_locks,
    _deepspeed_locks,
    _torchvision,
    _choices,
    _kernels,
)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _problem_of(command: Sequence[str]) -> str:
    """Last line of what a command complains of, "" if it succeeds. A process of its own may crash alone."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {CHECK_SECONDS} s"
    if ended.returncode == 0:
        return ""
    lines = ended.stderr.strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {ended.returncode}"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
