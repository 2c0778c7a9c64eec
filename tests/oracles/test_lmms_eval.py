"""lmms-eval measures our models, and its figures are those of the same answers taken without it.

It is in no extra, since it pins other packages. A virtual environment of its own runs this file, with lmms-eval 0.7.3.
CIDEr needs pycocoevalcap, pycocotools and a Java on the path.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from transfusion.checkpoint.export import export
from transfusion.checkpoint.save import save
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.evaluate.metrics.caption_scores import cider_d, corpus_bleu
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.metrics.ptb import ptb_words
from transfusion.evaluate.suites.run import run_suites
from transfusion.evaluate.suites.settings import LmmsSuite
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import Environment, set_hub_access
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import train_tokenizer

set_hub_access(download=False)
pytest.importorskip("lmms_eval", reason="lmms-eval is not installed, see the docs of the suite")

from transfusion.evaluate.image_harness import VERSION, LmmsModel, load_tasks  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_network")

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
PROMPT = "the small river "
CHOICES = ["the cat", "a dog runs", "moon", "12 say the house"]
TOKENS = 9
DATA = """
dataset_path: imagefolder
dataset_kwargs: {data_dir: images}
test_split: train
doc_to_visual: !function code.images
metadata: {version: 2.0}
"""
# What the harness's own tasks of captions compute, of images of this machine.
CAPTIONS = f"""
task: captions
{DATA}
output_type: generate_until
doc_to_text: "{PROMPT}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {TOKENS}, temperature: 0, do_sample: false}}
process_results: !function code.captions
metric_list:
  - {{metric: coco_CIDEr, aggregation: !function lmms_eval.tasks.coco_cap.utils.coco_cider, higher_is_better: true}}
  - {{metric: coco_Bleu_1, aggregation: !function lmms_eval.tasks.coco_cap.utils.coco_bleu1, higher_is_better: true}}
