"""What int8 weights cost and save: memory, speed and error against fp32, in one run.

    .venv/bin/python benchmarks/int8.py [--rounds 5] [--model EXPORT] [--out FILE]

One thread of the CPU. The network is random: 12 layers of width 512 with 32,000 tokens, and images of 256 patches. It
is written as an export and opened twice, as float32 and as int8. Both take turns for some rounds. Times are those of
the processor, all threads added up. Writes JSON, by default benchmarks/results/int8.json.

    bytes        of the weights as they are kept, and the most resident memory that a process needs to open them and
                 read one token, beyond what it needs without a model. Pages of the file that were read count too
    decode       tokens one by one behind 32 others: tokens a second
    image        256 patches behind 32 tokens, without guidance: calls of the network a second
    errors       of logits of the same tokens, and of the noise that the first call predicts: norm of the difference
                 over the norm of fp32's
    layers       matrices of width 512 and of width 4,096 with one state and with 256, multiplied in several ways: in
                 pieces (as the module does), whole, and with a weight that is scaled before the product

With --model: the validation losses of a trained model too. Run it in the folder where that was trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generate import make_tokenizer, prompt_of
from limits import find_device, record_head, write_json
from transfusion.checkpoint import export
from transfusion.checkpoint.stream import write_tensors
from transfusion.config import load_config
from transfusion.evaluate.suites.validation import validation
from transfusion.families.build import build_model
from transfusion.files import file_digest
from transfusion.generate import Pipeline
from transfusion.generate.load import Dtype
from transfusion.inference.int8 import Int8Weight, quantise
from transfusion.model.initialise import initialise
from transfusion.observe.memory import process_tree_peak_bytes
from transfusion.schema import TextSegment

RESULT = Path(__file__).resolve().parent / "results" / "int8.json"
SHAPE = (
    *("model.layers=12", "model.hidden_size=512", "model.heads=8", "model.vocabulary=32000"),
    *("model.patch_size=2", "codec.channels=3", "codec.image_size=32"),
)
DTYPES: tuple[Dtype, Dtype] = ("float32", "int8")
PROMPT, TOKENS, CALLS, ROUNDS = 32, 32, 3, 5
LAYERS = ((1408, 512), (4096, 4096))


def write_random_export(folder: Path) -> None:
    """A random model, as `transfusion export` would write it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    config = load_config(None, [*SHAPE, f"data.tokenizer={tokenizer.path}"])
    config = config.with_vocabulary(tokenizer.vocabulary)
    model = build_model(config)
    initialise(model, seed=0, layers=config.model.layers)
    # As initialised it predicts no noise.
    nn.init.normal_(model.get_submodule("patch_decoder.projection").weight, std=0.02)
    weights = export.WEIGHT_FILES["weight"]
    tensors = model.state_dict()
    write_tensors(
        folder / weights,
        {name: tensor.shape for name, tensor in tensors.items()},
        tensors.__getitem__,
        metadata={"format": "pt", export.EXPORT_ID: "random"},
    )
    description = {
        "format": export.FORMAT,
        "format_version": export.FORMAT_VERSION,
        export.EXPORT_ID: "random",
        "step": 0,
        "weights": {"weight": weights},
        "digests": {export.TOKENIZER: file_digest(folder / export.TOKENIZER)},
        "config": config.as_dict(),
    }
    (folder / export.CONFIG).write_text(json.dumps(description))


