"""Our models are measured by lm-evaluation-harness as its own class measures their export for transformers."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transfusion.checkpoint.export import export
from transfusion.checkpoint.save import save
from transfusion.checkpoint.text_model import export_text_model
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.evaluate.suites.run import run_suites
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import Environment, set_hub_access
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import train_tokenizer

set_hub_access(download=False)
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: language)")
pytest.importorskip("accelerate", reason="accelerate is not installed, which HFLM of lm-eval needs")

from transfusion.evaluate.harness import HarnessModel, load_tasks  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_network")

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
# Tokens of the window: many of the requests are longer.
LENGTH = 48
WORDS = (
    "the",
    "cat",
    "a",
    "dog",
    "river",
    "moon",
    "over",
    "in",
    "sees",
    "small",
    "house",
    "runs",
    "café",
    "12",
    "say",
)
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {validation: data/choice.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{context}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{endings}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {validation: data/rolling.jsonl}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""
ANSWER = """
task: answer
dataset_path: json
dataset_kwargs: {data_files: {validation: data/choice.jsonl}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{context}}"
doc_to_target: "{{endings[gold]}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""
# As their files on the hub are.
LLAMA_SUITE: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "ctx_a": "A man sees a dog.", "ctx_b": "the dog", "activity_label": "Running", "label": "2",
        "endings": ["runs [title] home", "is red", "says 12", "sees  the moon"],
    },
    "piqa": {"goal": "See the moon", "sol1": "look up", "sol2": "look down the river", "label": 1},
    "social_iqa": {
        "context": "A cat runs.", "question": "Why?", "answerA": "red", "answerB": "a dog", "answerC": "12",
        "label": "2",
    },
    "winogrande": {"sentence": "The dog saw the cat as _ ran.", "option1": "dog", "option2": "cat", "answer": "2"},
    "arc_easy": {
        "question": "What runs?", "choices": {"text": ["river", "house", "moon"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    "arc_challenge": {
        "question": "What is red?", "choices": {"text": ["café", "a house"], "label": ["1", "2"]}, "answerKey": "2",
    },
    "boolq": {"passage": "The river runs. " * 30, "question": "does the river run", "label": 1},
}  # fmt: skip


def some_text(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, and text, the same weights for transformers. Tasks in own and suite."""
    folder = tmp_path_factory.mktemp("language")
    tokenizer = train_tokenizer(
        [some_text(20, seed) for seed in range(30)], folder / "tokenizer.model", vocabulary=320
    )
    shape = {"layers": 2, "hidden_size": 32, "heads": 4, "num_kv_heads": 2}
    config = Config.model_validate(
        {
            "model": {**shape, "vocabulary": tokenizer.vocabulary},
            "codec": {"channels": 1, "image_size": 8},
            "data": {"sequence_length": LENGTH},
            "train": {"precision": "fp32"},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    engine = LocalEngine(config, ALONE)
    for values in engine.masters.values():
        values.detach().add_(0.2 * torch.randn(values.shape))
    # Bytes are never the likeliest: what is no letter is decoded to other signs elsewhere.
    bytes_V = torch.tensor([name.startswith("<0x") for name in tokenizer.names()])
    engine.masters["lm_head.weight"].detach()[bytes_V] = 0.0
    save(folder / "run", engine, TrainState(step=1), keep=1)
    shutil.copy(tokenizer.path, folder / "run")
    export(folder / "run", folder / "model")
    export_text_model(folder / "run", folder / "text")

    own = folder / "own"
    own.mkdir()
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "answer": ANSWER}.items():
        (own / f"{name}.yaml").write_text(text)
    rows = [
        {
            "context": some_text(count, count) + " " * (count % 3),
            "endings": [
                some_text(1 + (count + each) % 4, 100 * count + each) for each in range(2 + count % 3)
            ],
            "gold": count % 2,
        }
        for count in range(0, 36)
    ]
    write_lines(own / "data" / "choice.jsonl", rows)
    counts = (1, 5, 20, 40, 41, 42, 43, 44, 45, 46, 90, 200)
    write_lines(own / "data" / "rolling.jsonl", [{"text": some_text(count, count)} for count in counts])
    (folder / "suite").mkdir()
    for name, row in LLAMA_SUITE.items():
        write_lines(folder / "suite" / f"{name}.jsonl", [row, row])
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """theirs(**settings of HFLM) -> the harness's own class on the text model."""
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "text", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "text")
    return lambda **settings: HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 1} | settings)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return HarnessModel(Pipeline.from_export(folder / "model", device="cpu"))


def simple_evaluate(model: Any, tasks: dict[str, Any]) -> dict[str, float]:
    """TASK_METRIC -> what the harness itself measures."""
    results = lm_eval.simple_evaluate(model=model, tasks=list(tasks.values()), bootstrap_iters=0)["results"]
    return {
        f"{task}_{key.removesuffix(',none')}": value
        for task in tasks
        for key, value in results[task].items()
        if isinstance(value, float)
    }


def requests(task: Any) -> list[Any]:
    task.build_all_requests(rank=0, world_size=1)
    return list(task.instances)


