"""How fast text and images are generated: against other libraries, without a cache, alone and side by side.

    .venv/bin/python benchmarks/generate.py [--rounds 5] [--only decode image ...] [--out FILE]

One thread of the CPU, fp32. The network is random: 8 layers, of width 384 for text and of width 256 for images. Each
comparison takes turns, several rounds of both, in one process. Times are those of the processor, all threads added up,
and the ratio is the median of the rounds' ratios. Writes JSON, by default benchmarks/results/generate.json. Exits with
3 when a ratio misses its bar.

    decode      text, batch 1 and 8, against transformers' generate with a static cache and a Llama of the same sizes
    image       16 x 16 patches, guidance 3, behind 32 and 1,024 tokens, against transfusion-pytorch of equal width and
                depth, with as many calls of the model, each branch of guidance one
    context     an image after 3,000 tokens and patches, which the engine has kept or reads now, with and without
                guidance, against reading all again at each of 25 steps
    together    eight images side by side, against one after another, of 16 and of 256 patches
    overhead    64 answers that speak: what a tick takes beside the calls of the network
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limits import find_device, record_head, write_json
from transfusion.config import Config, load_config
from transfusion.families.build import build_model
from transfusion.generate import Done, Engine, ImageSampling, Pipeline, Request
from transfusion.generate.request import segments
from transfusion.model.initialise import initialise
from transfusion.schema import SpecialToken
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

CPU = torch.device("cpu")
RESULT = Path(__file__).resolve().parent / "results" / "generate.json"
MISSED = 3
TEXT = (
    "model.layers=8",
    "model.hidden_size=384",
    "model.heads=8",
    "data.sequence_length=2048",
)
IMAGES = (
    *("model.layers=8", "model.hidden_size=256", "model.heads=8", "model.patch_size=2"),
    *("codec.channels=3", "codec.image_size=32", "diffusion.prediction=flow", "data.sequence_length=4096"),
)
WORDS, TOKENS, STEPS, CONTEXT_STEPS, ROUNDS = 300, 64, 8, 25, 5
SIZE = Size(32, 32)
# At least so many times as fast as the other.
BARS = {
    "decode, batch 1": 1.0,
    "decode, batch 8": 1.0,
    "image behind 32 tokens": 3.0,
    "image behind 1024 tokens": 12.0,
    "kept context of 3000, guidance 1": 8.0,
    "kept context of 3000, guidance 3": 8.0,
    "new context of 3000, guidance 1": 8.0,
    "new context of 3000, guidance 3": 8.0,
    "eight images of 16 patches": 2.0,
    "eight images of 256 patches": 2.0,
}
# At most this share of a tick.
OVERHEAD_BAR = 0.02


def make_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of made-up words."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("aeioumnrstl"), 6)) for _ in range(WORDS)]
    texts = [" ".join(random.choice(words, 200)) for _ in range(200)]
    return train_tokenizer(texts, folder / "tokenizer.model", vocabulary=512)


def make_pipeline(
    tokenizer: Tokenizer,
    overrides: tuple[str, ...],
    file: Path | None = None,
    device: torch.device = CPU,
) -> Pipeline:
    """A pipeline over a random network that never ends a text nor begins an image by itself."""
    config: Config = load_config(file, [*overrides, f"data.tokenizer={tokenizer.path}"])
    config = config.with_vocabulary(tokenizer.vocabulary)
    torch.manual_seed(0)
    model = build_model(config)
    initialise(model, seed=0, layers=config.model.layers)
    pipeline = Pipeline(model.eval().to(device), tokenizer, config, device)
    logits = pipeline.runner.logits

    def talkative(state_RD: Tensor) -> Tensor:
        logit_RV = logits(state_RD)
        logit_RV[:, [SpecialToken.END_DOCUMENT, SpecialToken.BEGIN_IMAGE]] = -1e9
        return logit_RV

    pipeline.runner.logits = talkative  # type: ignore[method-assign]
    return pipeline


def prompt_of(tokenizer: Tokenizer, tokens: int, seed: int = 0) -> str:
    """A text of exactly so many tokens."""
    random = np.random.default_rng(seed)
    ids = [int(token) for token in random.integers(len(SpecialToken) + 256, tokenizer.vocabulary, 2 * tokens)]
    for count in range(tokens, 2 * tokens):
        text = tokenizer.decode(ids[:count])
        if len(tokenizer.encode(text)) >= tokens:
            return tokenizer.decode(tokenizer.encode(text)[:tokens])
    raise ValueError(f"no text of {tokens} tokens")


def run(pipeline: Pipeline, requests: list[Request], batch: int, engine: Engine | None = None) -> list[Done]:
    """Answer requests, `batch` at a time, by a new engine unless given one."""
    engine = engine or pipeline.engine(most_requests=batch)
    for request in requests:
        engine.submit(request)
    done = []
    while not engine.is_idle:
        done += [event for _, event in engine.tick() if isinstance(event, Done)]
    return done


def compare(
    name: str, ours: Callable[[], object], other: Callable[[], object], rounds: int
) -> dict[str, Any]:
    """Both in turns. The ratio is how many times as long the other takes."""
    seconds: dict[str, list[float]] = {"ours": [], "other": []}
    for turn in range(rounds + 1):
        for who, call in (("ours", ours), ("other", other)):
            begin = time.process_time()
            call()
            if turn:  # the first round warms up
                seconds[who].append(time.process_time() - begin)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["other"], strict=True)]
    found = {
        "name": name,
        "ratio": statistics.median(ratios),
        "bar": BARS[name],
        **{f"{who}_seconds": statistics.median(taken) for who, taken in seconds.items()},
        "ratios": ratios,
    }
    print(
        f"{name:32} {found['ours_seconds']:8.3f} s  {found['ratio']:6.2f} times as fast (bar {BARS[name]:g})"
    )
    return found


def decode(tokenizer: Tokenizer, rounds: int) -> Iterator[dict[str, Any]]:
    """Text against transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pipeline = make_pipeline(tokenizer, TEXT)
    shape = pipeline.config.model
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    for batch in (1, 8):
        prompts = [prompt_of(tokenizer, 32, seed) for seed in range(batch)]
        requests = [Request(prompt=[prompt], max_tokens=TOKENS, max_images=0) for prompt in prompts]
        ids = torch.tensor([[1, *tokenizer.encode(prompt)] for prompt in prompts])

        def other(ids: Tensor = ids) -> None:
            made = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                cache_implementation="static",
            )
            assert made.shape[1] == ids.shape[1] + TOKENS

        def ours(requests: list[Request] = requests, batch: int = batch) -> None:
            assert sum(done.tokens for done in run(pipeline, requests, batch)) == batch * TOKENS

        yield compare(f"decode, batch {batch}", ours, other, rounds)


