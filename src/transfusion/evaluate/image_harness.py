"""Our models and the tasks of lmms-eval, which ask about images. The only importer of that harness.

It may be missing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import evaluate
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.tasks import TaskManager
from PIL import Image

from transfusion.errors import UserError, shown
from transfusion.evaluate.metrics.bootstrap import mean_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines, say
from transfusion.evaluate.suites.settings import LmmsSuite
from transfusion.generate.events import TextDelta
from transfusion.generate.pipeline import ImageLike, Pipeline

VERSION = version("lmms-eval")
# As the harness's own command has them.
_FEWSHOT_SEED = 1234
_MAX_NEW_TOKENS = 1024
# What a task may want of the model, by the harness's names. Its own figures of likelihoods alone do not run.
_OUTPUT_TYPES = ("generate_until", "multiple_choice")


class _Request(NamedTuple):
    """A request of the harness. wanted: the settings of an answer, or the answer that is scored."""

    context: str
    wanted: Any
    images: list[ImageLike]


class LmmsModel(lmms):
    """A model as the harness asks for it: the images of a document, and behind them its text.

    tasks: those that ask, since requests name only a task, a split and a document.
    """

    is_simple = True

    def __init__(self, pipeline: Pipeline, tasks: dict[str, Any], settings: LmmsSuite) -> None:
        super().__init__()
        self.pipeline, self.settings = pipeline, settings
        self.tasks = {task.config.task: task for task in tasks.values()}

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each request what the model says next, up to the first of the strings that end it."""
        tell = ProgressLines(f"answering {len(requests)} prompts")
        answers: list[str] = []
        for begin in range(0, len(requests), self.settings.batch):
            tell(begin, len(requests))
            answers += self._answers(requests[begin : begin + self.settings.batch])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For each request the loss of its answer in nats, and whether the answer is the greedy one.

        The harness takes the choice with the smallest value. Each pair is wrapped, since it makes a string of a bare
        one.
        """
        tell = ProgressLines(f"likelihoods of {len(requests)} answers")
        found: list[GenerationResult] = []
        for begin in range(0, len(requests), self.settings.batch):
            tell(begin, len(requests))
            some = requests[begin : begin + self.settings.batch]
            asked = [self._read(request) for request in some]
            contexts = [[*each.images, each.context] for each in asked]
            with _told_of(some[0], last=some[-1]):
                scores = self.pipeline.score(contexts, [each.wanted for each in asked], batch=len(asked))
            found += [GenerationResult((-score.log_likelihood, bool(score.is_greedy))) for score in scores]
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises UserError."""
        raise UserError("a task asks in several rounds, and one answer is made; leave it out of lmms.tasks")

    def _answers(self, requests: Sequence[Any]) -> list[str]:
        engine = self.pipeline.engine(most_requests=len(requests))
        until, said = dict[int, list[str]](), dict[int, str]()
        for request in requests:
            with _told_of(request):
                asked = self._read(request)
                text = [asked.context] if asked.context and self.settings.context else []
                count, ends = _ending(asked.wanted)
                number = engine.submit(
                    self.pipeline.request([*asked.images, *text], max_tokens=count, max_images=0)
                )
                until[number], said[number] = ends, ""
        while not engine.is_idle:
            for number, event in engine.tick():
                if isinstance(event, TextDelta):
                    said[number] += event.text
                    if any(end in said[number] for end in until[number]):
                        engine.cancel(number)
        return [_before(said[number], until[number]) for number in said]

    def _read(self, request: Any) -> _Request:
        """A request with its images, which are read only now."""
        context, wanted, to_images, number, name, split = request.args
        document = self.tasks[name].dataset[split][number]
        # A task of texts alone gives none.
        images = to_images(document) or []
        for image in images:
            if not isinstance(image, Image.Image):
                raise UserError(
                    f"task {name}, document {number}: a {type(image).__name__} is where an image is read; leave the"
                    " task out of lmms.tasks"
                )
        return _Request(context, wanted, images)


def _ending(settings: dict[str, Any]) -> tuple[int, list[str]]:
    """How many tokens an answer has at most, and the strings that end it."""
    is_sampled = (settings.get("temperature") or 0) > 0 and settings.get("do_sample") is not False
    if is_sampled or (settings.get("num_beams") or 1) > 1:
        raise UserError("it wants sampled answers or beams, and only greedy ones are made; leave it out")
    until = settings.get("until") or []
    ends = [until] if isinstance(until, str) else until
    return settings.get("max_new_tokens") or _MAX_NEW_TOKENS, [end for end in ends if end]


