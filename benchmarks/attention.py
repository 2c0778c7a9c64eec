"""Attention under this project's mask: ours against what else can compute it, each checked before it is timed.

    .venv/bin/python benchmarks/attention.py [--seconds 300] [--lengths 8192 4096 ...] [--out FILE]

Prints a table, writes JSON, by default benchmarks/results/attention.json, and draws it beside that. Every provider gets
the same random inputs, laid out as the model lays them out. Its output and gradients are first held against float64
(verify.py); one that is wrong is reported as wrong and not timed, and one that cannot run leaves its reason. Speeds
count visible pairs only: 4 * D * H * pairs forward, 10 * D * H * pairs backward (the scores are computed again). The
share is of the matrix products that limits.py measured in the same run. On a GPU cases come most telling first, so
that a short budget cuts off the least. Exits with 3 when one of ours is wrong or fails.

Shape suffixes: B rows, S positions, H heads, D head width.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from limits import DTYPES, Timer, find_device, measure_limits, record_head, tflops, write_json
from transfusion_kernels import IntervalMask, explain, interval_attention
from transfusion_kernels.attention.cpu_plan import make_plan
from verify import MAX_ERROR, Attend, exact_results, verify

RESULT = Path(__file__).resolve().parent / "results" / "attention.json"
WRONG_OR_FAILED = 3
FORMULAS = {
    "forward": "4 * D * H * visible pairs",
    "backward": "10 * D * H * visible pairs",
    "share": "of the measured matrix products of the same dtype",
}
# What a user who tunes FlexAttention on Hopper by hand arrives at; both of its backward loops take the same tiles.
FLEX_TUNED = {
    "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2,
    "BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64,
}  # fmt: skip
# Documents of 2,000 to 4,000 tokens do not fit into rows shorter than this; there the mix is scaled down.
SHORTEST_UNSCALED = 2048

Span = tuple[int, int]


# What is attended with what


def causal(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """One document of text."""
    return [(0, size)], []


def transfusion_mix(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """Documents of 2,048 to 4,096 tokens, text and images of 256 to 1,024 patches in turn, about as much of each."""
    scale = min(1.0, size / SHORTEST_UNSCALED)
    documents, images, position = [], [], 0
    while position < size:
        start, end = position, min(position + round(random_.randint(2048, 4096) * scale), size)
        while position < end:
            position += round(random_.randint(128, 768) * scale)
            patches = round(random_.choice((256, 576, 1024)) * scale)
            if position + patches <= end:
                images.append((position, position + patches))
                position += patches
        documents.append((start, end))
        position = end
    return documents, images


def captions(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """Captions of 8 to 64 tokens, each with an image of 16, 64 or 256 patches."""
    documents, images, position = [], [], 0
    while position < size:
        start = position
        position = min(position + random_.randint(8, 64), size)
        patches = random_.choice((16, 64, 256))
        if position + patches <= size:
            images.append((position, position + patches))
            position += patches
        documents.append((start, position))
    return documents, images


def tiny_documents(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """Documents of 32 to 96 tokens, half of them with an image of 16 patches."""
    documents, images, position = [], [], 0
    while position < size:
        end = min(position + random_.randint(32, 96), size)
        if random_.random() < 0.5 and end - position >= 24:
            images.append((position + 8, position + 24))
        documents.append((position, end))
        position = end
    return documents, images


def one_document(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
    """One document with an image of 256 patches in the middle of every 1,024 tokens."""
    return [(0, size)], [(first, first + 256) for first in range(384, size - 255, 1024)]


def packed(length: int) -> Callable[[int, random.Random], tuple[list[Span], list[Span]]]:
    """Documents of one length, half of each an image."""

    def build(size: int, random_: random.Random) -> tuple[list[Span], list[Span]]:
        documents = [(first, min(first + length, size)) for first in range(0, size, length)]
        images = [(first + length // 4, first + length // 4 + length // 2) for first, end in documents]
        return documents, [(first, end) for first, end in images if end <= size]

    return build


FAMILIES: dict[str, Callable[[int, random.Random], tuple[list[Span], list[Span]]]] = {
    "transfusion": transfusion_mix,
    "causal": causal,
    "captions": captions,
    "tiny": tiny_documents,
    "document": one_document,
    "packed-512": packed(512),
    "packed-64": packed(64),
}


@dataclass(frozen=True)
class Case:
    """One line of the table, all providers alike."""

    family: str
    length: int
    rows: int
    heads: int
    head_dim: int
    dtype: str

    def inputs(self, device: torch.device) -> Inputs:
        """Random queries, keys, values and gradient, and the mask; the same for the same case."""
        torch.manual_seed(self.length + self.head_dim)
        shape = (self.rows, self.length, self.heads, self.head_dim)
        q, k, v, grad_out = (
            torch.randn(shape, device=device, dtype=DTYPES[self.dtype]).transpose(1, 2) for _ in range(4)
        )
        start_BS, end_BS = self._spans()
        return Inputs(
            q=q.requires_grad_(),
            k=k.requires_grad_(),
            v=v.requires_grad_(),
            grad_out=grad_out,
            document_start_BS=start_BS.to(device),
            image_end_BS=end_BS.to(device),
            mask=IntervalMask.from_spans(start_BS, end_BS).to(device),
            is_causal=self.family == "causal",
        )

    def _spans(self) -> tuple[Tensor, Tensor]:
        start_BS, end_BS = torch.zeros(2, self.rows, self.length, dtype=torch.int64)
        for row in range(self.rows):
            documents, images = FAMILIES[self.family](self.length, random.Random(row))
            for first, end in documents:
                start_BS[row, first:end] = first
            for first, end in images:
                end_BS[row, first:end] = end
        return start_BS, end_BS


@dataclass(frozen=True)
class Inputs:
    """q, k, v, grad_out: [B, H, S, D], laid out as [B, S, H, D]. The spans are what masks are built from."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    document_start_BS: Tensor
    image_end_BS: Tensor
    mask: IntervalMask
    is_causal: bool