"""
LENGTHS = f"""
task: lengths
{DATA}
output_type: generate_until
doc_to_text: "{PROMPT}"
doc_to_target: "x"
generation_kwargs: {{max_new_tokens: {TOKENS}, until: ["e", "\\n\\n"]}}
process_results: !function code.lengths
metric_list: [{{metric: letters, aggregation: mean, higher_is_better: false}}]
"""
CHOICE = f"""
task: choice
{DATA}
output_type: multiple_choice
doc_to_text: "{PROMPT.strip()}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: {json.dumps(CHOICES)}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
CODE = """
from lmms_eval.tasks.coco_cap.utils import coco_process_result

def images(doc):
    return [doc["image"].convert("RGB")]

def captions(doc, results):
    assert isinstance(results[0], str)
    return coco_process_result(doc, results)

def lengths(doc, results):
    return {"letters": float(len(results[0]))}

def videos(doc):
    return ["a.mp4"]
"""
TASKS = {"captions": CAPTIONS, "lengths": LENGTHS, "choice": CHOICE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, and own, a folder of tasks with four captioned images."""
    folder = tmp_path_factory.mktemp("lmms")
    texts = [f"{PROMPT} {choice} over a small café" for choice in CHOICES] * 5
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", vocabulary=300)
    config = Config.model_validate(
        {
            "model": {
                "layers": 2,
                "hidden_size": 32,
                "heads": 4,
                "num_kv_heads": 2,
                "vocabulary": tokenizer.vocabulary,
            },
            "codec": {"channels": 3, "image_size": 8},
            "data": {"sequence_length": 48},
            "train": {"precision": "fp32"},
        }
    )
    torch.manual_seed(2)
    engine = LocalEngine(config, ALONE)
    for name, values in engine.masters.items():
        # Answers depend on the images.
        values.detach().add_(0.3 * torch.randn(values.shape)).mul_(
            6 if "patch" in name and "out" not in name else 1
        )
    # Bytes are never the likeliest, since what is no letter is no word.
    bytes_V = torch.tensor([name.startswith("<0x") for name in tokenizer.names()])
    engine.masters["lm_head.weight"].detach()[bytes_V] = 0.0
    save(folder / "run", engine, TrainState(step=1), keep=1)
    shutil.copy(tokenizer.path, folder / "run")
    export(folder / "run", folder / "model")

    images = folder / "own" / "images"
    images.mkdir(parents=True)
    quarters = torch.randint(0, 2, (4, 2, 2, 3)).mul(255).to(torch.uint8)
    pixels = quarters.repeat_interleave(10, 1).repeat_interleave(12, 2)
    shown = [Image.fromarray(image.numpy()) for image in pixels]
    pipeline = Pipeline.from_export(folder / "model", device="cpu")
    said = pipeline.caption(shown, max_tokens=TOKENS)
    # Of the last one no likely choice is the right one.
    gold = [order[0] for order in (by_likelihood(pipeline, image) for image in shown)]
    gold[3] = by_likelihood(pipeline, shown[3])[-1]
    with (images / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for number, image in enumerate(pixels):
            Image.fromarray(image.numpy()).save(images / f"{number}.png")
            row = {
                "file_name": f"{number}.png",
                "question_id": f"COCO_val_{number}",
                "id": number,
                # Of the first images nearly what the model says.
                "answer": [f"{said[number]} river", "the moon"] if number < 2 else ["a café", "12 dogs"],
                "gold": gold[number],
            }
            lines.write(json.dumps(row) + "\n")
    for name, text in TASKS.items():
        (folder / "own" / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "own" / "code.py").write_text(CODE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.from_export(folder / "model", device="cpu")


@pytest.fixture(scope="module")
def images(folder: Path) -> list[Image.Image]:
    return [Image.open(folder / "own" / "images" / f"{number}.png") for number in range(4)]


@pytest.fixture(scope="module")
def metadata(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "own" / "images" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def by_likelihood(pipeline: Pipeline, image: Image.Image) -> list[int]:
    """The choices, the likeliest first."""
    scores = pipeline.score([[image, PROMPT.strip()]] * 4, [f" {choice}" for choice in CHOICES])
    return sorted(range(4), key=lambda number: -scores[number].log_likelihood)


def only(folder: Path, name: str, to: Path, text: str | None = None) -> Path:
    """A folder with one of the tasks, or with a changed one."""
    (to / "tasks").mkdir()
    (to / "tasks" / f"{name}.yaml").write_text(text or TASKS[name], encoding="utf-8")
    shutil.copy(folder / "own" / "code.py", to / "tasks")
    shutil.copytree(folder / "own" / "images", to / "tasks" / "images")
    return to / "tasks"


def run(folder: Path, tasks: Path | str, out: Path, *overrides: str) -> dict[str, Metric]:
    return run_suites(
        folder / "model", ["lmms"], out, overrides=[f"lmms.tasks={tasks}", *overrides], device="cpu"
    )


def answers(pipeline: Pipeline, images: list[Image.Image], prompt: str) -> list[str]:
    """What the pipeline itself says of each image."""
    prompts = [[image, prompt] if prompt else [image] for image in images]
    parts = pipeline.generate(prompts, max_tokens=TOKENS, max_images=0)
    said = ["".join(part for part in each[1:] if isinstance(part, str)) for each in parts]
    return [each.removeprefix(prompt) for each in said]


@pytest.mark.skipif(not shutil.which("java"), reason="there is no java, which the harness's CIDEr needs")
@pytest.mark.parametrize("context", [True, False])
def test_captions_are_the_pipeline_s_and_cider_is_ours(
    folder: Path,
    pipeline: Pipeline,
    images: list[Image.Image],
    metadata: list[dict[str, Any]],
    tmp_path: Path,
    context: bool,
) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    tasks = only(folder, "captions", tmp_path)
    metrics = run(folder, tasks, tmp_path / "out", f"lmms.context={context}", "lmms.batch=3")
    said = answers(pipeline, images, PROMPT if context else "")
    assert len(set(said)) > 1
    kept = json.loads(
        (tmp_path / "out/evaluation/lmms/submissions/coco_captions_val2014_alg_results.json").read_text()
    )
    assert [line["caption"] for line in kept] == [each.strip() for each in said]
    words = [ptb_words(each) for each in said]
    references = [[ptb_words(each) for each in row["answer"]] for row in metadata]
    wanted = sum(cider_d(words, references)) / 4
    assert metrics["captions_coco_CIDEr"].value == pytest.approx(wanted, rel=1e-9)
    assert context or wanted > 1
    bleu = corpus_bleu(words, references)[0]
    assert metrics["captions_coco_Bleu_1"].value == pytest.approx(bleu, rel=1e-9)
    assert metrics.keys() == {"captions_coco_CIDEr", "captions_coco_Bleu_1"}
    text = "" if context else " without its text"
    assert metrics["captions_coco_CIDEr"].how == (
        f"coco_CIDEr of 4 documents, task captions version 2.0 of lmms-eval {VERSION}, 0-shot{text}"
    )
    assert metrics["captions_coco_CIDEr"].count == 4 and metrics["captions_coco_CIDEr"].interval is None


def test_answers_end_before_a_string(
    folder: Path,
    pipeline: Pipeline,
    images: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in one process of a launcher, where the harness would wait for the others."""
    launcher = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "0.0.0.0",
        "MASTER_PORT": "1",
    }
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    found = run(folder, only(folder, "lengths", tmp_path), tmp_path / "out")["lengths_letters"]
    assert {name: os.environ[name] for name in launcher} == launcher
    said = [re.split("e", each)[0].strip() for each in answers(pipeline, images, PROMPT)]
    assert any("e" in each for each in answers(pipeline, images, PROMPT))
    assert found.value == sum(map(len, said)) / 4 and not found.higher_is_better
    assert found.interval is not None and found.interval[0] <= found.value <= found.interval[1]


