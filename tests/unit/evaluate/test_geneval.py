"""Prompts of GenEval and GenEval 2: the layout of their images, Soft-TIFA, what a killed run keeps, wrong files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transfusion.errors import UserError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites import geneval
from transfusion.evaluate.suites.geneval import answers_of
from transfusion.evaluate.suites.run import run_suites

Evaluate = Callable[..., dict[str, Metric]]
AsRank = Callable[[int, int], AbstractContextManager[None]]
TAGGED = [
    {"tag": "single_object", "include": [], "prompt": f"the digit {word}"} for word in ("one", "two", "six")
]
ASKED: list[dict[str, Any]] = [
    {
        "prompt": f"{number} red digits",
        "atom_count": 3,
        "vqa_list": [["How many digits are in the image?", number], ["Are the digits red?", "Yes"]],
        "skills": ["count", "attribute"],
    }
    for number in ("two", "six", "nine")
]


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def evaluate(folder: Path, as_rank: AsRank) -> Evaluate:
    """evaluate(suite, out, overrides..., rank=, ranks=) -> metrics of the suite in few steps."""

    def run(suite: str, out: Path, *overrides: str, rank: int = 0, ranks: int = 1) -> dict[str, Metric]:
        with as_rank(rank, ranks):
            asked = [f"{suite}.{each}" for each in ("steps=2", "chunk=1", *overrides)]
            return run_suites(folder, [suite], out, overrides=asked, device="cpu")

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Questions and spellings that the stand-in for a model was asked; it gives 0.81 to numbers and 0.25 to others."""
    seen: list[tuple[str, tuple[str, ...]]] = []

    def ask(image: Image.Image, question: str, spellings: Sequence[str]) -> float:
        assert image.mode == "RGB"
        seen.append((question, tuple(spellings)))
        return 0.81 if question.startswith("How many") else 0.25

    monkeypatch.setattr(geneval, "open_questions", lambda *_: ask)
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "config.json").write_text("{}")
    return seen


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("**/*.png")}


def test_images_lie_as_the_scorer_of_geneval_reads_them(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = f"prompts={write(tmp_path / 'evaluation_metadata.jsonl', TAGGED)}"
    assert evaluate("geneval", tmp_path / "out", prompts, "count=2") == {}
    [folder] = (tmp_path / "out" / "evaluation" / "geneval").iterdir()
    assert f"evaluate_images.py {folder}" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    evaluate("geneval", Path("out"), prompts, "count=2")
    assert f"evaluate_images.py {folder}" in capsys.readouterr().err, "for another working directory"
    # What evaluate_images.py does: folders whose names are digits, the first object of one file, all files of another.
    found = {path.name: path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()}
    assert sorted(found) == ["00000", "00001", "00002"]
    for number, line in enumerate(TAGGED):
        here = found[f"{number:05d}"]
        assert json.loads((here / "metadata.jsonl").read_text()) == line
        assert sorted(path.name for path in (here / "samples").iterdir()) == ["0000.png", "0001.png"]
    assert len(set(pictures(folder).values())) == 6, "each has a seed of its own"
    # Two processes draw the same images, and so does a run that goes on.
    for rank in (1, 0):
        evaluate("geneval", tmp_path / "two", prompts, "count=2", rank=rank, ranks=2)
    [two] = (tmp_path / "two" / "evaluation" / "geneval").iterdir()
    assert pictures(two) == pictures(folder)
    for path in folder.glob("drawn-00001.npz"):
        path.unlink()
    kept = (folder / "00000" / "samples" / "0000.png").stat().st_mtime_ns
    before = pictures(folder)
    evaluate("geneval", tmp_path / "out", prompts, "count=2")
    assert pictures(folder) == before
    assert (folder / "00000" / "samples" / "0000.png").stat().st_mtime_ns == kept


def test_soft_tifa_is_the_mean_of_each_prompts_probabilities(
    evaluate: Evaluate, asked: list[tuple[str, tuple[str, ...]]], tmp_path: Path
) -> None:
    options = [f"prompts={write(tmp_path / 'data.jsonl', ASKED)}", f"vqa={tmp_path / 'vqa'}"]
    metrics = evaluate("geneval2", tmp_path / "out", *options)
    assert {name: metric.value for name, metric in metrics.items()} == {
        "geneval2_am": pytest.approx(100 * (0.81 + 0.25) / 2),
        "geneval2_gm": pytest.approx(100 * math.sqrt(0.81 * 0.25)),
        "geneval2_attribute": pytest.approx(25),
        "geneval2_count": pytest.approx(81),
    }
    assert (
        metrics["geneval2_am"].count == 3
        and "1 image(s) of each of the 3 prompts" in metrics["geneval2_am"].how
    )
    assert asked[0] == (
        "How many digits are in the image? Answer in one word.", ("two", " two", "Two", " Two", "2", " 2")
    )  # fmt: skip
    assert asked[1] == ("Are the digits red? Answer in one word.", ("Yes", "yes", " yes", " Yes"))
    [folder] = (tmp_path / "out" / "evaluation" / "geneval2").iterdir()
    paths = json.loads((folder / "images.json").read_text())
    assert list(paths) == [line["prompt"] for line in ASKED]
    assert all(Path(path).is_file() for path in paths.values())
    # Again, nothing is asked anew. With fewer prompts it is other work.
    evaluate("geneval2", tmp_path / "out", *options)
    assert len(asked) == 6
    assert evaluate("geneval2", tmp_path / "out", *options, "limit=1", "count=3")["geneval2_am"].count == 1
    assert len(asked) == 6 + 2 * 3


def test_numbers_that_are_no_words_are_other_as_in_the_benchmarks_script() -> None:
    assert answers_of("How many cows?", "ten") == ["ten", " ten", "Ten", " Ten", "10", " 10"]
    assert answers_of("How many cows?", "11") == ["11", " 11", "11", " 11", "other", " other"]


@pytest.mark.parametrize(
    ("suite", "content", "more", "words"),
    [
        ("geneval", None, (), "cannot be read .* is evaluation_metadata.jsonl of a clone"),
        ("geneval", "", (), "is empty"),
        ("geneval", "{", (), "cannot be read"),
        ("geneval", '{"prompt": "a cow"}\n', (), "line 1 has no 'tag'"),
        (
            "geneval2",
            '{"prompt": "a cow", "vqa_list": [["Is it?", "Yes"]], "skills": []}\n',
            (),
            "one skill for each",
        ),
        ("geneval2", json.dumps(ASKED[0]), (), "needs geneval2.vqa=FOLDER"),
        ("geneval2", json.dumps(ASKED[0]), ("vqa=nowhere",), "nowhere holds no config.json"),
        ("geneval", json.dumps(TAGGED[0]), ("data=[{name: a, shards: b}]",), "leave it out"),
    ],
)
def test_wrong_files_are_named_with_the_remedy(
    evaluate: Evaluate, tmp_path: Path, suite: str, content: str | None, more: tuple[str, ...], words: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        evaluate(suite, tmp_path / "out", f"prompts={path}", *more)


def test_without_a_file_of_prompts_the_suite_says_where_it_is_from(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"needs geneval\.prompts=FILE; .* of a clone"):
        evaluate("geneval", tmp_path / "out")