def _before(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of some strings."""
    return text[: min((text.index(end) for end in ends if end in text), default=len(text))]


@contextlib.contextmanager
def _told_of(request: Any, last: Any = None) -> Iterator[None]:
    """Says of which document an error is, or of which it may be."""
    try:
        yield
    except UserError as error:
        to = f" to {last.doc_id}" if last is not None and last.doc_id != request.doc_id else ""
        raise UserError(f"task {request.task_name}, document {request.doc_id}{to}: {error}") from None


def load_tasks(wanted: str) -> dict[str, Any]:
    """Tasks by name, with their data.

    wanted: names with commas, of tasks or groups. Or a folder: the tasks that its .yaml files define. Paths in them are
    seen from the folder. Raises UserError.
    """
    folder = Path(wanted).resolve() if Path(wanted).is_dir() else None
    manager, names = _in_folder(folder) if folder else _named(wanted.split(","))
    tasks: dict[str, Any] = {}
    with contextlib.chdir(folder or Path()):
        for name in names:
            try:
                found = get_task_list(manager.load_task_or_group(name))
            # What a task's file, code and data can raise has no bounds.
            except Exception as error:
                raise UserError(
                    f"the task {shown(name)} cannot be read ({_reason(error)}); install what its code imports, and"
                    " set lmms.download=true to fetch its data, or lmms.tasks to a folder that has them"
                ) from error
            tasks |= {output.task_name: output.task for output in found}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _OUTPUT_TYPES:
            raise UserError(
                f"the task {shown(name)} is of output_type {task.OUTPUT_TYPE}, and only {' and '.join(_OUTPUT_TYPES)}"
                " are measured; leave it out of lmms.tasks"
            )
    return tasks


def _reason(error: BaseException) -> str:
    """What is wrong, in a line. The harness tries reading again and again, and tells only that."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@functools.cache
def _harness_tasks() -> TaskManager:
    """Those that come with the harness. It reads thousands of files, which takes seconds."""
    say(f"reading the tasks of lmms-eval {VERSION}")
    return TaskManager()


def _named(names: Sequence[str]) -> tuple[TaskManager, Sequence[str]]:
    """What knows the tasks, and their names."""
    for name in names:
        if name not in _harness_tasks().task_index:
            raise UserError(
                f"lmms.tasks {shown(name)} is neither a folder nor a task of lmms-eval {VERSION}; name one, such as"
                " coco2017_cap_val_lite"
            )
    return _harness_tasks(), names


def _in_folder(folder: Path) -> tuple[TaskManager, Sequence[str]]:
    """As `_named`, of the tasks of a folder."""
    try:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    # As in `load_tasks`.
    except Exception as error:
        raise UserError(
            f"the tasks in {shown(folder)} cannot be read ({_reason(error)}); mend their .yaml files"
        ) from error
    if not manager.all_subtasks:
        raise UserError(f"{shown(folder)} has no .yaml that defines a task; set lmms.tasks to another folder")
    return manager, manager.all_subtasks


def measure(pipeline: Pipeline, tasks: dict[str, Any], settings: LmmsSuite, out: Path) -> dict[str, Metric]:
    """The metrics that the harness takes of loaded tasks, as TASK_METRIC. Some tasks leave files for a server in `out`.

    Raises UserError.
    """
    for task in tasks.values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    try:
        results = evaluate(
            lm=LmmsModel(pipeline, tasks, settings),
            task_dict=tasks,
            bootstrap_iters=0,
            # Else it asks for accelerate's view of the processes.
            distributed_executor_backend="torchrun",
            cli_args=SimpleNamespace(output_path=str(out), process_with_media=True),
            process_docs_parallel=1,
        )
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    # As in `load_tasks`.
    except Exception as error:
        raise UserError(
            f"the code of a task fails ({_reason(error)}); install what it needs, or leave the task out of lmms.tasks"
        ) from error
    metrics: dict[str, Metric] = {}
    for name, task in tasks.items():
        metrics |= _metrics_of(name, task, results, settings)
    return metrics


def _metrics_of(name: str, task: Any, results: dict[str, Any], settings: LmmsSuite) -> dict[str, Metric]:
    count, stated = results["n-samples"][name]["effective"], results["versions"][name]
    # What the harness calls the version of a task that has none.
    which = f"task {name} " + (f"version {stated} " if stated != "Yaml" else "") + f"of lmms-eval {VERSION}"
    text = " without its text" if task.OUTPUT_TYPE == "generate_until" and not settings.context else ""
    # Each filter has seen all documents, one filter after another.
    filters, samples = list(task.instances[0].filtered_resps), results["samples"][name]
    metrics = {}
    for key, value in results["results"][name].items():
        what, _, chosen = key.partition(",")
        # The others are the harness's own errors of these.
        if what not in task.aggregation() or not isinstance(value, Real):
            continue
        begin = filters.index(chosen) * count
        lines = [line.get(what) for line in samples[begin : begin + count]]
        is_mean = all(isinstance(one, Real) for one in lines) and fmean(lines) == value
        metrics[f"{name}_{what}" if chosen == "none" else f"{name}_{what}_{chosen}"] = Metric(
            value=float(value),
            how=f"{what} of {count} documents, {which}, {task.config.num_fewshot or 0}-shot{text}",
            higher_is_better=results["higher_is_better"][name].get(what) is not False,
            count=count,
            interval=mean_interval([float(one) for one in lines]) if is_mean else None,
        )
    return metrics
