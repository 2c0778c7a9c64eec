"""The last lines of a call: what it found, in short, and the command of the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PASSES = ("forward", "backward")


def lines_of(data: dict[str, Any]) -> list[str]:
    """What a record says, a line each. What was not found out has none."""
    lines: list[str] = []
    for section in (_attention, _steps, _tests, _sweep, _ticks, _training):
        # What was killed may have written anything. The other sections are told all the same.
        try:
            lines.extend(section(data))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            lines.append(f"{section.__name__.strip('_')}: cannot be told, {type(error).__name__}: {error}")
    return lines


def _result(data: dict[str, Any], name: str) -> Any:
    return data["parts"].get(name, {}).get("result")


def _timed(data: dict[str, Any]) -> dict[tuple[int, str, str], dict[str, Any]]:
    """The lines of the attention table that were timed, by head width, mask and provider."""
    found = {}
    for name in data["parts"]:
        result = _result(data, name)
        for line in result.get("results", []) if isinstance(result, dict) else []:
            if line.get("status") == "ok" and "backward" in line:
                found[line["head_dim"], line["family"], line["provider"]] = line
    return found


def _attention(data: dict[str, Any]) -> Iterator[str]:
    timed = _timed(data)
    for (head_dim, family, provider), line in timed.items():
        speeds = " + ".join(f"{line[way]['tflops']:.3g} ({line[way]['share']:.0%})" for way in PASSES)
        yield f"attention {head_dim} {family}, {provider}: {speeds} TFLOP/s (share of matrix products)"
    for (head_dim, family, provider), line in timed.items():
        fused = timed.get((head_dim, family, "ours-triton"))
        if provider == "ours-triton-split" and fused:
            ratio = line["backward"]["ms"] / fused["backward"]["ms"]
            yield f"split over fused backward, {head_dim} {family}: {ratio:.2f} of the time"


def _steps(data: dict[str, Any]) -> Iterator[str]:
    for name in data["parts"]:
        result = _result(data, name)
        if name.startswith("step-") and isinstance(result, dict) and "step" in result:
            step = result["step"]
            exact = step["rates"]["exact"]
            mfu = "unknown" if exact["mfu"] is None else f"{exact['mfu']:.1%}"
            yield (
                f"{name}: {step['step_ms']:.1f} ms, {step['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, "
                f"{step['peak_gib']:.1f} GiB"
            )


def _tests(data: dict[str, Any]) -> Iterator[str]:
    for name in ("tests", "tests-32"):
        result = _result(data, name)
        if isinstance(result, dict) and "passed" in result:
            yield f"{name}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
            yield from (f"  {test}: {reason}" for test, reason in list(result["reasons"].items())[:8])


def _sweep(data: dict[str, Any]) -> Iterator[str]:
    for found in (_result(data, "sweep") or {}).get("results", []):
        cases = [case for case in found.get("cases", []) if "backward" in case]
        speeds = ", ".join(
            f"{case['family']} {case['forward']['tflops']:.3g} + {case['backward']['tflops']:.3g}"
            for case in cases
        )
        yield f"sweep, {found['variant']}: {found['status']} {speeds}".rstrip()


def _ticks(data: dict[str, Any]) -> Iterator[str]:
    for line in (_result(data, "tick") or {}).get("results", []):
        times = ", ".join(
            f"{name.removesuffix('_ms')} {line[name]:.2f} ms" for name in line if name.endswith("_ms")
        )
        yield f"a tick of {line['together']} {line['what']}: {times}"


def _training(data: dict[str, Any]) -> Iterator[str]:
    for name in ("evaluation", "captions"):
        if isinstance(result := _result(data, name), dict):
            numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
            yield f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in numbers.items())}"