class Measured:
    """One network at work.

    Args:
        folder: The export.
        dtype: As it is opened.
    """

    def __init__(self, folder: Path, dtype: Dtype) -> None:
        self.pipeline = Pipeline.from_export(folder, device="cpu", dtype=dtype)
        tokenizer = self.pipeline.tokenizer
        self.prompt = prompt_of(tokenizer, PROMPT)
        self.next_ids = tokenizer.encode(prompt_of(tokenizer, TOKENS, seed=1))[:TOKENS]

    @property
    def weight_bytes(self) -> int:
        """Of all weights and scales."""
        return sum(tensor.nbytes for tensor in self.pipeline.runner.model.state_dict().values())

    @torch.no_grad()
    def decode(self) -> tuple[Tensor, float]:
        """Logits [T, V] of given tokens behind the prompt, read one by one, and the seconds that they took."""
        runner = self.pipeline.runner
        text = TextSegment(tuple(self.pipeline.tokenizer.encode(self.prompt)))
        layout = runner.lay_out([text], finished=False)
        cache = runner.cache(16)
        rows = cache.view([cache.row(len(layout) + TOKENS)])
        runner.read(rows, runner.prompt_block([(layout, 0, len(layout))]))
        logits = []
        begin = time.process_time()
        for number, token in enumerate(self.next_ids):
            logits.append(
                runner.logits(runner.read(rows, runner.token_block([token], [len(layout) + number])))
            )
        return torch.cat(logits), time.process_time() - begin

    def image(self) -> tuple[Tensor, float]:
        """The noise that the first call of an image predicts, and seconds a call."""
        with recorded(self.pipeline.runner.model.get_submodule("patch_decoder")) as answers:
            begin = time.process_time()
            self.pipeline.sample([self.prompt], steps=CALLS, guidance=1.0)
            seconds = time.process_time() - begin
        assert len(answers) == CALLS
        return answers[0], seconds / CALLS


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module answers meanwhile."""
    answers: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, __, answer: answers.append(answer.clone()))
    try:
        yield answers
    finally:
        hook.remove()


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def measure_networks(folder: Path, rounds: int) -> dict[str, Any]:
    """Both networks in turns."""
    networks = {dtype: Measured(folder, dtype) for dtype in DTYPES}
    seconds: dict[str, dict[str, list[float]]] = {dtype: {"decode": [], "image": []} for dtype in DTYPES}
    answers: dict[str, dict[str, Tensor]] = {dtype: {} for dtype in DTYPES}
    for turn in range(rounds + 1):
        for dtype, network in networks.items():
            for what, call in (("decode", network.decode), ("image", network.image)):
                answers[dtype][what], taken = call()
                if turn:  # the first round warms up
                    seconds[dtype][what].append(taken)
    found: dict[str, Any] = {}
    for dtype, network in networks.items():
        found[dtype] = {
            "weight_bytes": network.weight_bytes,
            "peak_bytes": peak_bytes(folder, dtype),
            "decode_tokens_per_s": TOKENS / statistics.median(seconds[dtype]["decode"]),
            "image_calls_per_s": 1 / statistics.median(seconds[dtype]["image"]),
        }
    exact, rounded = (answers[dtype] for dtype in DTYPES)
    found["relative_error"] = {
        "logits": relative_error(rounded["decode"], exact["decode"]),
        "predicted_noise": relative_error(rounded["image"], exact["image"]),
    }
    for what in ("decode", "image"):
        pairs = zip(*(seconds[dtype][what] for dtype in DTYPES), strict=True)
        found[f"{what}_speed_of_int8"] = statistics.median(exact / rounded for exact, rounded in pairs)
    return found


def peak_bytes(folder: Path, dtype: str) -> int:
    """What a process of its own needs beyond one that opens nothing."""
    peaks = []
    for given in ([], [str(folder), dtype]):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", *given], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    return peaks[1] - peaks[0]


def print_peak(folder: str, dtype: Dtype) -> None:
    """In the process that `peak_bytes` starts."""
    torch.set_num_threads(1)
    if folder:
        pipeline = Pipeline.from_export(folder, device="cpu", dtype=dtype)
        pipeline.generate([["a"]], max_tokens=1, max_images=0)
    print(process_tree_peak_bytes())


def measure_layers(rounds: int) -> list[dict[str, Any]]:
    """Ways to multiply by int8, in milliseconds."""
    found = []
    for rows, columns in LAYERS:
        weight_OD = torch.randn(rows, columns) * 0.02
        kept = Int8Weight(rows, columns)
        quantise(weight_OD, kept.weight, kept.scale)
        for states in (1, 256):
            ways = _ways(torch.randn(states, columns), weight_OD, kept)
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(4 * rounds + 1):
                for way, call in ways.items():
                    begin = time.process_time()
                    call()
                    if turn:
                        taken[way].append((time.process_time() - begin) * 1e3)
            medians = {way: statistics.median(each) for way, each in taken.items()}
            found.append({"weight": [rows, columns], "states": states, "ms": medians})
    return found


def _ways(x_ND: Tensor, weight_OD: Tensor, kept: Int8Weight) -> dict[str, Callable[[], Tensor]]:
    return {
        "float32": lambda: F.linear(x_ND, weight_OD),
        "int8 in pieces": lambda: kept.multiply(x_ND),
        "int8 whole": lambda: F.linear(x_ND, kept.weight.to(x_ND.dtype)) * kept.scale,
        "int8 scaled before": lambda: F.linear(x_ND, kept.weight.to(x_ND.dtype) * kept.scale[:, None]),
    }


def validation_losses(model: Path) -> dict[str, dict[str, float]]:
    """Of a trained model, for each dtype."""
    losses = {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as out:
            metrics = validation(Pipeline.from_export(model, device="cpu", dtype=dtype), Path(out))
        losses[dtype] = {name: metric.value for name, metric in metrics.items() if "bigram" not in name}
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each, after one that warms up")
    parser.add_argument("--model", type=Path, help="an exported model that was trained")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak is not None:
        print_peak(*(given.peak or ("", "auto")))
        return
    torch.set_num_threads(1)
    record = record_head(find_device("cpu")) | {"rounds": given.rounds}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_random_export(Path(folder))
        record |= {"random": measure_networks(Path(folder), given.rounds)}
        record |= {"layers": measure_layers(given.rounds)}
    if given.model:
        record["trained"] = validation_losses(given.model)
    write_json(record, given.out)
    print(
        json.dumps(
            {name: record[name] for name in ("random", "layers", "trained") if name in record}, indent=2
        )
    )


if __name__ == "__main__":
    main()
