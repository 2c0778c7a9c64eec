"""Images for two published benchmarks of prompts, whose files the user brings: GenEval and GenEval 2.

GenEval's images are left as its own scorer reads them (Ghosh et al., 2023). Those of GenEval 2 are judged here by
Soft-TIFA, which asks a model that answers questions about images (Kamath et al., 2025).

Q questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from transfusion import __version__
from transfusion.errors import UserError
from transfusion.evaluate.chunks import Arrays, Chunks
from transfusion.evaluate.features.published import Ask, folder_digest, open_questions
from transfusion.evaluate.features.weights import hub_folder
from transfusion.evaluate.metrics.bootstrap import mean_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines, say
from transfusion.evaluate.suites.evidence import Drawing
from transfusion.evaluate.suites.settings import Geneval2Suite, GenevalSuite, PromptsSuite
from transfusion.files import atomic_write_text, digest, remove_leftover
from transfusion.generate.pillow_images import to_image
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.parallel.environment import own_place

NUMERALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
YES = ("Yes", "yes", " yes", " Yes")
HOW_MANY = "How many"


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The lines of a benchmark's file. digest: of the file's bytes."""

    path: Path
    lines: list[dict[str, Any]]
    digest: str

    @property
    def texts(self) -> list[str]:
        return [line["prompt"] for line in self.lines]


def geneval(pipeline: Pipeline, out: Path, settings: GenevalSuite) -> dict[str, Metric]:
    """Draw the images of GenEval in its layout; its scorer measures them. Returns no figure.

    Under a launcher every process draws its prompts. Leaves OUT/evaluation/geneval, where another call goes on. Raises
    UserError for a file that is none of GenEval's.
    """
    prompts = _read(settings, "geneval", "evaluation_metadata.jsonl", ("tag", "prompt"))
    chunks = _chunks(pipeline, out, settings, "geneval", prompts, {})

    def draw(items: range) -> Arrays:
        for item, samples in _drawn(pipeline, settings, prompts, items):
            folder = chunks.folder / f"{item:05d}"
            _save(samples, folder / "samples")
            atomic_write_text(folder / "metadata.jsonl", json.dumps(prompts.lines[item]) + "\n")
        return {"items": np.arange(items.start, items.stop)}

    chunks.fill("drawn", len(prompts.lines), draw, items_are="prompts")
    if not own_place().rank:
        chunks.join("drawn", len(prompts.lines))
        chunks.keep_only()
        # From another folder, where the scorer is started.
        folder = chunks.folder.resolve()
        say(
            f"{folder}: {settings.count} images of each of {len(prompts.lines)} prompts; score them in the"
            f" container of GenEval: `python evaluation/evaluate_images.py {folder} --outfile results.jsonl`"
        )
    return {}


def geneval2(pipeline: Pipeline, out: Path, settings: Geneval2Suite) -> dict[str, Metric]:
    """Soft-TIFA of the prompts of GenEval 2: of atoms (AM), of prompts (GM), and by skill, all out of 100.

    Under a launcher every process draws and asks about its prompts, and all but the first return no metrics. Leaves
    OUT/evaluation/geneval2, where another call goes on. Raises UserError for a file that is none of GenEval 2, and for
    a model that answers no questions.
    """
    prompts = _read(settings, "geneval2", "geneval2_data.jsonl", ("prompt", "vqa_list", "skills"))
    if not settings.vqa:
        raise UserError(
            "the suite geneval2 needs geneval2.vqa=FOLDER, a model of transformers that answers questions about images;"
            " the paper's figures are those of Qwen/Qwen3-VL-8B-Instruct"
        )
    folder = hub_folder(settings.vqa, download=settings.download)
    chunks = _chunks(pipeline, out, settings, "geneval2", prompts, {"vqa": folder_digest(folder)})
    opened: list[Ask] = []

    def judge(items: range) -> Arrays:
        if not opened:
            opened.append(open_questions(folder, torch.device(pipeline.runner.device)))
        probabilities: list[float] = []
        places: list[tuple[int, int]] = []
        for item, samples in _drawn(pipeline, settings, prompts, items):
            _save(samples, chunks.folder / "images" / f"{item:05d}")
            for sample in samples:
                for number, (question, answer) in enumerate(prompts.lines[item]["vqa_list"]):
                    probabilities.append(
                        opened[0](
                            to_image(sample.pixels).convert("RGB"),
                            f"{question} Answer in one word.",
                            answers_of(question, answer),
                        )
                    )
                    places.append((item, number))
        return {"probability_Q": np.array(probabilities), "place_Q2": np.array(places).reshape(-1, 2)}

    chunks.fill("judged", len(prompts.lines), judge, items_are="prompts")
    if own_place().rank:
        return {}
    found = chunks.join("judged", len(prompts.lines))
    chunks.keep_only()
    paths = {
        text: str(chunks.folder.resolve() / "images" / f"{item:05d}" / "0000.png")
        for item, text in enumerate(prompts.texts)
    }
    # As the benchmark's own script takes them.
    atomic_write_text(chunks.folder / "images.json", json.dumps(paths, indent=1) + "\n")
    how = f"Soft-TIFA of {Path(settings.vqa).name}, {settings.count} image(s) of each of the {len(prompts.lines)}"
    how += f" prompts of {prompts.path.name} ({Drawing.of(settings, pipeline)})"
    return soft_tifa(
        found["probability_Q"], found["place_Q2"], [line["skills"] for line in prompts.lines], how
    )


