"""Drawn images against real ones: the figures, what a killed run leaves, and the same images on any number of ranks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from transfusion import __version__
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.evaluate.chunks import Chunks
from transfusion.evaluate.features.readers import Reader
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.evaluate.metrics.kernel_distance import kernel_distance
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.metrics.precision_recall import precision_recall
from transfusion.evaluate.suites import text_to_image
from transfusion.evaluate.suites.run import run_suites

QUICK = ("count=10", "steps=2", "batch=4", "chunk=4", "kid_subset_size=5", "kid_subsets=3")
WORDS = ["one", "two", "three", "four", "five", "six", "ten"]
Evaluate = Callable[..., dict[str, Metric]]
AsRank = Callable[[int, int], AbstractContextManager[None]]


def write_pairs(folder: Path, captions: list[str], first: int = 0) -> str:
    """Shards of captioned 8 x 8 images; a pattern that names them."""
    samples = []
    for number, caption in enumerate(captions):
        stream = io.BytesIO()
        values = np.random.default_rng(first + number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(values).save(stream, format="PNG")
        samples.append({"png": stream.getvalue(), "txt": caption.encode()})
    write_shards(samples, folder, per_shard=5)
    return f"{folder}/*.tar"


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """An exported model whose validation data are seven captioned images."""
    pairs = write_pairs(tmp_path / "pairs", [f"the digit {word}" for word in WORDS])
    path = folder / "config.json"
    description = json.loads(path.read_text())
    description["config"]["data"]["validation"] = [{"name": "pairs", "shards": pairs}]
    path.write_text(json.dumps(description))
    return folder


@pytest.fixture
def evaluate(model: Path, as_rank: AsRank) -> Evaluate:
    """evaluate(out, overrides..., rank=, ranks=) -> metrics of the suite in few steps."""

    def run(out: Path, *overrides: str, rank: int = 0, ranks: int = 1, **options: Any) -> dict[str, Metric]:
        with as_rank(rank, ranks):
            asked = [f"text_to_image.{each}" for each in (*QUICK, *overrides)]
            return run_suites(model, ["text_to_image"], out, overrides=asked, device="cpu", **options)

    return run


def left_in(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each chunk."""
    files = sorted((out / "evaluation" / "text_to_image").glob("*/*.npz"))
    return {path.name: dict(np.load(path)) for path in files}


def same(left: dict[str, dict[str, np.ndarray]], right: dict[str, dict[str, np.ndarray]]) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name][key], right[name][key]) for name in left for key in left[name]
    )


def test_figures_of_the_stand_in_cannot_be_taken_for_fid(evaluate: Evaluate, tmp_path: Path) -> None:
    metrics = evaluate(tmp_path / "out")
    names = [f"standin_{name}" for name in ("frechet", "kid", "precision", "recall")]
    assert list(metrics) == names
    for metric in metrics.values():
        assert "no FID" in metric.how and "ddim 2 steps, guidance 3, seeds from 0" in metric.how
    assert [metric.count for metric in metrics.values()] == [10, 10, 10, 7]
    frechet, kid = metrics["standin_frechet"], metrics["standin_kid"]
    assert frechet.interval is not None and frechet.interval[0] < frechet.value < frechet.interval[1]
    assert kid.interval is None and "whose deviation is" in kid.how
    chunks = left_in(tmp_path / "out")
    assert list(chunks) == [
        "drawn-00000.npz",
        "drawn-00001.npz",
        "drawn-00002.npz",
        "real-00000.npz",
        "real-00001.npz",
    ]
    prompts = [str(prompt) for name in chunks if "drawn" in name for prompt in chunks[name]["prompts"]]
    assert prompts == [f"the digit {word}" for word in WORDS + WORDS[:3]], "captions come in turn"
    shown = (tmp_path / "out" / "evaluation" / "generated" / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in shown] == [0, 1, 2, 3], "the first chunk"
    [identity] = (tmp_path / "out" / "evaluation" / "text_to_image").glob("*/identity.json")
    assert json.loads(identity.read_text())["release"] == __version__, "another one may draw otherwise"
    details = json.loads((tmp_path / "out" / "metrics.json").read_text())["details"]
    assert details["standin_kid"]["suite"] == "text_to_image"


