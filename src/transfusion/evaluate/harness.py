"""Our models and the tasks of lm-evaluation-harness. The only importer of the harness, which may be missing.

R rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lm_eval import __version__ as VERSION
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from transfusion.errors import UserError, shown
from transfusion.evaluate.metrics.bootstrap import mean_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines, say
from transfusion.evaluate.suites.settings import LanguageSuite
from transfusion.evaluate.token_windows import Window, rolling_windows, score_windows
from transfusion.generate.pipeline import Pipeline
from transfusion.inference.cache import pages_for
from transfusion.inference.text_sampling import mask_logits
from transfusion.tokens import SpecialToken

# What Llama reports, and Transfusion after it.
LLAMA_SUITE = LanguageSuite().tasks.split(",")


class HarnessModel(TemplateLM):
    """A model as the harness asks for it. Each document begins with <BOS>, once.

    Requests hold texts in `args`. What does not fit `data.sequence_length` is cut at its beginning, as `HFLM` does.
    """

    eot_token_id = int(SpecialToken.END_DOCUMENT)
    prefix_token_id = int(SpecialToken.BEGIN_DOCUMENT)

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline, self.length = pipeline, pipeline.config.data.sequence_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Ids of a text, behind <BOS> unless told not to."""
        ids = self.pipeline.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each context and answer the log-likelihood in nats, and whether the answer is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        for texts, _, answer in requests:
            if not 0 < len(answer) <= self.length:
                raise UserError(
                    f"the answer {shown(texts[1])} has {len(answer)} tokens, which must be from 1 to"
                    f" data.sequence_length {self.length}; leave its task out"
                )
        windows = [
            Window((context + answer)[-self.length - 1 :], len(answer)) for _, context, answer in requests
        ]
        doing = f"likelihoods of {len(windows)} answers"
        return list(score_windows(windows, self.pipeline.runner, doing))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """For each text the log-likelihood in nats of all its tokens."""
        windows = [
            rolling_windows(self.tok_encode(request.args[0], add_special_tokens=False), self.length)
            for request in requests
        ]
        flat = [window for some in windows for window in some]
        scores = iter(score_windows(flat, self.pipeline.runner, f"likelihoods of {len(windows)} texts"))
        return [sum(next(scores).log_likelihood for _ in some) for some in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """For each context what the model says next, up to the first of the strings that end it."""
        tell = ProgressLines(f"answering {len(requests)} prompts")
        return [self._answer(*request.args) for request in tell.each(requests)]

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        settings = normalize_gen_kwargs(settings)
        count, until = settings["max_gen_toks"], settings["until"]
        if settings["do_sample"]:
            raise UserError("a task wants sampled answers, and only greedy ones are made; leave it out")
        if count >= self.length:
            raise UserError(
                f"a task wants answers of {count} tokens, which leave data.sequence_length {self.length} no prompt;"
                " set max_gen_toks in its generation_kwargs"
            )
        ids, said = self.tok_encode(context)[count - self.length :], list[int]()
        for token in self._greedy(ids, count):
            said.append(token)
            if any(end and end in self.pipeline.tokenizer.decode(said) for end in until):
                break
        answer: str = postprocess_generated_text(self.pipeline.tokenizer.decode(said), until, None)
        return answer

    @torch.no_grad()
    def _greedy(self, ids: Sequence[int], count: int) -> Iterator[int]:
        """At most so many tokens behind others, without <EOS>."""
        runner, vocabulary = self.pipeline.runner, self.pipeline.tokenizer.vocabulary
        cache = runner.cache(pages_for(len(ids) + count))
        rows = cache.view([cache.row(len(ids) + count)])
        state_RD = runner.read(rows, runner.text_block([ids]))
        no_image = torch.zeros(1, 1, dtype=torch.bool, device=runner.device)
        begin = (int(SpecialToken.BEGIN_IMAGE),)
        for _ in range(count):
            token = int(mask_logits(runner.logits(state_RD), vocabulary, begin, no_image).argmax())
            if token == self.eot_token_id:
                return
            yield token
            state_RD = runner.read_tokens(rows, [token])


def load_tasks(wanted: str) -> dict[str, Any]:
    """Tasks by name, with their data.

    wanted: names with commas. Or a folder: the tasks that its .yaml files define, and of
    LLAMA_SUITE those whose data are there as NAME.jsonl. Paths in its files are seen from the folder. Raises UserError.
    """
    folder = Path(wanted).resolve() if Path(wanted).is_dir() else None
    known = _in_folder(folder) if folder else _named(wanted.split(","))
    tasks: dict[str, Any] = {}
    with contextlib.chdir(folder or Path()):
        for name, (manager, spec) in known.items():
            try:
                tasks |= manager.load(spec)["tasks"]
            # What a task's file, code and data can raise has no bounds.
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise UserError(
                    f"the task {name} cannot be read ({reason}); set language.download=true to fetch its data, or"
                    " language.tasks to a folder that has them"
                ) from error
    return tasks


@functools.cache
def _harness_tasks() -> TaskManager:
    """Those that come with the harness. It reads thousands of files, which takes seconds."""
    say(f"reading the tasks of lm-evaluation-harness {VERSION}")
    return TaskManager()


def _named(names: Sequence[str]) -> dict[str, tuple[TaskManager, Any]]:
    """For each name what knows the task, and what to ask it for."""
    for name in names:
        if name not in _harness_tasks().task_index:
            raise UserError(
                f"language.tasks {shown(name)} is neither a folder nor a task of lm-evaluation-harness {VERSION};"
                " name one, such as hellaswag"
            )
    return {name: (_harness_tasks(), name) for name in names}


def _in_folder(folder: Path) -> dict[str, tuple[TaskManager, Any]]:
    """As `_named`, of the tasks of a folder."""
    manager = TaskManager(include_path=folder, include_defaults=False)
    found: dict[str, tuple[TaskManager, Any]] = {name: (manager, name) for name in manager.all_subtasks}
    defining = {entry.yaml_path for entry in manager.task_index.values()}
    for path in sorted(set(folder.rglob("*.yaml")) - defining):
        say(f"{shown(path)} defines no task and is passed over")
    for name in LLAMA_SUITE:
        path = folder / f"{name}.jsonl"
        if name not in found and path.is_file():
            # The harness's own task and prompt. Only a member of a group may have something changed.
            data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(path)}}}
            splits = {"training_split": None, "validation_split": "validation", "test_split": None}
            task = {"task": name, "dataset_name": None, **data, **splits}
            found[name] = _harness_tasks(), {"group": f"local {name}", "task": [task]}
    if not found:
        raise UserError(
            f"{shown(folder)} has no task: neither a .yaml that defines one nor data such as hellaswag.jsonl; set"
            " language.tasks to another folder"
        )
    return found