def largest_error(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Relative above one nat, else absolute."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(one - other) / max(1.0, abs(other)) for one, other in pairs)


def test_likelihoods_and_greedy_flags_of_answers(folder: Path, ours: Any, theirs: Any) -> None:
    asked = requests(load_tasks(str(folder / "own"))["choice"])
    # Some that the model would give itself.
    prompts = [request.args[0] for request in asked[::2] if request.args[0].strip()]
    settings = {"until": [], "max_gen_toks": 2}
    said = ours.generate_until([SimpleNamespace(args=(prompt, settings)) for prompt in prompts])
    asked += [SimpleNamespace(args=pair) for pair in zip(prompts, said, strict=True)]
    lengths = [len(ours.tok_encode("".join(request.args))) for request in asked]
    assert min(lengths) < 5 and sum(length > LENGTH + 1 for length in lengths) > 20

    mine = ours.loglikelihood(asked)
    wanted = theirs(softmax_dtype="float64").loglikelihood(asked)
    assert largest_error([one for one, _ in mine], [other for other, _ in wanted]) <= 1e-6
    flags = [flag for _, flag in mine]
    assert flags == [flag for _, flag in wanted] and 5 < sum(flags) < len(flags) - 5


def test_likelihoods_of_whole_texts(folder: Path, ours: Any, theirs: Any) -> None:
    """The harness's class is told to put no <BOS> into texts, since it puts one before them too."""
    asked = requests(load_tasks(str(folder / "own"))["rolling"])
    mine = ours.loglikelihood_rolling(asked)
    wanted = theirs(add_bos_token=False, softmax_dtype="float64").loglikelihood_rolling(asked)
    assert largest_error(mine, wanted) <= 1e-6
    twice = theirs(softmax_dtype="float64").loglikelihood_rolling(asked)
    assert largest_error(mine, twice) > 1e-3


def test_answers_up_to_a_string(folder: Path, ours: Any, theirs: Any) -> None:
    asked = requests(load_tasks(str(folder / "own"))["answer"])
    mine = ours.generate_until(asked)
    assert mine == theirs().generate_until(asked)
    assert mine == theirs(batch_size=8).generate_until(asked)
    assert len(set(mine)) > 10 and not any("e" in answer for answer in mine)


def test_metrics_are_the_harness_s_own(folder: Path, theirs: Any, tmp_path: Path) -> None:
    metrics = run_suites(
        folder / "model", ["language"], tmp_path, overrides=[f"language.tasks={folder}/own"], device="cpu"
    )
    tasks = load_tasks(str(folder / "own"))
    rolling = {"rolling": tasks.pop("rolling")}
    wanted = simple_evaluate(theirs(), tasks) | simple_evaluate(theirs(add_bos_token=False), rolling)
    assert metrics.keys() - {"language_accuracy"} == wanted.keys()
    for name, value in wanted.items():
        tolerance = 1e-6 if name.startswith("rolling") else 0
        assert metrics[name].value == pytest.approx(value, rel=tolerance, abs=0), name
    assert 0.2 < wanted["choice_acc"] < 0.8 and wanted["choice_acc"] != wanted["choice_acc_norm"]
    assert metrics["language_accuracy"].value == metrics["choice_acc"].value
    assert not metrics["rolling_word_perplexity"].higher_is_better and metrics["choice_acc"].higher_is_better
    low, high = metrics["choice_acc"].interval or (1.0, 0.0)
    assert low < wanted["choice_acc"] < high and metrics["rolling_word_perplexity"].interval is None
    assert metrics["choice_acc"].how == (
        f"acc of 36 documents, task choice version 1.0 of lm-evaluation-harness {lm_eval.__version__}, 0-shot, by"
        " chance 0.3611"
    )


def test_the_suite_of_perplexities_is_the_harness_s(folder: Path, theirs: Any, tmp_path: Path) -> None:
    file = folder / "own" / "data" / "rolling.jsonl"
    metrics = run_suites(
        folder / "model", ["perplexity"], tmp_path, overrides=[f"perplexity.texts=[{file}]"], device="cpu"
    )
    task = {"rolling": load_tasks(str(folder / "own"))["rolling"]}
    wanted = simple_evaluate(theirs(add_bos_token=False), task)
    for name in ("rolling_word_perplexity", "rolling_bits_per_byte"):
        assert metrics[name].value == pytest.approx(wanted[name], rel=1e-6, abs=0)
    byte_perplexity = math.exp(metrics["rolling_nats_per_byte"].value)
    assert byte_perplexity == pytest.approx(wanted["rolling_byte_perplexity"], rel=1e-6, abs=0)


def test_the_tasks_of_llama_with_data_of_this_machine(folder: Path, theirs: Any, tmp_path: Path) -> None:
    """Their prompts are the harness's, and nothing is asked of a network."""
    metrics = run_suites(
        folder / "model", ["language"], tmp_path, overrides=[f"language.tasks={folder}/suite"], device="cpu"
    )
    wanted = simple_evaluate(theirs(), load_tasks(str(folder / "suite")))
    assert {name: metrics[name].value for name in wanted} == wanted and len(wanted) == 11
    accuracies = [wanted[f"{name}_acc"] for name in LLAMA_SUITE]
    assert metrics["language_accuracy"].value == pytest.approx(sum(accuracies) / 7)
    assert "by chance 0.2500" in metrics["hellaswag_acc"].how


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("none-such", "language.tasks none-such is neither a folder nor a task of lm-evaluation-harness"),
        ("piqa", "the task piqa cannot be read .*language.download=true"),
        ("empty", "has no task"),
        ("lacking", "the task choice cannot be read .*choice.jsonl"),
    ],
)
def test_what_is_missing_is_told_in_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: str, told: str
) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        # As where somebody has imported them before.
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "choice.yaml").write_text(CHOICE)
    with pytest.raises(UserError, match=told) as refused:
        run_suites(
            folder / "model",
            ["language"],
            tmp_path / "out",
            overrides=[f"language.tasks={tasks}"],
            device="cpu",
        )
    assert "\n" not in str(refused.value)
