"""The engine under a mixed load: nobody waits for long, memory stays as it is, and answers do not depend on company.

    .venv/bin/python campaigns/mixed_load.py [--ticks 10000] [--seed 0] [--out FILE]

One engine over a tiny random network, on one thread. 16 requests for text and 8 for an image arrive at random ticks,
again and again. Some prompts begin alike, some are equal, some hold images, some are long and read in pieces. Some of
the text may begin images, some images are guided. One in eight is cancelled at a random tick, unless it has ended. The
cache has too few pages for all of them, so some wait to be let in.

Waiting is counted in ticks, from the events that a user gets. Every request asks for a preview of each step, so each
token and each step of an image is seen. Tick 1 of a request is the one that lets it in. By tick 3 its first token or
step is there, if its prompt fits: what is not yet read of it is at most `prompt_positions`. A longer prompt may take
three ticks beyond its pieces and those of the prompts before it, since longer ones are read in their order.

Every 500 ticks the load pauses until the engine is idle. Then memory is measured, and a seeded sample of the answers
is compared with those of the same requests alone in an engine of their own. Exits with 1 when a bar is missed.
`tests/unit/benchmarks/test_mixed_load.py` holds a sample.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from limits import record_head, write_json
from transfusion.config import load_config
from transfusion.config.objectives import SAMPLERS
from transfusion.families.build import build_model
from transfusion.generate import (
    Done,
    Engine,
    Event,
    ImageDone,
    ImagePreview,
    ImageSampling,
    ImageStart,
    Pipeline,
    Request,
    TextDelta,
    TextSampling,
)
from transfusion.inference.cache import PagedCache
from transfusion.inference.runner import ModelRunner
from transfusion.model.initialise import initialise
from transfusion.schema import SpecialToken
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "mixed-load.json"
MISSED = 1
MODEL = (
    *(
        "model.layers=2",
        "model.hidden_size=32",
        "model.heads=4",
        "model.num_kv_heads=2",
        "model.patch_size=2",
    ),
    *("codec.channels=1", "codec.image_size=8", "codec.image_sizes=[8x8, 4x12]", "data.sequence_length=384"),
)
# Letters with a piece of their own, so that every token is told at once and a text and its ids tell the same.
LETTERS = "adeghiknorstvw"
WORDS = (
    "one",
    "seven",
    "thread",
    "drew",
    "hint",
    "again",
    "kind",
    "north",
    "stone",
    "wave",
    "dot",
    "history",
)
# Of one wave, and over how many ticks it arrives. The next comes when so few of all are left.
TEXTS, IMAGES, WAVE_TICKS, LEFT = 16, 8, 24, 8
PAGES, PROMPT_POSITIONS = 72, 64
PAUSE_TICKS = 500
# The share of the requests that are cancelled, and of the answers that are compared.
CANCELLED, COMPARED = 1 / 8, 1 / 40
# No token and no step of an image may come later than so many ticks after the one before.
WAIT_BAR = 2
# Up to this tick, the one that lets a request in being the first, its first token or step is there.
FIRST_BAR = 3
FIRST_THAT_FIT = "tick of the first step, its prompt fits"
# Of the resident memory. A leak of one page of 16 positions a request would be nine times as much.
GROWTH_BAR_MIB = 4.0
# Of the blocks that Python's objects take. A leak of one a request would be three times as many.
BLOCKS_BAR = 3000


@dataclass(slots=True)
class Life:
    """What became of a request.

    Attributes:
        submitted: The tick before which it came.
        leaves: The tick before which it is cancelled, if it is.
        compared: Whether its answer is compared.
        admitted: The tick that let it in.
        line: What was to be read then.
        last: The tick of its last step.
        draws: Whether an image is under way.
        events: All of them, of those that are compared.
    """

    request: Request
    submitted: int
    leaves: int | None
    compared: bool
    admitted: int | None = None
    line: Line | None = None
    last: int | None = None
    draws: bool = False
    events: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class Figures:
    """What was found. Waits are maxima, in ticks.

    Attributes:
        token_wait: From one token of an answer to the next, or to an image.
        step_wait: From one step of an image to the next, or to what follows it.
        first_that_fit: Until the first token or step, of prompts that fit.
        first_alone: The same where all that was to be read before it fits too.
        first_less_pieces: Until the first token or step of any prompt, less the pieces that were to be read up to it.
        firsts: How many prompts that fit had their first token or step in which tick.
        admission: Until a request is let in.
        had_to_wait: Requests that were not let in by the tick after they came.
        miscounted: Ticks in which the steps of images were not as many as their events.
        calls_not_told: Calls of the model for images that `on_image_call` was not told of.
        counts: Requests, images, and how answers ended.
        ticks: Taken, with those of the pauses.
        measured: The tick of each pause.
        memory: Resident MiB at each pause.
        blocks: Memory blocks of Python at each pause.
        pages_lost: At any pause, pages that are neither free nor of a kept prompt.
        compared: Answers.
        differing: Of them, those that are other texts, or images by more than one level of 255.
    """

    token_wait: int = 0
    step_wait: int = 0
    first_that_fit: int = 0
    first_alone: int = 0
    first_less_pieces: int = 0
    firsts: Counter[int] = field(default_factory=Counter)
    admission: int = 0
    had_to_wait: int = 0
    miscounted: int = 0
    calls_not_told: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ticks: int = 0
    measured: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    pages_lost: int = 0
    compared: int = 0
    differing: int = 0


class Bar(NamedTuple):
    """A figure, and what it may be at most. `least`: at least."""

    name: str
    figure: float
    limit: float
    least: bool = False

    @property
    def is_missed(self) -> bool:
        return self.figure < self.limit if self.least else self.figure > self.limit

    def __str__(self) -> str:
        verdict = "MISSED" if self.is_missed else "ok"
        return f"{verdict:7}{self.name}: {self.figure:g} ({'least' if self.least else 'most'} {self.limit:g})"


def make_pipeline(folder: Path) -> Pipeline:
    """A pipeline over a random network that says letters, begins images and ends texts."""
    tokenizer = train_tokenizer([" ".join(WORDS), LETTERS] * 20, folder / "tokenizer.model", vocabulary=300)
    config = load_config(None, [*MODEL, f"data.tokenizer={tokenizer.path}"])
    config = config.with_vocabulary(tokenizer.vocabulary)
    model = build_model(config)
    initialise(model, seed=0, layers=config.model.layers)
    # As initialised, the decoder answers zero and norms and biases do nothing.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    pipeline = Pipeline(model.eval(), tokenizer, config, "cpu")
    _lean(pipeline.runner, tokenizer)
    return pipeline


def _lean(runner: ModelRunner, tokenizer: Tokenizer) -> None:
    """Let the logits lean towards letters, with an end or an image now and then."""
    logits = runner.logits
    bias_V = torch.full((runner.model.config.vocabulary,), -50.0)
    bias_V[[tokenizer.encode(letter)[0] for letter in LETTERS]] = 0.0
    bias_V[list(runner.sizes.size_by_begin_token)] = 0.5
    bias_V[SpecialToken.END_DOCUMENT] = -0.5

    def leaning(state_RD: Tensor) -> Tensor:
        return 3.0 * logits(state_RD) + bias_V

    runner.logits = leaning  # type: ignore[method-assign]


class Load:
    """Requests at random, the same for the same seed."""

    def __init__(self, pipeline: Pipeline, draw: random.Random) -> None:
        self.draw = draw
        self.sizes = pipeline.runner.sizes.sizes
        self.samplers = SAMPLERS[pipeline.config.diffusion.prediction]
        self.beginnings = [[self._words(12), *self._images(2), self._words(6)] for _ in range(4)]
        self.captions = [self._words(3) for _ in range(6)]

    def wave(self) -> list[Request]:
        """Of text and of images."""
        requests = [self._text() for _ in range(TEXTS)] + [self._image() for _ in range(IMAGES)]
        self.draw.shuffle(requests)
        return requests

    def _text(self) -> Request:
        images = self.draw.choice((0, 0, 0, 1, 2))
        return Request(
            prompt=self._prompt(),
            text=TextSampling(
                temperature=self.draw.choice((0.0, 1.0)),
                top_p=self.draw.choice((1.0, 0.8)),
                seed=self.draw.getrandbits(30),
            ),
            image=self._drawing(),
            max_tokens=self.draw.randint(1, 40),
            max_images=images,
            preview_every=1,
        )

    def _image(self) -> Request:
        image = replace(self._drawing(), size=self.draw.choice(list(self.sizes)))
        caption = self.draw.choice(self.captions) if self.draw.random() < 0.3 else self._words(4)
        return Request(prompt=[caption], image=image, draws=True, preview_every=1)

    def _prompt(self) -> list[str | Tensor]:
        kind = self.draw.random()
        if kind < 0.1:
            return [self.draw.choice(self.captions)]
        if kind < 0.4:
            return [*self.draw.choice(self.beginnings), self._words(self.draw.randint(0, 4))]
        if kind < 0.5:
            return [self._words(self.draw.randint(15, 40)), *self._images(3), self._words(10)]
        return [*self._images(self.draw.choice((0, 0, 1))), self._words(self.draw.randint(1, 5))]

    def _drawing(self) -> ImageSampling:
        guided = self.draw.random() < 0.5
        return ImageSampling(
            guidance=3.0 if guided else 1.0,
            guidance_interval=self.draw.choice(((0.0, 1.0), (0.2, 0.8))) if guided else (0.0, 1.0),
            negative_prompt=self._words(2) if guided and self.draw.random() < 0.3 else "",
            steps=self.draw.randint(1, 8),
            sampler=self.draw.choice(self.samplers),
            seed=self.draw.getrandbits(30),
        )

    def _words(self, count: int) -> str:
        return " ".join(self.draw.choices(WORDS, k=count))

    def _images(self, count: int) -> list[str | Tensor]:
        sizes = self.draw.choices(list(self.sizes), k=count)
        pixels = [list(self.draw.randbytes(size.height * size.width)) for size in sizes]
        return [
            torch.tensor(each, dtype=torch.uint8).view(1, *size.sides)
            for each, size in zip(pixels, sizes, strict=True)
        ]


class Line(NamedTuple):
    """Positions that were to be read when a request was let in: its own, and with all before them."""

    own: int
    total: int


class WatchedEngine(Engine):
    """An engine that notes what it lets in. Nothing else tells when a request stops waiting for pages."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.let_in: dict[int, Line] = {}

    def _begin(self, task: Any) -> None:
        super()._begin(task)
        left = [each.prompt.count - each.prompt.row.length for each in self._tasks if not each.is_read]
        self.let_in[task.number] = Line(0 if task.is_read else left[-1], sum(left))