def measure(pipeline: Pipeline, tasks: dict[str, Any]) -> dict[str, Metric]:
    """The metrics that the harness takes of loaded tasks, as TASK_METRIC."""
    for task in tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    results = evaluate(lm=HarnessModel(pipeline), task_dict={"tasks": tasks}, bootstrap_iters=0)
    metrics = {}
    for name, task in tasks.items():
        asked = results["n-samples"][name]["effective"]
        which = f"task {name} version {results['versions'][name]} of lm-evaluation-harness {VERSION}"
        how = f"{{}} of {asked} documents, {which}, {task.config.num_fewshot or 0}-shot"
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = Counter(instance.doc_id for instance in task.instances)
            how += f", by chance {sum(1 / count for count in choices.values()) / len(choices):.4f}"
        for key, value in results["results"][name].items():
            what, _, chosen = key.partition(",")
            if not chosen or not isinstance(value, int | float):
                continue
            lines = [line[what] for line in results["samples"][name] if line["filter"] == chosen]
            is_mean = all(isinstance(one, int | float) for one in lines) and fmean(lines) == value
            metrics[f"{name}_{what}" if chosen == "none" else f"{name}_{what}_{chosen}"] = Metric(
                value=float(value),
                how=how.format(what),
                higher_is_better=results["higher_is_better"][name].get(what) is not False,
                count=asked,
                interval=mean_interval(lines) if is_mean else None,
            )
    return metrics
