"""Which implementation of the attention runs: the one place that chooses, and that can say why.

On a GPU a kernel is taken by itself only where a probe has found it right on such a device (`probe`). Until then, and
where it was found wrong or hung, the next plainer implementation runs.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transfusion_kernels import probe, rivals
from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.probe import Subject, Verdict

ENVIRONMENT_VARIABLE = "TRANSFUSION_ATTENTION"
# 0: `auto` probes nothing, and only what is on record counts.
PROBE_VARIABLE = "TRANSFUSION_PROBE"
# The folder of the records.
CACHE_VARIABLE = "TRANSFUSION_CACHE"
IMPLEMENTATIONS = ("hopper", "triton", "cpu", "reference", *rivals.NAMES)
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_DTYPES = (torch.float16, torch.bfloat16)
TRITON_HEAD_DIMS = (32, 64, 96, 128, 256)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What is probed: two implementations, and Triton's kernels of attention to a cache.
PROBED = ("hopper", "triton", "decode")

# What has been decided in this process, by device, dtype, head width and what was sought.
_decided: dict[tuple[object, ...], tuple[str, str]] = {}
# The warnings that this process has given.
_warned: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """Which implementation runs.

    Attributes:
        implementation: "hopper", "triton", "cpu", "reference", "flex" or "cudnn".
        reason: Why, in words.
    """

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"


def explain(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *, backend: str = "auto") -> Choice:
    """Tell which implementation `interval_attention` runs for these arguments, and why.

    `interval_attention_with_kvcache` chooses alike, except that it runs Triton where this says "hopper", and that its
    own kernels must be right.

    The first call for a device, a dtype and a head width probes the kernels where no record of that is in the user's
    cache. That is done in another process and takes seconds, at most 45 for each kernel that hangs. With
    `TRANSFUSION_PROBE=0` records alone count. `python -m transfusion_kernels.probe` makes them.

    Args:
        q: As `interval_attention` takes it.
        k: As `interval_attention` takes it.
        v: As `interval_attention` takes it.
        mask: As `interval_attention` takes it.
        backend: "hopper" (GPUs of compute capability 9), "triton", "cpu", or "reference", which runs anywhere. Also
            "flex" (torch's FlexAttention) and "cudnn" (NVIDIA's cudnn.flex_attention), which plan each mask. "auto"
            asks the environment variable `TRANSFUSION_ATTENTION`. Where that is unset, the device, the dtype, the
            head width and the probes decide.

    Returns:
        The implementation and the reason. `str` of it is one line.

    Raises:
        ValueError: Where `interval_attention` would raise it.
    """
    from transfusion_kernels.attention import check_arguments

    check_arguments(q, k, v, mask)
    return choose(backend, q)


def choose(backend: str, q: Tensor) -> Choice:
    """Choose an implementation.

    Args:
        backend: As in `explain`.
        q: Queries [B, H, S, D], of which the device, the dtype and the width count.

    Raises:
        ValueError: If the implementation asked for does not exist or cannot take `q`.
    """
    wanted, by = _wanted(backend)
    return _automatic(q) if wanted == "auto" else _asked_for(wanted, by, q)


def choose_for_cache(backend: str, q: Tensor) -> Choice:
    """Choose an implementation of attention to a cache, where Triton stands in for the Hopper kernels.

    Args:
        backend: As in `explain`.
        q: As in `choose`.

    Raises:
        ValueError: As `choose`, and if the Hopper kernels or a rival are asked for by the argument.
    """
    wanted, by = _wanted(backend)
    if wanted in ("hopper", *rivals.NAMES):
        if backend != "auto":
            raise ValueError(
                f"backend: got {wanted!r} by {by}, takes 'auto', 'triton', 'cpu' or 'reference' with a cache"
            )
        # The environment means attention that its choice can carry out.
        wanted = "auto"
    choice = _automatic(q) if wanted == "auto" else choose(backend, q)
    if wanted != "auto" or choice.implementation not in ("hopper", "triton"):
        return choice
    implementation, why = _proved(q.device, q.dtype, q.shape[-1], ("decode",))
    no_hopper = "the Hopper kernels take no cache; " if choice.implementation == "hopper" else ""
    return Choice(implementation, f"{no_hopper}tensors on {q.device.type}, {_inputs(q)}; {why}")


def _wanted(backend: str) -> tuple[str, str]:
    """What is asked for, "auto" where nothing is, and by what."""
    if backend not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"backend: got {backend!r}, takes 'auto' or one of {IMPLEMENTATIONS}")
    if backend != "auto":
        return backend, "the argument 'backend'"
    from_environment = environment()
    if from_environment not in ("", "auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: got {from_environment!r}, takes 'auto' or one of {IMPLEMENTATIONS}"
        )
    return from_environment or "auto", f"the environment variable {ENVIRONMENT_VARIABLE}"


@torch.compiler.assume_constant_result
def backward_implementation(implementation: str, head_dim: int, deterministic: bool) -> str:
    """Which implementation computes the gradients where `implementation` computed the output.

    The Hopper kernels leave to Triton those with the same bits on every run, and head widths at which this version of
    its compiler would spill registers.

    Args:
        implementation: Of the output.
        head_dim: Width of a head.
        deterministic: Whether every run must give the same bits.
    """
    if implementation != "hopper":
        return implementation
    from transfusion_kernels.attention.hopper import BACKWARD

    return "hopper" if head_dim in BACKWARD and not deterministic else "triton"


def _automatic(q: Tensor) -> Choice:
    device = q.device.type
    if device == "cpu":
        return Choice("cpu", "tensors on the CPU")
    if device != "cuda":  # ROCm's devices are called cuda too
        return Choice("reference", f"no kernel is written for device {device!r}")
    problem = _triton_problem(q)
    if problem:
        return Choice("reference", f"the Triton kernels cannot run: {problem}")
    problem = _hopper_problem(q)
    candidates = ("triton",) if problem else ("hopper", "triton")
    implementation, why = _proved(q.device, q.dtype, q.shape[-1], candidates)
    reason = f"tensors on {device}, {_inputs(q)}; {why}"
    if implementation == "hopper":
        backward = backward_implementation("hopper", q.shape[-1], deterministic=False)
        return Choice("hopper", f"{reason}; gradients by {backward}")
    return Choice(implementation, f"{reason}; not hopper: {problem}" if problem else reason)


def _inputs(q: Tensor) -> str:
    return f"head_dim {q.shape[-1]}, {q.dtype}"


def _asked_for(implementation: str, by: str, q: Tensor) -> Choice:
    problem = ""
    if implementation == "cpu" and q.device.type != "cpu":
        problem = f"q is on {q.device}"
    elif implementation in rivals.NAMES:
        problem = rivals.problem(implementation, q)
    elif implementation == "hopper":
        problem = _hopper_problem(q)
    elif implementation == "triton":
        problem = _triton_problem(q)
        if not problem and q.device.type != "cuda" and not interprets():
            problem = f"q is on {q.device} (set TRITON_INTERPRET=1 before the first import to run on the CPU)"
    if problem:
        raise ValueError(f"backend: got {implementation!r} by {by}, which cannot run: {problem}")
    return Choice(implementation, f"asked for by {by}")


def _triton_problem(q: Tensor) -> str:
    if not _has_triton():
        return "triton is not installed"
    if q.shape[-1] not in TRITON_HEAD_DIMS:
        return f"head_dim is {q.shape[-1]}, they take {TRITON_HEAD_DIMS}"
    if q.dtype not in TRITON_DTYPES:
        return f"the dtype is {q.dtype}, they take {TRITON_DTYPES}"
    return ""


def _hopper_problem(q: Tensor) -> str:
    if not _has_triton():
        return "triton is not installed"
    if q.shape[-1] not in HOPPER_HEAD_DIMS:
        return f"head_dim is {q.shape[-1]}, its kernels take {HOPPER_HEAD_DIMS}"
    if q.dtype not in HOPPER_DTYPES:
        return f"the dtype is {q.dtype}, its kernels take {HOPPER_DTYPES}"
    if q.device.type != "cuda":
        return f"q is on {q.device}"
    capability = _capability(q.device)
    return "" if capability[0] == 9 else f"the compute capability is {capability[0]}.{capability[1]}, not 9"


def shipped(device: torch.device) -> Iterator[tuple[str, int, torch.dtype]]:
    """What can be probed on a device: implementation, head width and dtype."""
    capability = _capability(device) if device.type == "cuda" else (0, 0)
    widths = {"hopper": HOPPER_HEAD_DIMS if capability[0] == 9 else ()}
    dtypes = {"hopper": HOPPER_DTYPES}
    for implementation in PROBED:
        for head_dim in widths.get(implementation, TRITON_HEAD_DIMS):
            for dtype in dtypes.get(implementation, TRITON_DTYPES):
                yield implementation, head_dim, dtype


def on_record(device: torch.device) -> Iterator[tuple[Subject, Verdict | None]]:
    """All that can be probed on a device, with the verdict if there is one. Nothing is probed."""
    for implementation, head_dim, dtype in shipped(device):
        subject = Subject.of(implementation, head_dim, dtype, device)
        yield subject, probe.verdict_on(subject, str(device), cache_folder(), probes=False)


def probe_command(subject: Subject, *implementations: str, again: bool = True) -> str:
    """What to type to have kernels probed for the head width and dtype of a subject.

    Args:
        subject: As which they are.
        implementations: Those of them, that of the subject if none is given.
        again: Whether some are on record.
    """
    names = " ".join(implementations or (subject.implementation,))
    return (
        f"{probe.COMMAND}{' --again' if again else ''} --implementation {names} "
        f"--head-dim {subject.head_dim} --dtype {subject.dtype}"
    )


def cache_folder() -> Path | None:
    """Where the records of probes are: `TRANSFUSION_CACHE`, else a folder in the user's cache. None without a home."""
    try:
        if named := os.environ.get(CACHE_VARIABLE):
            return Path(named).expanduser()
        caches = os.environ.get("XDG_CACHE_HOME")
        return (Path(caches) if caches else Path.home() / ".cache") / "transfusion" / "kernels"
    except RuntimeError:
        return None


