"""How attention.py measures: the order of the table, the check and the clock of each line, and how a line reads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attention_table.cases import Case, Inputs
from attention_table.providers import Provider, Unsupported
from limits import Limits, Timer, tflops
from verify import exact_results, verify

WRONG_OR_FAILED = 3
HEADLINE_FAMILIES = ("causal", "transfusion")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    seconds: of the whole table. call_seconds: of one timing. isolate: a process for each provider, which is ended after
    so many seconds without a new figure.
    """

    device: torch.device
    dtype: str
    lengths: Sequence[int]
    head_dims: Sequence[int]
    families: Sequence[str]
    tokens: int
    width: int
    seconds: float
    call_seconds: float = 0.1
    isolate: float | None = None

    def cases(self) -> list[Case]:
        """Every combination, with heads and rows such that width and tokens stay the same."""
        rows = {length: max(1, self.tokens // length) for length in self.lengths}
        heads = {head_dim: max(1, self.width // head_dim) for head_dim in self.head_dims}
        return [
            Case(family, length, rows[length], heads[head_dim], head_dim, self.dtype)
            for head_dim in self.head_dims
            for length in self.lengths
            for family in self.families
        ]

    def stages(self, providers: Sequence[Provider]) -> list[tuple[list[Case], list[Provider]]]:
        """The table in parts: the first length under the two main masks, then all else. In each the slow come last."""
        headline = [
            case
            for case in self.cases()
            if case.length == self.lengths[0] and case.family in HEADLINE_FAMILIES
        ]
        rest = [case for case in self.cases() if case not in headline]
        quick, slow = ([p for p in providers if p.slow == is_slow] for is_slow in (False, True))
        parts = [(cases, some) for cases in (headline, rest) for some in (quick, slow)]
        return [(cases, some) for cases, some in parts if cases and some]


class Table:
    """What the lines of one table share: the limits, the clock, the deadline, and whether the device lives."""

    def __init__(self, options: Options, limits: Limits, deadline: float) -> None:
        self.options, self.limits, self.deadline = options, limits, deadline
        self.timer = Timer(options.device)
        # What to say of all that follows a crash of the device.
        self.lost = ""

    def fill(
        self,
        cases: Sequence[Case],
        providers: Sequence[Provider],
        results: list[dict[str, Any]],
        keep: Callable[[], None],
    ) -> None:
        """Append a result for each case and provider, if only why there is none. `keep` is called as figures come."""
        for case in cases:
            prepared = _Prepared(case, self.options.device)
            for provider in providers:
                result: dict[str, Any] = {**asdict(case), "provider": provider.name, "ours": provider.ours}
                result |= {"status": "running", "reason": ""}
                results.append(result)
                for figures in self._figures(provider, prepared):
                    result |= figures
                    if result["status"] != "unsupported":
                        keep()
                if result["status"] != "unsupported":
                    print(line_of(result), flush=True)
            del prepared
            if self.options.device.type == "cuda" and not self.lost:
                torch.cuda.empty_cache()

    def _figures(self, provider: Provider, prepared: _Prepared) -> Iterator[dict[str, Any]]:
        """What is found out about one provider, piece by piece. The last piece has its status."""
        if self.lost or time.monotonic() > self.deadline:
            yield {"status": "skipped", "reason": self.lost or "out of time"}
            return
        try:
            yield from self.measure(provider, prepared)
        except Unsupported as error:
            yield {"status": "unsupported", "reason": str(error)}
        except Exception as error:  # whatever a provider fails with is its result
            self.lost = self._lost(provider)
            yield {"status": "failed", "reason": one_line(error)}

    def measure(self, provider: Provider, prepared: _Prepared) -> Iterator[dict[str, Any]]:
        """Check one provider, and time it if it is right: forward, backward, building what it needs of the mask."""
        dtype, seconds = self.options.dtype, self.options.call_seconds
        inputs = prepared.inputs()
        attend = provider.prepare(inputs)
        yield {}
        verdict = verify(attend, inputs, prepared.exact(), dtype, poison=provider.ours)
        yield {
            "errors": {name: _finite(error) for name, error in verdict.errors.items()},
            "worst_row": _finite(verdict.worst_row),
        }
        if not verdict.right:
            yield {"status": "wrong", "reason": "differs from float64"}
            return
        q, k, v = inputs.q, inputs.k, inputs.v
        heads, width = q.shape[1], q.shape[3]
        out = attend(q, k, v)
        calls: dict[str, Callable[[], object]] = {
            "forward": lambda: attend(q, k, v),
            "backward": lambda: torch.autograd.grad(out, (q, k, v), inputs.grad_out, retain_graph=True),
        }
        for name, call in calls.items():
            milliseconds = self.timer.median_ms(call, seconds)
            speed = tflops(inputs.mask.flops(heads, width, backward=name == "backward"), milliseconds)
            yield {name: {"ms": milliseconds, "tflops": speed, "share": self.limits.share(speed, dtype)}}
        if provider.build:
            build = provider.build
            # With the host's part: what is built between steps does not hide behind other work.
            milliseconds = self.timer.median_ms(lambda: build(inputs), seconds / 2, host_counts=True)
            yield {"mask_ms": milliseconds}
        yield {"status": "ok"}

    def _lost(self, provider: Provider) -> str:
        try:
            self.timer.wait()
        except RuntimeError:
            return f"the device was lost by {provider.name}"
        return ""


class _Prepared:
    """Inputs of a case and their exact results, made when the first provider asks for them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case, self._device = case, device
        self._inputs: Inputs | None = None
        self._exact: Sequence[Tensor] | None = None

    def inputs(self) -> Inputs:
        self._inputs = self._inputs or self._case.inputs(self._device)
        return self._inputs

    def exact(self) -> Sequence[Tensor]:
        self._exact = self._exact or exact_results(self.inputs())
        return self._exact


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


HEADER = (
    f"{'family':<12}{'length':>7}{'D':>5}  {'provider':<18}{'fwd ms':>9}{'TFLOP/s':>9}{'share':>7}"
    f"{'bwd ms':>9}{'TFLOP/s':>9}{'share':>7}{'mask ms':>9}  error"
)


def line_of(result: dict[str, Any]) -> str:
    """A result as a line of the table."""
    head = f"{result['family']:<12}{result['length']:>7}{result['head_dim']:>5}  {result['provider']:<18}"
    errors = result.get("errors", {}).values()
    error = "nan" if None in errors else f"{max(errors):.1e}" if errors else ""
    if result["status"] != "ok":
        return f"{head}{result['status'].upper()}: {result['reason']} {error}".rstrip()
    speeds = "".join(
        f"{part['ms']:>9.3f}{part['tflops']:>9.3g}{part['share']:>7.1%}"
        for part in (result["forward"], result["backward"])
    )
    mask = f"{result['mask_ms']:>9.3f}" if "mask_ms" in result else f"{'':>9}"
    return f"{head}{speeds}{mask}  {error}"


def exit_code(record: dict[str, Any]) -> int:
    """3 when one of ours was wrong, failed or hung, else 0: what others do is no fault of this project."""
    bad = ("wrong", "failed", "hung")
    found = any(result["ours"] and result["status"] in bad for result in record["results"])
    return WRONG_OR_FAILED if found else 0
