"""What `transfusion eval` runs: named suites, each a few metrics with how they were measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transfusion.config import DiffusionConfig, SourceConfig
from transfusion.config.objectives import PREDICTED
from transfusion.data.loading.validation import EvaluationLoader, documents
from transfusion.errors import UserError
from transfusion.evaluate.bigram import Bigram
from transfusion.evaluate.held_out import held_out_losses
from transfusion.evaluate.metric import Metric
from transfusion.files import atomic_write_text
from transfusion.generate.pipeline import Pipeline, Weights
from transfusion.schema import LossTerms, TextSegment

METRICS = "metrics.json"


Suite = Callable[[Pipeline, Path], dict[str, Metric]]


def run_suites(
    model: Path,
    names: Sequence[str],
    out: Path,
    *,
    weights: Weights = "auto",
    device: str = "auto",
    classifier: Path | None = None,
) -> dict[str, Metric]:
    """Run suites on an exported model; writes OUT/metrics.json (added to what is there) and OUT/evaluation/.

    classifier: for the suite `pictures`. Raises UserError for an unknown suite, or when the model's held-out data is
    not to be found.
    """
    from transfusion.evaluate.digits import digits
    from transfusion.evaluate.drawing import captions, pictures

    suites: dict[str, Suite] = {"held-out": held_out, "digits": digits, "captions": captions}
    if classifier is not None:
        suites["pictures"] = functools.partial(pictures, classifier=classifier)
    elif "pictures" in names:
        raise UserError(
            "the suite pictures needs --classifier; `transfusion classifier CONFIG --out FILE` makes one"
        )
    unknown = [name for name in names if name not in suites]
    if unknown:
        raise UserError(f"no suite named {unknown[0]!r}; there are {', '.join(suites)}")
    pipeline = Pipeline.from_export(model, weights=weights, device=device)
    if pipeline.config.train.threads:
        torch.set_num_threads(pipeline.config.train.threads)
    out.mkdir(parents=True, exist_ok=True)
    known = _known(out / METRICS)
    metrics: dict[str, Metric] = {}
    for name in names:
        metrics |= suites[name](pipeline, out)
    _write(out / METRICS, metrics, known)
    return metrics


def _known(path: Path) -> dict[str, Any]:
    """Details of the metrics that stand in `path` already. Raises UserError for a file that is not ours."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["details"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, or name another folder with --out") from None


def _write(path: Path, metrics: dict[str, Metric], known: dict[str, Any]) -> None:
    """Names and numbers on top, for whoever compares; how each was measured under `details`."""
    details = known | {name: metric.as_dict() for name, metric in metrics.items()}
    text = json.dumps(
        {name: detail["value"] for name, detail in details.items()} | {"details": details}, indent=2
    )
    atomic_write_text(path, text + "\n")


def held_out(pipeline: Pipeline, out: Path) -> dict[str, Metric]:
    """Losses on the config's held-out sources; a text's beside a bigram fitted on the training text of its name."""
    if not pipeline.config.data.held_out:
        raise UserError(
            "the model's configuration names no data.held_out; train with one, or choose another --suite"
        )
    diffusion = pipeline.config.diffusion
    # The plain error, so that models trained with other weights can be compared.
    plain = pipeline.config.model_copy(
        update={"diffusion": diffusion.model_copy(update={"loss_weight": "none"})}
    )
    metrics: dict[str, Metric] = {}
    for source in pipeline.config.data.held_out:
        loader = EvaluationLoader(pipeline.config, [source], pipeline.tokenizer, rows=8)
        terms = held_out_losses(
            pipeline.reader.model, loader, plain, pipeline.reader.device, pipeline.reader.codec
        )
        if float(terms.image_count):
            name, metric = _image_metric(pipeline, source, terms)
            metrics[name] = metric
            continue
        measured = _text_metrics(pipeline, source, terms)
        # The first text source has the plain names; further ones carry their own.
        taken = not measured.keys().isdisjoint(metrics)
        metrics |= {f"{source.name}_{name}" if taken else name: metric for name, metric in measured.items()}
    return metrics


def _image_metric(pipeline: Pipeline, source: SourceConfig, terms: LossTerms) -> tuple[str, Metric]:
    """Name and metric of the image loss of either model family, which are no measures of each other."""
    value = float(terms.image_sum / terms.image_count)
    if pipeline.config.model.family == "chameleon":
        how = f"cross entropy over the image tokens of held-out {source.name}, captions first"
        name, unit = f"{source.name}_image_nats_per_token", "nats/token"
        return name, Metric(value=value, unit=unit, higher_is_better=False, how=how)
    diffusion = pipeline.config.diffusion
    how = (
        f"mean squared error of the predicted {PREDICTED[diffusion.objective]}, held-out {source.name},"
        f" fixed noise and timesteps{_law(diffusion)}"
    )
    return f"{source.name}_image_loss", Metric(value=value, higher_is_better=False, how=how)


def _law(diffusion: DiffusionConfig) -> str:
    """How the timesteps were drawn, where it is not evenly."""
    shift = "" if diffusion.timestep_shift == 1 else f"shift {diffusion.timestep_shift:g}"
    law = "" if diffusion.timestep_law == "uniform" else diffusion.timestep_law
    return f" ({', '.join(filter(None, (law, shift)))})" if law or shift else ""


def _text_metrics(pipeline: Pipeline, source: SourceConfig, terms: LossTerms) -> dict[str, Metric]:
    texts = _texts(pipeline, source)
    tokens = sum(len(ids) + 1 for ids in texts)
    size = sum(len(pipeline.tokenizer.decode(ids).encode()) for ids in texts)
    if tokens != int(terms.text_count):
        raise ValueError(f"the model was judged on {int(terms.text_count)} tokens of {tokens}")
    metrics = {}
    bar = None
    training = next((known for known in pipeline.config.data.sources if known.name == source.name), None)
    if training is not None:
        bigram = Bigram(_texts(pipeline, training), pipeline.config.model.vocabulary)
        nats = bigram.nats(texts)
        bar = nats / tokens
        how = "interpolated absolute-discount (0.75) bigram, fitted on the same training text and tokenizer"
        metrics["bigram_nats_per_token"] = Metric(value=bar, unit="nats/token", how=how)
        metrics["bigram_nats_per_byte"] = Metric(value=nats / size, unit="nats/byte", how=how)
    total = float(terms.text_sum)
    metrics["text_loss_nats_per_token"] = Metric(
        value=total / tokens,
        unit="nats/token",
        bar=bar,
        higher_is_better=False,
        how=f"cross entropy over the {tokens} tokens of held-out {source.name}, <EOS> included; bar: the bigram",
    )
    metrics["text_loss_nats_per_byte"] = Metric(
        value=total / size, unit="nats/byte", higher_is_better=False, how=f"the same over its {size} bytes"
    )
    return metrics


def _texts(pipeline: Pipeline, source: SourceConfig) -> list[list[int]]:
    """Token ids of each document of a text source."""
    return [
        [token for part in document.segments if isinstance(part, TextSegment) for token in part.token_ids]
        for document in documents(pipeline.config, [source], pipeline.tokenizer)
    ]