class Campaign:
    """One engine, its load, and what is seen of it from outside."""

    def __init__(self, pipeline: Pipeline, seed: int, *, pages: int = PAGES) -> None:
        self.pipeline, self.pages = pipeline, pages
        self.draw = random.Random(seed)
        self.load = Load(pipeline, random.Random(seed + 1))
        self.figures = Figures()
        self.calls_told = self.calls_made = self.steps_made = 0
        family = replace(pipeline.family, advance=self._advance)
        self.engine = WatchedEngine(
            pipeline.runner,
            pipeline.tokenizer,
            pipeline.config,
            family,
            pages=pages,
            prompt_positions=PROMPT_POSITIONS,
            on_image_call=self._told,
        )
        self.tick = 0
        self.lives: dict[int, Life] = {}
        self.arrivals: list[tuple[int, Request]] = []
        self.to_compare: list[Life] = []

    def _advance(self, runner: ModelRunner, cache: PagedCache, drawings: Sequence[Any]) -> None:
        self.calls_made += 1
        self.steps_made += len(drawings)
        self.pipeline.family.advance(runner, cache, drawings)

    def _told(self) -> None:
        self.calls_told += 1

    def run(self, ticks: int, pause_ticks: int = PAUSE_TICKS) -> Figures:
        """Take so many ticks, and those until the last requests have ended."""
        pause, enough = pause_ticks, 3 * ticks + 1000
        while self.tick < ticks or not self._is_empty:
            if self.tick > enough:
                raise RuntimeError(f"after {self.tick} ticks {len(self.lives)} requests have not ended")
            if self.tick < min(pause, ticks):
                self._arrive()
            elif self._is_empty:
                self._measure()
                pause = self.tick + pause_ticks
                self._arrive()
            self._let_in()
            self._step()
        self._measure()
        self.figures.ticks = self.tick
        return self.figures

    @property
    def _is_empty(self) -> bool:
        return self.engine.is_idle and not self.arrivals

    def _arrive(self) -> None:
        """Plan the next wave, when few are left of those before."""
        if not self.arrivals and len(self.lives) <= LEFT:
            wave = self.load.wave()
            self.arrivals = [(self.tick + self.draw.randrange(WAVE_TICKS), request) for request in wave]

    def _let_in(self) -> None:
        """Submit what arrives before this tick, and cancel what leaves."""
        for arrival in [each for each in self.arrivals if each[0] <= self.tick]:
            self.arrivals.remove(arrival)
            leaves = self.tick + self.draw.randrange(20) if self.draw.random() < CANCELLED else None
            number = self.engine.submit(arrival[1])
            compared = leaves is None and self.draw.random() < COMPARED
            self.lives[number] = Life(arrival[1], self.tick, leaves, compared)
            self.figures.counts["requests"] += 1
        for number, life in self.lives.items():
            if life.leaves == self.tick:
                self.engine.cancel(number)

    def _step(self) -> None:
        """One tick, and what it shows."""
        figures, lives = self.figures, self.lives
        steps = self.steps_made
        told: dict[int, list[Event]] = {}
        for number, event in self.engine.tick():
            told.setdefault(number, []).append(event)
        for number, life in lives.items():
            if life.admitted is None and number in self.engine.let_in:
                life.admitted, life.line = self.tick, self.engine.let_in.pop(number)
                figures.admission = max(figures.admission, self.tick - life.submitted + 1)
                figures.had_to_wait += self.tick > life.submitted
        drawn = (ImageStart, ImagePreview, ImageDone)
        seen = sum(any(isinstance(event, drawn) for event in events) for events in told.values())
        figures.miscounted += seen != self.steps_made - steps
        figures.calls_not_told = abs(self.calls_made - self.calls_told)
        for number in list(lives):
            self._follow(lives[number], told.get(number, []))
            for event in told.get(number, []):
                figures.counts["images"] += isinstance(event, ImageDone)
                if isinstance(event, Done):
                    figures.counts["tokens"] += event.tokens
                    figures.counts[f"ended by {event.reason}"] += 1
                    self._finish(lives.pop(number))
        self.tick += 1

    def _follow(self, life: Life, events: Sequence[Event]) -> None:
        """Count how long a request that was let in has been waiting for this tick's step."""
        figures = self.figures
        if life.admitted is None or life.line is None or _is_cancelled(events):
            return
        if life.last is None:
            self._wait_for_first(self.tick - life.admitted + 1, life.line, told=bool(events))
        elif life.draws:
            figures.step_wait = max(figures.step_wait, self.tick - life.last)
        else:
            figures.token_wait = max(figures.token_wait, self.tick - life.last)
        if events:
            life.last = self.tick
        for event in events:
            if isinstance(event, ImageStart | ImageDone):
                life.draws = isinstance(event, ImageStart)
            if life.compared:
                life.events.append(event)

    def _wait_for_first(self, waited: int, line: Line, *, told: bool) -> None:
        """Count in which tick the first token or step is told, or how long it has not been."""
        figures = self.figures
        if line.total <= PROMPT_POSITIONS:
            figures.first_alone = max(figures.first_alone, waited)
        if line.own <= PROMPT_POSITIONS:
            figures.first_that_fit = max(figures.first_that_fit, waited)
            figures.firsts[waited] += told
        pieces = -(-line.total // PROMPT_POSITIONS)
        figures.first_less_pieces = max(figures.first_less_pieces, waited - pieces)

    def _finish(self, life: Life) -> None:
        if life.compared:
            self.to_compare.append(life)

    def _measure(self) -> None:
        """Memory while nothing is under way, and the answers that are to be compared."""
        figures, engine = self.figures, self.engine
        for life in self.to_compare:
            figures.compared += 1
            figures.differing += not is_same(life.events, self._alone(life.request))
        self.to_compare = []
        kept = {page for prompt in engine._kept for page in prompt.row.pages}
        figures.pages_lost = max(figures.pages_lost, abs(self.pages - engine.cache.free_pages - len(kept)))
        gc.collect()
        figures.measured.append(self.tick)
        figures.blocks.append(sys.getallocatedblocks())
        figures.memory.append(resident_mib())

    def _alone(self, request: Request) -> list[Event]:
        pipeline = self.pipeline
        engine = pipeline.engine()
        engine.submit(request)
        events: list[Event] = []
        while not engine.is_idle:
            events += [event for _, event in engine.tick()]
        return events


def _is_cancelled(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Done) and event.reason == "cancelled" for event in events)