def test_choices_are_those_that_the_pipeline_finds_likeliest(
    folder: Path,
    pipeline: Pipeline,
    images: list[Image.Image],
    metadata: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    metrics = run(folder, only(folder, "choice", tmp_path), tmp_path / "out")
    prompt, right, right_norm = PROMPT.strip(), 0, 0
    for row, image in zip(metadata, images, strict=True):
        scores = pipeline.score([[image, prompt]] * 4, [f" {choice}" for choice in CHOICES])
        nats = [score.log_likelihood for score in scores]
        each = [value / len(choice) for value, choice in zip(nats, CHOICES, strict=True)]
        right += nats.index(max(nats)) == row["gold"]
        right_norm += each.index(max(each)) == row["gold"]
    assert metrics["choice_acc"].value == right / 4
    assert metrics["choice_acc_norm"].value == right_norm / 4
    assert right == 3


def test_the_greedy_answer_is_told_as_such(
    folder: Path, pipeline: Pipeline, images: list[Image.Image]
) -> None:
    tasks = load_tasks(str(folder / "own"))
    assert tasks.keys() == TASKS.keys()
    asked = [
        SimpleNamespace(args=("", answer, tasks["choice"].doc_to_visual, 0, "choice", "train"))
        for answer in (answers(pipeline, images, "")[0], "the cat")
    ]
    found = [each.text for each in LmmsModel(pipeline, tasks, LmmsSuite()).loglikelihood(asked)]
    assert [greedy for _, greedy in found] == [True, False]
    context: list[Any] = [[images[0]]] * 2
    scores = pipeline.score(context, [request.args[1] for request in asked])
    assert [loss for loss, _ in found] == pytest.approx([-score.log_likelihood for score in scores])


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "lengths",
            ("until:", "temperature: 0.5, until:"),
            "task lengths, document 0: it wants sampled answers",
        ),
        (
            "lengths",
            ("code.images", "code.videos"),
            "task lengths, document 0: a str is where an image is read",
        ),
        (
            "lengths",
            ("generate_until", "generate_until_multi_round"),
            "task lengths is of output_type generate_until_m",
        ),
        ("lengths", ("code.lengths", "code.none"), "the task lengths cannot be read .*'none'"),
        ("lengths", (PROMPT, PROMPT * 30), "task lengths, document 0: a prompt of .* leaves no room"),
        ("lengths", ("task: lengths", "other: lengths"), "has no .yaml that defines a task"),
        ("lengths", ("task: lengths", "task: [lengths"), "cannot be read .*mend their .yaml files"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(
    folder: Path, tmp_path: Path, name: str, change: tuple[str, str], told: str
) -> None:
    tasks = only(folder, name, tmp_path, TASKS[name].replace(*change))
    with pytest.raises(UserError, match=told) as refused:
        run(folder, tasks, tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_names_and_data_that_are_missing(folder: Path, tmp_path: Path) -> None:
    """Nothing is asked of a network. The harness tries five times to read."""
    with pytest.raises(UserError, match="none-such is neither a folder nor a task of lmms-eval"):
        run(folder, "none-such", tmp_path / "out")
    with pytest.raises(UserError, match=r"the task mme cannot be read .*set lmms\.download=true") as refused:
        run(folder, "mme", tmp_path / "out")
    assert "\n" not in str(refused.value)