def drawing(prompt: list[Any], seed: int = 0, steps: int = STEPS, guidance: float = 3.0) -> Request:
    """One image behind a prompt."""
    sampling = ImageSampling(steps=steps, seed=seed, guidance=guidance)
    return Request(prompt=prompt, image=sampling, draws=True)


def image(tokenizer: Tokenizer, rounds: int) -> Iterator[dict[str, Any]]:
    """Images against transfusion-pytorch, whose Euler steps call the model as often as ours."""
    from transfusion_pytorch import Transfusion

    pipeline = make_pipeline(tokenizer, IMAGES)
    shape = pipeline.config.model
    torch.manual_seed(0)
    theirs = Transfusion(
        num_text_tokens=tokenizer.vocabulary,
        dim_latent=12,
        modality_default_shape=(16, 16),
        transformer={
            "dim": shape.hidden_size,
            "depth": shape.layers,
            "heads": shape.heads,
            "dim_head": shape.head_dim,
        },
        odeint_kwargs={"method": "euler"},
    ).eval()
    for tokens in (32, 1024):
        prompt = prompt_of(tokenizer, tokens)
        ids = torch.tensor(tokenizer.encode(prompt))
        request = drawing([prompt])

        def other(ids: Tensor = ids) -> None:
            made = theirs.sample_one(
                prompt=ids,
                max_length=1,
                modality_steps=STEPS + 1,
                cfg_scale=3.0,
                force_modality_at_start=(0, (16, 16)),
                fixed_modality_shape=(16, 16),
                cache_kv=True,
            )
            assert any(isinstance(part, tuple) for part in made)

        def ours(request: Request = request) -> None:
            assert run(pipeline, [request], 1)[0].images == 1

        with silent():
            yield compare(f"image behind {tokens} tokens", ours, other, rounds)


