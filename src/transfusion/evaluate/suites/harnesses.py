"""Tasks of others: language through lm-evaluation-harness, and images through lmms-eval."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from statistics import fmean

from transfusion.errors import UserError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites.settings import LanguageSuite, LmmsSuite
from transfusion.files import remove_leftover
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import as_single_process, set_hub_access


def language(pipeline: Pipeline, out: Path, settings: LanguageSuite) -> dict[str, Metric]:
    """Every metric of every task, as the harness takes them, and the mean accuracy.

    Without `download` all comes from this machine. Leaves no evidence. Raises UserError where the harness is missing,
    or a task or its data.
    """
    set_hub_access(download=settings.download)
    try:
        from transfusion.evaluate.harness import load_tasks, measure
    except ImportError as error:
        raise UserError(
            f"the suite language needs lm-evaluation-harness ({error}); run `pip install 'lm-eval>=0.4.13,<0.5'`"
        ) from None
    loaded = load_tasks(settings.tasks)
    metrics = measure(pipeline, loaded)
    accuracies = {name: metrics[f"{name}_acc"].value for name in loaded if f"{name}_acc" in metrics}
    if accuracies:
        metrics["language_accuracy"] = Metric(
            value=fmean(accuracies.values()), how=f"mean of acc over {', '.join(accuracies)}"
        )
    return metrics


def lmms(pipeline: Pipeline, out: Path, settings: LmmsSuite) -> dict[str, Metric]:
    """Every metric of every task, as the harness takes them.

    Without `download` all comes from this machine. Tasks that make files for a server leave them in evaluation/lmms.
    Raises UserError where the harness is missing, or a task or its data.
    """
    set_hub_access(download=settings.download)
    evidence = (out / "evaluation" / "lmms").resolve()
    remove_leftover(evidence)
    # The harness and its tasks talk on stdout, where the figures will stand.
    with as_single_process(), contextlib.redirect_stdout(sys.stderr):
        try:
            from transfusion.evaluate.image_harness import load_tasks, measure
        except ImportError as error:
            raise UserError(
                f"the suite lmms needs lmms-eval ({error}); run `pip install 'lmms-eval>=0.7.3,<0.8'`"
            ) from None
        return measure(pipeline, load_tasks(settings.tasks), settings, evidence)
