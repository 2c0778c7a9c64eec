"""The suite of tasks about images, through lmms-eval."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from transfusion.errors import UserError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites.settings import LmmsSuite
from transfusion.files import remove_leftover
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import as_single_process, set_hub_access


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
