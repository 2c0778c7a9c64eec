"""The suite of perplexities and the windows below it, and what suites say without their harness."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transfusion.config import Config
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.evaluate.suites.run import run_suites
from transfusion.evaluate.token_windows import Window, rolling_windows
from transfusion.generate.pipeline import Pipeline
from transfusion.generate.scoring import score_tokens

Open = Callable[..., Pipeline]
TEXTS = [
    "a handwritten three",
    "the digit seven,\r\nin bright  ink and in the dark, 12345",
    "nine \u2028 \U0001f642",
]
LENGTH = 24


@pytest.fixture
def open_model(build_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Open:
    """open_model(**data section) -> the untrained model that `run_suites` opens."""

    def make(**data: Any) -> Pipeline:
        config, network = build_model()
        values = config.as_dict()
        values["data"] = {"sequence_length": LENGTH, "tokenizer": str(tokenizer.path), **data}
        pipeline = Pipeline(network, tokenizer, Config.model_validate(values), "cpu")
        monkeypatch.setattr(Pipeline, "from_export", lambda *_, **__: pipeline)
        return pipeline

    return make


def texts_of(*files: Path) -> list[str]:
    return [f"perplexity.texts={json.dumps([str(file) for file in files])}"]


def nats_one_by_one(pipeline: Pipeline, text: str) -> tuple[float, int]:
    """Each token behind as much as its window gives it, read anew for each."""
    ids, total = [1, *pipeline.tokenizer.encode(text)], 0.0
    count = len(ids) - 1
    for place in range(count):
        # The last window ends with the text, every other one begins with its first target.
        last = (
            max(0, count - LENGTH) if place // LENGTH == (count - 1) // LENGTH else place // LENGTH * LENGTH
        )
        total -= score_tokens([ids[last : place + 2]], [1], pipeline.runner)[0].log_likelihood
    return total, count


def test_windows_score_each_token_once() -> None:
    """The example of lm-evaluation-harness, with a window of 4."""
    assert rolling_windows(range(10, 20), 4) == [
        Window([1, 10, 11, 12, 13], 4), Window([13, 14, 15, 16, 17], 4), Window([15, 16, 17, 18, 19], 2),
    ]  # fmt: skip
    assert rolling_windows([10, 11], 4) == [Window([1, 10, 11], 2)]
    assert rolling_windows([10, 11, 12, 13], 4) == [Window([1, 10, 11, 12, 13], 4)]
    assert rolling_windows([], 4) == []


def test_rows_of_several_lengths_are_scored_as_each_alone(open_model: Open) -> None:
    runner = open_model().runner
    rows = [[1, 9, 10, 11, 12, 13], [40, 41], [1, 30, 31, 32]]
    targets = [5, 1, 2]
    together = score_tokens(rows, targets, runner)
    for row, count, score in zip(rows, targets, together, strict=True):
        (alone,) = score_tokens([row], [count], runner)
        assert score.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-5)
    likeliest = max(
        range(320), key=lambda token: score_tokens([[1, 9, token]], [1], runner)[0].log_likelihood
    )
    flags = score_tokens([[1, 9, likeliest], [1, 9, likeliest - 1]], [1, 1], runner)
    assert [score.is_greedy for score in flags] == [True, False]


def test_figures_of_files(open_model: Open, tmp_path: Path) -> None:
    """Of a text a file, with its line ends, and of one a line. No shard of the model's data is sought."""
    pipeline = open_model(validation=[{"name": "gone", "shards": "nowhere/*.tar"}])
    (tmp_path / "one.txt").write_bytes(TEXTS[1].encode())
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    (tmp_path / "many.jsonl").write_text(lines, encoding="utf-8")
    files = [tmp_path / "one.txt", tmp_path / "many.jsonl"]
    metrics = run_suites(tmp_path, ["perplexity"], tmp_path / "out", overrides=texts_of(*files))
    for name, texts, words in (("one", TEXTS[1:2], 11), ("many", TEXTS, 16)):
        found = [nats_one_by_one(pipeline, text) for text in texts]
        nats, tokens = sum(one for one, _ in found), sum(count for _, count in found)
        assert tokens > LENGTH
        size = sum(len(text.encode()) for text in texts)
        wanted = {
            "nats_per_token": nats / tokens, "nats_per_byte": nats / size,
            "bits_per_byte": nats / size / math.log(2), "word_perplexity": math.exp(nats / words),
        }  # fmt: skip
        for what, value in wanted.items():
            metric = metrics[f"{name}_{what}"]
            assert metric.value == pytest.approx(value, rel=1e-5) and not metric.higher_is_better
            assert f"{tokens} tokens, {size} bytes, {words} words) in windows of 24 tokens" in metric.how
    assert len(metrics) == 8