def test_few_images_are_drawn_of_captions_that_are_evenly_spread(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(tmp_path / "out", "count=4", "kid_subset_size=4")
    prompts = left_in(tmp_path / "out")["drawn-00000.npz"]["prompts"].tolist()
    assert prompts == [f"the digit {word}" for word in ("one", "two", "four", "six")]


def test_published_networks_give_the_figures_of_the_features_that_are_left(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def means(images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        return torch.stack([image.float().mean((0, 1))[:6] / 255 for image in images])

    def cosines(images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        return torch.tensor([0.1 * len(caption) - 1.4 for caption in captions])

    reads = {"inception": means, "dinov2": means, "clip": cosines}
    readers = [Reader(name, f"{name} (digest 12)", "12", read) for name, read in reads.items()]
    monkeypatch.setattr(text_to_image, "open_readers", lambda *_, **__: readers)
    metrics = evaluate(tmp_path / "out")
    chunks = left_in(tmp_path / "out")
    drawn, real = (
        {key: np.concatenate([chunks[name][key] for name in chunks if kind in name]) for key in reads}
        for kind in ("drawn", "real")
    )
    left, right = drawn["inception"], real["inception"]
    distance = frechet_distance(gaussian_of(left), gaussian_of(right))
    found = precision_recall(left, right)
    expected = {
        "fid": distance,
        "kid": kernel_distance(left, right, subsets=3, size=5).mean,
        "precision": found.precise_N.mean(),
        "recall": found.recalled_M.mean(),
        "fd_dinov2": distance,
        "clip_score": 100 * drawn["clip"].clip(min=0).mean(),
        "clip_score_of_validation": 100 * real["clip"].clip(min=0).mean(),
    }
    assert (real["clip"] < 0).any() and (real["clip"] > 0).any()
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert all("(digest 12)" in metric.how for metric in metrics.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_draws_the_same_images(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    alone = evaluate(tmp_path / "alone")
    out = tmp_path / "shared"
    capsys.readouterr()
    for rank in range(1, ranks):
        assert evaluate(out, rank=rank, ranks=ranks) == {}
    assert not (out / "metrics.json").exists()
    told = capsys.readouterr()
    assert told.err == "" and told.out == "", "the others end quietly"
    assert "drawn-00000.npz" not in left_in(out), "it is the first rank's"
    assert evaluate(out, rank=0, ranks=ranks) == alone
    assert same(left_in(out), left_in(tmp_path / "alone"))


def test_a_killed_run_goes_on_where_it_stopped_and_anything_else_starts_anew(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = text_to_image.draw
    monkeypatch.setattr(text_to_image, "draw", lambda *given: drawn.append(given[3].seed) or draw(*given))
    out = tmp_path / "out"
    whole = evaluate(out)
    before = left_in(out)
    assert drawn == [0, 4, 8]
    [folder] = (out / "evaluation" / "text_to_image").iterdir()
    for name in ("drawn-00001.npz", "real-00001.npz"):
        (folder / name).unlink()
    (folder / ".drawn-00001.npz.tmp-77").write_bytes(b"cut")
    drawn.clear()
    assert evaluate(out) == whole and drawn == [4] and same(left_in(out), before)
    assert not list(folder.glob(".*"))
    drawn.clear()
    evaluate(out, "kid_subsets=2")
    assert drawn == [], "what is taken of the features alone draws nothing"
    for changed in (["steps=3"], ["seed=1"], ["chunk=5"], []):
        drawn.clear()
        evaluate(out, *changed)
        assert drawn, changed
        assert len(list((out / "evaluation" / "text_to_image").iterdir())) == 1
    drawn.clear()
    evaluate(out, weights="raw")
    assert drawn == [0, 4, 8], "other weights"
    evaluate(out)
    write_pairs(tmp_path / "pairs", ["the digit nine"] * 7, first=50)
    drawn.clear()
    evaluate(out)
    assert drawn == [0, 4, 8], "other data"
    [folder] = (out / "evaluation" / "text_to_image").iterdir()
    (folder / "real-00000.npz").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"real-00000.npz is damaged; delete it, and it is made again"):
        evaluate(out)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["count=1"], r"has 1 drawn and 7 real images and needs 4 of each; raise text_to_image.count"),
        (
            ["kid_subset_size=8"],
            r"subsets of 8 cannot be drawn .* set text_to_image.kid_subset_size=7 or less",
        ),
        (["inception=/nowhere/weights.pth"], r"/nowhere/weights.pth is missing; copy pt_inception"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_drawn(
    evaluate: Evaluate, tmp_path: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        evaluate(tmp_path / "out", *overrides)
    assert not left_in(tmp_path / "out")


def test_chunks_that_nothing_came_of_are_joined_as_nothing(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path, {"of": "numbers"}, size=2)
    chunks.fill("odd", 5, lambda items: {"values": np.array([[item] for item in items if item > 1], float)})
    assert chunks.join("odd", 5)["values"].tolist() == [[2], [3], [4]]
    chunks.fill("none", 2, lambda items: {"values": np.empty(0)})
    assert chunks.join("none", 2)["values"].size == 0


@pytest.mark.dist
def test_torchrun_shares_the_suite(model: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    alone = evaluate(tmp_path / "alone")
    variables = {name: each for name, each in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    overrides = [f"text_to_image.{each}" for each in QUICK]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "transfusion", "eval", str(model), "--suite", "text_to_image", "--device", "cpu"]
    done = subprocess.run(
        [*launcher, *command, "--out", str(tmp_path / "shared"), *overrides],
        env=variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("standin_frechet") == 1, "one rank speaks"
    assert same(left_in(tmp_path / "shared"), left_in(tmp_path / "alone"))
    values = json.loads((tmp_path / "shared" / "metrics.json").read_text())
    assert {name: values[name] for name in alone} == {name: metric.value for name, metric in alone.items()}