def is_same(mine: Sequence[Event], theirs: Sequence[Event]) -> bool:
    """Whether two answers say the same, and draw the same within one level of 255."""
    (text, images), (other_text, other_images) = _answer(mine), _answer(theirs)
    if text != other_text or len(images) != len(other_images) or mine[-1] != theirs[-1]:
        return False
    pairs = zip(images, other_images, strict=True)
    return all(a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1 for a, b in pairs)


def _answer(events: Sequence[Event]) -> tuple[str, list[Tensor]]:
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, [event.pixels for event in events if isinstance(event, ImageDone)]


def resident_mib() -> float:
    """Memory of this process that is in use."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def bars(figures: Figures, ticks: int) -> list[Bar]:
    """What a run of so many ticks must show. Memory counts from a tenth of them on."""
    warm = next((n for n, tick in enumerate(figures.measured) if tick >= ticks / 10), 0)
    memory, blocks = figures.memory[warm:], figures.blocks[warm:]
    return [
        Bar("ticks from a token to the next step", figures.token_wait, WAIT_BAR),
        Bar("ticks from a step of an image to the next step", figures.step_wait, WAIT_BAR),
        Bar("tick of the first step, all that is read up to it fits", figures.first_alone, FIRST_BAR),
        Bar(FIRST_THAT_FIT, figures.first_that_fit, FIRST_BAR),
        Bar("tick of the first step, less the pieces up to it", figures.first_less_pieces, FIRST_BAR),
        Bar("requests that waited for pages", figures.had_to_wait, 1, least=True),
        Bar("ticks whose image steps are not their events", figures.miscounted, 0),
        Bar("image calls that were not told", figures.calls_not_told, 0),
        Bar("growth of memory, MiB", round(max(memory) - memory[0], 2), GROWTH_BAR_MIB),
        Bar("growth of Python's blocks", max(blocks) - blocks[0], BLOCKS_BAR),
        Bar("pages neither free nor kept", figures.pages_lost, 0),
        Bar("answers compared", figures.compared, 1, least=True),
        Bar("answers that differ from the same alone", figures.differing, 0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ticks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    # On one thread, since waiting ones would count as working.
    torch.set_num_threads(1)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        figures = Campaign(make_pipeline(Path(folder)), options.seed).run(options.ticks)
    seconds = time.process_time() - begin
    judged = bars(figures, options.ticks)
    missed = [str(bar) for bar in judged if bar.is_missed]
    record = record_head(torch.device("cpu")) | {
        "ticks": options.ticks,
        "seed": options.seed,
        "load": {
            "texts": TEXTS,
            "images": IMAGES,
            "pages": PAGES,
            "prompt_positions": PROMPT_POSITIONS,
            "model": MODEL,
        },
        "seconds": round(seconds, 1),
        "bars": [bar._asdict() for bar in judged],
        "figures": {each.name: getattr(figures, each.name) for each in fields(figures)}
        | {"firsts": dict(sorted(figures.firsts.items()))},
        "missed": missed,
    }
    write_json(record, options.out)
    print("\n".join(map(str, judged)))
    counts = ", ".join(f"{name} {count}" for name, count in figures.counts.items())
    print(
        f"{figures.ticks} ticks in {seconds:.0f} s of one core, at most {figures.admission} ticks to be let in"
    )
    print(counts)
    return MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