def context(tokenizer: Tokenizer, rounds: int) -> Iterator[dict[str, Any]]:
    """An image after a long mixed context, against reading all of it again at each step."""
    pipeline = make_pipeline(tokenizer, IMAGES)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8))
    parts: list[Any] = []
    for number in range(8):
        parts += [prompt_of(tokenizer, 117, number), pixels]
    runner = pipeline.runner
    drawn = torch.zeros(3, 32, 32, dtype=torch.uint8)
    layout = runner.lay_out([*segments(parts, runner, tokenizer), runner.image(SIZE)], finished=False)
    bare = runner.lay_out([runner.image(SIZE)], finished=False)
    for guidance in (1.0, 3.0):
        request = drawing(parts, steps=CONTEXT_STEPS, guidance=guidance)
        documents = [(layout, [pixels] * 8), *([] if guidance == 1 else [(bare, [])])]

        def again(documents: list[Any] = documents) -> None:
            with torch.no_grad():
                for _ in range(CONTEXT_STEPS):
                    for document, images in documents:
                        cache = runner.cache(-(-len(document) // 16))
                        block = runner.prompt_block([(document, 0, len(document) - 1)], [*images, drawn])
                        runner.read(cache.view([cache.row(len(document))]), block)

        keeps = pipeline.engine(most_requests=1, pages=1024)

        for which, engine in (("kept", keeps), ("new", None)):

            def ours(request: Request = request, engine: Engine | None = engine) -> None:
                assert run(pipeline, [request], 1, engine)[0].prompt_positions > 2990

            yield compare(f"{which} context of 3000, guidance {guidance:g}", ours, again, rounds)


def together(tokenizer: Tokenizer, rounds: int) -> Iterator[dict[str, Any]]:
    """Eight images side by side, against one after another."""
    requests = [drawing([prompt_of(tokenizer, 32, seed)], seed) for seed in range(8)]
    for side in (8, 32):
        pipeline = make_pipeline(tokenizer, (*IMAGES, f"codec.image_size={side}"))

        def all_at_once(pipeline: Pipeline = pipeline) -> None:
            assert len(run(pipeline, requests, 8)) == 8

        def in_turn(pipeline: Pipeline = pipeline) -> None:
            assert len(run(pipeline, requests, 1)) == 8

        yield compare(f"eight images of {(side // 2) ** 2} patches", all_at_once, in_turn, rounds)


def overhead(tokenizer: Tokenizer, rounds: int) -> Iterator[dict[str, Any]]:
    """What a tick of 64 answers that speak takes beside reading and logits."""
    pipeline = make_pipeline(tokenizer, TEXT)
    inside = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            nonlocal inside
            begin = time.process_time()
            try:
                return call(*arguments)
            finally:
                inside += time.process_time() - begin

        return measured

    runner = pipeline.runner
    runner.read, runner.logits = timed(runner.read), timed(runner.logits)  # type: ignore[method-assign]
    engine = pipeline.engine(most_requests=64)
    ticks = 10 * rounds
    for seed in range(64):
        prompt = [prompt_of(tokenizer, 32, seed)]
        engine.submit(Request(prompt=prompt, max_tokens=ticks + 10, max_images=0))
    for _ in range(5):
        engine.tick()
    inside, begin = 0.0, time.process_time()
    for _ in range(ticks):
        engine.tick()
    whole = time.process_time() - begin
    found = {
        "name": "overhead of a tick of 64 answers",
        "share": 1 - inside / whole,
        "bar": OVERHEAD_BAR,
        "tick_seconds": whole / ticks,
    }
    print(f"{found['name']:32} {found['tick_seconds']:8.3f} s  {found['share']:.1%} (bar {OVERHEAD_BAR:.0%})")
    yield found


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the other's progress bars, which cost it time."""
    from transfusion_pytorch import transfusion as theirs

    bar = theirs.tqdm
    theirs.tqdm = lambda *arguments, **named: bar(*arguments, **named | {"disable": True})
    try:
        yield
    finally:
        theirs.tqdm = bar


PARTS = {"decode": decode, "image": image, "context": context, "together": together, "overhead": overhead}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="of each comparison, after one that warms up"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    record = record_head(find_device("cpu")) | {"rounds": given.rounds, "results": results}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
        for part in given.only:
            results += PARTS[part](tokenizer, given.rounds)
            write_json(record, given.out)
    missed = [found["name"] for found in results if _misses(found)]
    for name in missed:
        print(f"{name}: misses its bar")
    return MISSED if missed else 0


def _misses(found: dict[str, Any]) -> bool:
    if "ratio" in found:
        return bool(found["ratio"] < found["bar"])
    return bool(found["share"] > found["bar"])


if __name__ == "__main__":
    sys.exit(main())