# Who computes it


class Unsupported(Exception):  # noqa: N818  (no failure: not what this provider is for)
    """The provider does not do this case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute it.

    prepare: the function to time, with all that can be made of the mask beforehand; raises Unsupported.
    build: makes that anew from the spans, as every step of a training has to; timed apart.
    ours: memory is poisoned while it is checked, and its failure fails the run.
    """

    name: str
    prepare: Callable[[Inputs], Attend]
    build: Callable[[Inputs], object] | None = None
    ours: bool = False


def _interval(implementation: str) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        try:
            explain(inputs.q, inputs.k, inputs.v, inputs.mask, backend=implementation)
        except ValueError as error:
            raise Unsupported(str(error)) from None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = interval_attention(q, k, v, inputs.mask, backend=implementation)
            assert isinstance(out, Tensor)
            return out

        return attend

    return prepare


def _build_interval_mask(inputs: Inputs) -> object:
    mask = IntervalMask.from_spans(inputs.document_start_BS, inputs.image_end_BS)
    if mask.device.type == "cpu":
        return make_plan(mask.first_key, mask.end_key)
    return mask.first_query, mask.end_query, mask.query_order, mask.key_order


def _sdpa_causal(backend: SDPBackend, *, gpu_only: bool) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        _needs_causal(inputs)
        if gpu_only and not inputs.q.is_cuda:
            raise Unsupported("runs on GPUs only")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend

    return prepare


def _sdpa_dense(inputs: Inputs) -> Attend:
    dense_B1SS = _build_dense_mask(inputs)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense_B1SS)


def _build_dense_mask(inputs: Inputs) -> Tensor:
    return IntervalMask.from_spans(inputs.document_start_BS, inputs.image_end_BS).dense()[:, None]


def _flex(options: dict[str, int] | None) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        if not inputs.q.is_cuda:
            raise Unsupported("FlexAttention has no backward on the CPU")
        block_mask, attend = _build_block_mask(inputs), _compiled("flex_attention")
        return lambda q, k, v: attend(q, k, v, block_mask=block_mask, kernel_options=options)

    return prepare


def _build_block_mask(inputs: Inputs) -> object:
    batch, _, size, _ = inputs.q.shape
    first_BS, end_BS = inputs.mask.first_key, inputs.mask.end_key

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (first_BS[b, q] <= k) & (k < end_BS[b, q])

    return _compiled("create_block_mask")(sees, batch, None, size, size, device=inputs.q.device)


@functools.cache
def _compiled(name: str) -> Callable[..., Any]:
    """A function of FlexAttention, compiled; the compiler told to keep one version for each shape of the table."""
    import torch._dynamo.config
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = 256
    torch._functorch.config.donated_buffer = False  # the same forward is taken backward many times
    return torch.compile(getattr(importlib.import_module("torch.nn.attention.flex_attention"), name))


def _flash_attention(inputs: Inputs) -> Attend:
    """FlashAttention 3, 4 or 2, where one is installed."""
    _needs_causal(inputs)
    if not inputs.q.is_cuda:
        raise Unsupported("runs on GPUs only")
    attend = _installed_flash_attention()

    def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return causal_attention