def test_validation_texts_without_the_captions(open_model: Open, tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, format="PNG")
    captioned = {"png": image.getvalue(), "txt": b"a"}
    write_shards([captioned, *({"txt": text.encode()} for text in TEXTS)], tmp_path / "texts")
    write_shards([captioned], tmp_path / "pairs")
    sources = [{"name": name, "shards": f"{tmp_path}/{name}/*.tar"} for name in ("pairs", "texts")]
    pipeline = open_model(validation=sources)
    metrics = run_suites(tmp_path, ["perplexity"], tmp_path / "out")
    # What reads shards mends line ends.
    nats = [nats_one_by_one(pipeline, text.replace("\r", "")) for text in TEXTS]
    wanted = sum(one for one, _ in nats) / sum(count for _, count in nats)
    assert metrics["texts_nats_per_token"].value == pytest.approx(wanted, rel=1e-5)
    assert {name.split("_")[0] for name in metrics} == {"texts"}


def test_a_page_without_spaces_has_no_word_perplexity(open_model: Open, tmp_path: Path) -> None:
    open_model()
    (tmp_path / "one.txt").write_text("handwritten" * 100)
    metrics = run_suites(tmp_path, ["perplexity"], tmp_path / "out", overrides=texts_of(tmp_path / "one.txt"))
    assert "one_word_perplexity" not in metrics and metrics["one_bits_per_byte"].value > 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot read .*one.jsonl of perplexity.texts: No such file"),
        (b"\xff", "cannot read .*one.jsonl of perplexity.texts: no UTF-8"),
        (b'{"text": "a"}\n{"words": "a"}\n', 'line 2 is no {"text"'),
        (b'{"text": "\\ud800"}\n', 'line 1 is no {"text"'),
        (b"", "one of perplexity.texts holds no text"),
    ],
)
def test_files_without_texts_are_refused(
    open_model: Open, tmp_path: Path, content: bytes | None, told: str
) -> None:
    open_model()
    file = tmp_path / "one.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=told):
        run_suites(tmp_path, ["perplexity"], tmp_path / "out", overrides=texts_of(file))


def test_without_validation_texts_files_are_asked_for(open_model: Open, tmp_path: Path) -> None:
    open_model()
    with pytest.raises(UserError, match=r"no documents of text alone; name files in perplexity.texts"):
        run_suites(tmp_path, ["perplexity"], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "override"), [("perplexity", ["perplexity.texts=[a.txt]"]), ("language", []), ("lmms", [])]
)
def test_data_beside_other_data_are_refused(
    open_model: Open, tmp_path: Path, name: str, override: list[str]
) -> None:
    open_model()
    set_in_vain = f"{name}.data=[{{name: a, shards: a.tar}}]"
    with pytest.raises(
        UserError, match=f"{name}.data is set, and the suite measures other data; leave it out"
    ):
        run_suites(tmp_path, [name], tmp_path / "out", overrides=[*override, set_in_vain])


@pytest.mark.parametrize(
    ("name", "importer", "package", "told"),
    [
        ("language", "harness", "lm_eval", r"needs lm-evaluation-harness .*run `pip install 'lm-eval"),
        ("lmms", "image_harness", "lmms_eval", r"needs lmms-eval .*run `pip install 'lmms-eval"),
    ],
)
def test_without_its_harness_a_suite_tells_how_to_install_it(
    open_model: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    importer: str,
    package: str,
    told: str,
) -> None:
    open_model()
    for library in ("HUB", "DATASETS", "EVALUATE"):
        monkeypatch.setenv(f"HF_{library}_OFFLINE", "0")
    monkeypatch.delitem(sys.modules, f"transfusion.evaluate.{importer}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=told) as refused:
        run_suites(tmp_path, [name], tmp_path / "out")
    assert "\n" not in str(refused.value)