def answers_of(question: str, answer: str) -> list[str]:
    """The spellings whose first tokens count as the right answer, as in the benchmark's script."""
    if not question.startswith(HOW_MANY):
        return list(YES)
    numeral = str(NUMERALS.index(answer) + 1) if answer in NUMERALS else "other"
    return [before + word for word in (answer, answer.capitalize(), numeral) for before in ("", " ")]


def soft_tifa(
    probability_Q: np.ndarray, place_Q2: np.ndarray, skills: Sequence[Sequence[str]], how: str
) -> dict[str, Metric]:
    """The figures of judged questions. place: of each question its prompt, and its number there.

    AM is the mean over prompts of the mean of their probabilities, GM that of their geometric mean. A skill's figure is
    the mean over all its questions.
    """
    by_prompt: dict[int, list[float]] = {}
    by_skill: dict[str, list[float]] = {}
    for probability, (prompt, number) in zip(probability_Q.tolist(), place_Q2.tolist(), strict=True):
        by_prompt.setdefault(prompt, []).append(probability)
        by_skill.setdefault(skills[prompt][number], []).append(probability)
    scores = {
        "geneval2_am": ([fmean(each) for each in by_prompt.values()], "arithmetic mean a prompt"),
        "geneval2_gm": ([_geometric_mean(each) for each in by_prompt.values()], "geometric mean a prompt"),
        **{
            f"geneval2_{skill}": (each, f"mean over the questions of {skill}")
            for skill, each in sorted(by_skill.items())
        },
    }
    return {
        name: Metric(
            value=100 * fmean(values),
            count=len(values),
            interval=mean_interval([100 * value for value in values]),
            unit="of 100",
            how=f"{how}: {which}",
        )
        for name, (values, which) in scores.items()
    }


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values)) if min(values) > 0 else 0.0


def _read(settings: PromptsSuite, name: str, file: str, keys: Sequence[str]) -> _Prompts:
    """Raises UserError for a file that is missing or holds other lines."""
    remedy = f"{name}.prompts is {file} of a clone of that benchmark"
    if not settings.prompts:
        raise UserError(
            f"the suite {name} needs {name}.prompts=FILE; {remedy}, whose licence lets nobody ship it"
        )
    path = Path(settings.prompts)
    try:
        content = path.read_bytes()
        lines = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            if lacking := [key for key in keys if key not in line]:
                raise ValueError(f"line {number} has no {lacking[0]!r}")
            if len(line.get("vqa_list", [])) != len(line.get("skills", [])):
                raise ValueError(f"line {number} has not one skill for each question")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    if not lines:
        raise UserError(f"{path} is empty; {remedy}")
    return _Prompts(path, lines[: settings.limit or None], digest(content))


def _chunks(
    pipeline: Pipeline, out: Path, settings: PromptsSuite, name: str, prompts: _Prompts, more: dict[str, Any]
) -> Chunks:
    place = own_place()
    made_of = {
        "release": __version__,
        "model": astuple(pipeline.origin),
        "prompts": prompts.digest,
        "limit": settings.limit,
        "drawing": Drawing.of(settings, pipeline)._asdict(),
        "count": settings.count,
        "batch": settings.batch,
        **more,
    }
    return Chunks(
        out / "evaluation" / name, made_of, size=settings.chunk, rank=place.rank, ranks=place.world_size
    )


def _drawn(
    pipeline: Pipeline, settings: PromptsSuite, prompts: _Prompts, items: range
) -> list[tuple[int, list[SampledImage]]]:
    """The images of some prompts. Image k of prompt n has the seed `seed + n * count + k`."""
    drawing, count = Drawing.of(settings, pipeline), settings.count
    samples = pipeline.sample(
        [prompts.texts[item] for item in items],
        per_prompt=count,
        guidance=drawing.guidance,
        steps=drawing.steps,
        sampler=drawing.sampler,
        seed=drawing.seed + items.start * count,
        batch=settings.batch,
        on_call=ProgressLines(f"drawing {len(items) * count} images"),
    )
    return [(item, samples[place * count : (place + 1) * count]) for place, item in enumerate(items)]


def _save(samples: Sequence[SampledImage], folder: Path) -> None:
    remove_leftover(folder)
    folder.mkdir(parents=True)
    for number, sample in enumerate(samples):
        to_image(sample.pixels).save(folder / f"{number:04d}.png")
