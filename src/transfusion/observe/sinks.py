"""Where metrics also go, beside metrics.jsonl: wandb, or nowhere. The only importer of wandb."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.files import atomic_write_text
from transfusion.observe.metrics import EVALUATED, VALIDATED
from transfusion.observe.runfolder import RunFolder

logger = logging.getLogger(__name__)

# metrics.jsonl's names, grouped into wandb's panels; what is not named here keeps its name.
PANELS = {
    "loss": "loss/total",
    "gradient_norm": "optimizer/gradient_norm",
    "learning_rate": "optimizer/learning_rate",
    "skipped": "optimizer/skipped",
    "roll_backs": "optimizer/roll_backs",
    "tokens_per_second": "speed/tokens_per_second",
    "data_wait": "speed/data_wait",
    "mfu": "speed/mfu",
    "hfu": "speed/hfu",
    "mfu_palm": "speed/mfu_palm",
    "gemm_share": "speed/gemm_share",
    "memory_gib": "speed/memory_gib",
}


class MetricLogger(Protocol):
    """Takes lines as they stand in metrics.jsonl."""

    def write(self, line: Mapping[str, Any]) -> None: ...

    def image(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class NoLogger:
    """Takes everything and keeps nothing."""

    def write(self, line: Mapping[str, Any]) -> None:
        return

    def image(self, step: int, path: Path) -> None:
        return

    def close(self) -> None:
        return


class WandbLogger:
    """One wandb run for all starts of a run.

    wandb's own step only grows and belongs to its process, so a resumed run would lose what it repeats; hence a
    step axis of our own.
    """

    def __init__(self, run: Any, image: Any) -> None:
        self._run = run
        self._image = image
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, Any]) -> None:
        """Log one line; empty values are left out."""
        self._run.log(panel_values(line))

    def image(self, step: int, path: Path) -> None:
        """Log a sample grid."""
        self._run.log({"step": step, "samples": self._image(str(path), caption=f"step {step}")})

    def close(self) -> None:
        self._run.finish()


def open_metric_logger(config: Config, folder: RunFolder, *, attempt: int) -> MetricLogger:
    """The logger that `config.log` asks for. Raises UserError if wandb is asked for and not installed.

    wandb writes below `folder`, offline unless the user's environment or wandb settings name a mode. A resumed run
    goes on under the id of its first start, which stands in the folder.
    """
    if not config.log.wandb:
        return NoLogger()
    wandb = _import_wandb()
    # By the user's environment or wandb's settings. Its own defaults are to send everything, and to say much.
    chosen = wandb.setup().settings.model_fields_set
    try:
        run = wandb.init(
            project=config.log.project,
            name=config.run.name,
            id=_id_of(folder),
            resume="allow",
            dir=str(folder.path),
            config={**config.as_dict(), "attempt": attempt},
            mode=None if "mode" in chosen else "offline",
            reinit="finish_previous",
            settings=wandb.Settings(
                save_code=False,
                disable_git=True,
                disable_job_creation=True,
                console="off",
                **({} if "silent" in chosen else {"silent": True}),
            ),
        )
    except Exception as error:
        # wandb has errors of many kinds: no key, no network, a project of others, a full disk.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"wandb cannot start: {reason}; run `wandb login`, set WANDB_MODE=offline, or log.wandb=false"
        ) from None
    # Each start of an offline run has a folder of its own, all with one id.
    sync = f"offline; send all starts of it with `wandb sync {folder.path}/wandb/offline-run-*`"
    logger.info("wandb run %s, %s", run.id, sync if run.offline else run.url)
    return WandbLogger(run, wandb.Image)


def _id_of(folder: RunFolder) -> str:
    """The run's id at wandb, drawn at its first start with wandb."""
    if not folder.wandb_id.exists():
        atomic_write_text(folder.wandb_id, secrets.token_hex(4) + "\n")
    return folder.wandb_id.read_text(encoding="utf-8").strip()


def refuse_missing_logger(config: Config) -> None:
    """Raise UserError where `open_metric_logger` would, before a run has written anything."""
    if config.log.wandb:
        _import_wandb()


def panel_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as wandb gets it: flat, grouped, without empty values."""
    values: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, list):
            percent = 100 // max(1, len(value))
            for bucket, loss in enumerate(value):
                values[f"{name}/{bucket * percent:02d}-{(bucket + 1) * percent:02d}%"] = loss
        elif name == "gradient_norms":
            values |= {f"gradient_norm/{module}": norm for module, norm in (value or {}).items()}
        elif name.endswith("_loss") and not name.startswith((VALIDATED, EVALUATED)):
            values[f"loss/{name.removesuffix('_loss')}"] = value
        else:
            values[PANELS.get(name, name)] = value
    return {name: value for name, value in values.items() if value is not None}


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "log.wandb=true, but wandb is not installed; run `pip install wandb`, or set log.wandb=false"
        ) from None
    return wandb