def child_variables() -> dict[str, str]:
    """The environment of a probe's process, which itself must probe nothing."""
    return {**os.environ, PROBE_VARIABLE: "0"}


# What a compiler is to take as fixed rather than trace.
@torch.compiler.assume_constant_result
def environment() -> str:
    """What the environment asks for, "" if nothing."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def interprets() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) for others."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _proved(
    device: torch.device, dtype: torch.dtype, head_dim: int, candidates: tuple[str, ...]
) -> tuple[str, str]:
    """The first of the candidates that is right on a device, else "reference", and why. Decided once a process."""
    key = (device, dtype, head_dim, candidates, _may_probe())
    if key not in _decided:
        if not _has_gpu():
            # As when a run is planned elsewhere. Nothing will run.
            return _name(candidates[0]), "not tried, for there is no GPU here"
        captures = torch.cuda.is_current_stream_capturing()
        decision, settled = _decide(device, dtype, head_dim, candidates, _may_probe() and not captures)
        if captures and not settled:
            return decision
        _decided[key] = decision
    return _decided[key]


def _decide(
    device: torch.device, dtype: torch.dtype, head_dim: int, candidates: tuple[str, ...], probes: bool
) -> tuple[tuple[str, str], bool]:
    """As `_proved`, and whether there was a verdict on all that were asked about."""
    refused: dict[str, Verdict | None] = {}
    for candidate in candidates:
        subject = Subject.of(candidate, head_dim, dtype, device)
        verdict = _verdict(subject, device, probes)
        if verdict is not None and verdict.right:
            implementation, why = _name(candidate), f"proved right here on {verdict.date}"
            break
        refused[candidate] = verdict
    else:
        implementation = "reference"
        why = "no kernel is proved right here, and this one builds all scores, which takes much memory"
    if refused:
        refusal = _refusal(refused, subject)
        _warn(implementation, refusal)
        why = f"{why}; {refusal}"
    return (implementation, why), None not in refused.values()


def _refusal(refused: dict[str, Verdict | None], subject: Subject) -> str:
    """Why kernels are not taken, and how to probe them."""
    told = (
        f"not {name}: {verdict.sentence if verdict else 'no probe has been made here'}"
        for name, verdict in refused.items()
    )
    command = probe_command(subject, *refused, again=any(refused.values()))
    return f"{'; '.join(told)}; probe by `{command}`"


def _name(candidate: str) -> str:
    """The implementation that a candidate belongs to."""
    return "triton" if candidate == "decode" else candidate


def _warn(implementation: str, reason: str) -> None:
    """Warn that a plainer implementation runs, once in a process for each."""
    if implementation in _warned:
        return
    _warned.add(implementation)
    if implementation == "reference":
        warnings.warn(f"attention runs on the dense reference: {reason}", stacklevel=2)
    else:
        warnings.warn(f"attention runs on Triton's portable kernels: {reason}", stacklevel=2)


def _verdict(subject: Subject, device: torch.device, probes: bool) -> Verdict | None:
    """The verdict on record, or that of a probe."""
    return probe.verdict_on(subject, str(device), cache_folder(), probes=probes, variables=child_variables())


def _may_probe() -> bool:
    asked = os.environ.get(PROBE_VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{PROBE_VARIABLE}: got {asked!r}, takes 0 or 1")
    return asked != "0"


def _has_gpu() -> bool:
    return torch.cuda.is_available()