def _installed_flash_attention() -> Callable[..., Any]:
    for module in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        with contextlib.suppress(ImportError):
            attend: Callable[..., Any] = importlib.import_module(module).flash_attn_func
            return attend
    raise Unsupported("not installed")


def _needs_causal(inputs: Inputs) -> None:
    if not inputs.is_causal:
        raise Unsupported("cannot express this mask")


PROVIDERS = (
    Provider("ours-hopper", _interval("hopper"), _build_interval_mask, ours=True),
    Provider("ours-triton", _interval("triton"), _build_interval_mask, ours=True),
    Provider("ours-cpu", _interval("cpu"), _build_interval_mask, ours=True),
    Provider("flex", _flex(None), _build_block_mask),
    Provider("flex-tuned", _flex(FLEX_TUNED), _build_block_mask),
    Provider("sdpa-dense", _sdpa_dense, _build_dense_mask),
    Provider("sdpa-flash-causal", _sdpa_causal(SDPBackend.FLASH_ATTENTION, gpu_only=False)),
    Provider("sdpa-cudnn-causal", _sdpa_causal(SDPBackend.CUDNN_ATTENTION, gpu_only=True)),
    Provider("flash-attn", _flash_attention),
)


# The table


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. seconds: of the whole table. call_seconds: of one timing."""

    device: torch.device
    dtype: str
    lengths: Sequence[int]
    head_dims: Sequence[int]
    families: Sequence[str]
    tokens: int
    width: int
    seconds: float
    call_seconds: float = 0.1

    def cases(self) -> list[Case]:
        """Every combination; heads and rows such that width and tokens stay the same."""
        rows = {length: max(1, self.tokens // length) for length in self.lengths}
        heads = {head_dim: max(1, self.width // head_dim) for head_dim in self.head_dims}
        return [
            Case(family, length, rows[length], heads[head_dim], head_dim, self.dtype)
            for head_dim in self.head_dims
            for length in self.lengths
            for family in self.families
        ]


def run(
    options: Options, providers: Sequence[Provider] = PROVIDERS, out: Path | None = None
) -> dict[str, Any]:
    """Measure the table, print it line by line, and keep `out` up to date. Returns what is written."""
    table = Table(options)
    record: dict[str, Any] = {
        "environment": record_head(options.device),
        "formulas": FORMULAS,
        "limits": table.limits.as_dict(),
        "max_error": dict(zip(("tensor", "row"), MAX_ERROR[options.dtype], strict=True)),
        "results": [],
    }
    peak = table.limits.gemm_tflops[options.dtype]
    print(f"{table.limits.device}: {options.dtype} matrix products {peak:.3g} TFLOP/s\n{HEADER}", flush=True)
    for case in options.cases():
        for result in table.results(case, providers):
            record["results"].append(result)
            if result["status"] != "unsupported":
                print(line_of(result), flush=True)
        if out:
            write_json(record, out)
    return record


class Table:
    """What the lines of one table share: the limits, the clock, the deadline, and whether the device lives."""

    def __init__(self, options: Options) -> None:
        self.deadline = time.monotonic() + options.seconds
        self.options = options
        self.timer = Timer(options.device)
        seconds = min(10.0, options.seconds / 10)
        self.limits = measure_limits(options.device, seconds=seconds, dtypes=(options.dtype,))
        # What to say of all that follows a crash of the device.
        self.lost = ""

    def results(self, case: Case, providers: Sequence[Provider]) -> Iterator[dict[str, Any]]:
        """A result for each provider, if only why there is none."""
        inputs: Inputs | None = None
        exact: Sequence[Tensor] = ()
        for provider in providers:
            result: dict[str, Any] = {**asdict(case), "provider": provider.name, "ours": provider.ours}
            if self.lost or time.monotonic() > self.deadline:
                yield result | {"status": "skipped", "reason": self.lost or "out of time"}
                continue
            try:
                if inputs is None:
                    inputs = case.inputs(self.options.device)
                    exact = exact_results(inputs)
                result |= self.measure(provider, inputs, exact)
            except Unsupported as error:
                result |= {"status": "unsupported", "reason": str(error)}
            except Exception as error:  # whatever a provider fails with is its result
                result |= {"status": "failed", "reason": one_line(error)}
                self.lost = self._lost(provider)
            yield result
        if self.options.device.type == "cuda" and not self.lost:
            del inputs, exact
            torch.cuda.empty_cache()

    def measure(self, provider: Provider, inputs: Inputs, exact: Sequence[Tensor]) -> dict[str, Any]:
        """Check one provider, and time it if it is right: forward, backward, building what it needs of the mask."""
        dtype, seconds = self.options.dtype, self.options.call_seconds
        attend = provider.prepare(inputs)
        verdict = verify(attend, inputs, exact, dtype, poison=provider.ours)
        result: dict[str, Any] = {
            "errors": {name: _finite(error) for name, error in verdict.errors.items()},
            "worst_row": _finite(verdict.worst_row),
        }
        if not verdict.right:
            return result | {"status": "wrong", "reason": "differs from float64"}
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
            share = self.limits.share(speed, dtype)
            result[name] = {"ms": milliseconds, "tflops": speed, "share": share}
        if provider.build:
            build = provider.build
            # With the host's part: what is built between steps does not hide behind other work.
            result["mask_ms"] = self.timer.median_ms(lambda: build(inputs), seconds / 2, cold=False)
        return result | {"status": "ok", "reason": ""}

    def _lost(self, provider: Provider) -> str:
        try:
            self.timer.wait()
        except RuntimeError:
            return f"the device was lost by {provider.name}"
        return ""


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


def draw(record: dict[str, Any], out: Path) -> None:
    """Speed over row length, a panel for each mask, head width and direction; needs matplotlib, else says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no image: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    timed = [result for result in record["results"] if result["status"] == "ok"]
    widths = sorted({result["head_dim"] for result in timed})
    columns = [(head_dim, way) for head_dim in widths for way in ("forward", "backward")]
    lengths = sorted({result["length"] for result in timed})
    families = [family for family in FAMILIES if any(result["family"] == family for result in timed)]
    if not timed:
        return
    figure = Figure(figsize=(3.4 * len(columns), 2.6 * len(families) + 0.8), layout="constrained")
    panels = figure.subplots(len(families), len(columns), squeeze=False, sharex=True)
    fastest = max(result["forward"]["tflops"] for result in timed)
    unit, per_tflops = ("TFLOP/s", 1) if fastest >= 1 else ("GFLOP/s", 1000)
    colours = {provider.name: f"C{number}" for number, provider in enumerate(PROVIDERS)}
    for row, family in enumerate(families):
        for column, (head_dim, way) in enumerate(columns):
            panel = panels[row, column]
            for name, colour in colours.items():
                points = sorted(
                    (result["length"], result[way]["tflops"] * per_tflops)
                    for result in timed
                    if (result["family"], result["head_dim"], result["provider"]) == (family, head_dim, name)
                )
                if points:
                    width = 2.2 if name.startswith("ours") else 1.2
                    panel.plot(*zip(*points, strict=True), "o-", color=colour, lw=width, ms=4, label=name)
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.set_title(f"{family}, D {head_dim}, {way}", fontsize=9)
        panels[row, 0].set_ylabel(f"{unit}, visible pairs")
    for panel in panels[-1]:
        panel.set_xlabel("tokens of a row")
    seen = {
        label: line
        for panel in panels.flat
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=4, frameon=False)
    limits = record["limits"]
    figure.suptitle(f"{limits['device']}: attention under each mask", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def exit_code(record: dict[str, Any]) -> int:
    """3 when one of ours was wrong or failed, else 0: what others do is no fault of this project."""
    bad = any(result["ours"] and result["status"] in ("wrong", "failed") for result in record["results"])
    return WRONG_OR_FAILED if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1k to 32k on a GPU, 256 on the CPU")
    parser.add_argument("--head-dims", type=int, nargs="+", help="default: 128 64 on a GPU, 32 on the CPU")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--providers", nargs="+", choices=[provider.name for provider in PROVIDERS])
    parser.add_argument("--tokens", type=int, help="of a batch; default: 16384 on a GPU, 512 on the CPU")
    parser.add_argument("--width", type=int, help="heads x head width; default: 2048 on a GPU, 64 on the CPU")
    parser.add_argument("--seconds", type=float, default=300.0, help="after this no timing is begun")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU; waiting ones would count as working"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = find_device(given.device)
    on_gpu = device.type == "cuda"
    options = Options(
        device=device,
        dtype=given.dtype or ("bf16" if on_gpu else "fp32"),
        lengths=given.lengths or ([8192, 4096, 2048, 16384, 1024, 32768] if on_gpu else [256]),
        head_dims=given.head_dims or ([128, 64] if on_gpu else [32]),
        families=given.families,
        tokens=given.tokens or (16384 if on_gpu else 512),
        width=given.width or (2048 if on_gpu else 64),
        seconds=given.seconds,
        call_seconds=0.1 if on_gpu else 0.05,
    )
    chosen = [p for p in PROVIDERS if not given.providers or p.name in given.providers]
    record = run(options, chosen, given.out)
    draw(record, given.out.with_suffix(".png"))
    return exit_code(record)


if __name__ == "__main__":
    sys.exit(main())
