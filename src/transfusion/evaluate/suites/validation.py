"""The suite of validation losses: images by the diffusion error, texts beside a bigram."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transfusion.config import Config, SourceConfig
from transfusion.data.loading.validation import EvaluationLoader, documents
from transfusion.errors import UserError
from transfusion.evaluate.metrics.bigram import Bigram
from transfusion.evaluate.metrics.bootstrap import Interval, ratio_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.settings import ValidationSuite
from transfusion.evaluate.validation_losses import validation_losses
from transfusion.generate.pipeline import Pipeline
from transfusion.schema import LossTerms, TextSegment


def validation(pipeline: Pipeline, out: Path, settings: ValidationSuite) -> dict[str, Metric]:
    """Losses on the config's validation sources; a text's beside a bigram fitted on the training text of its name."""
    if not pipeline.config.data.validation:
        raise UserError(
            "the model's configuration names no data.validation; train with one, or choose another --suite"
        )
    plain = _plain(pipeline.config)
    diffusions = {modality.name: modality.diffusion for modality in pipeline.config.modalities}
    metrics: dict[str, Metric] = {}
    for source in pipeline.config.data.validation:
        # A row by itself is what the interval resamples.
        loader = EvaluationLoader(pipeline.config, [source], pipeline.tokenizer, rows=1)
        runner, tell = (
            pipeline.runner,
            ProgressLines(f"losses of validation {source.name}, {len(loader)} rows"),
        )
        rows = list(validation_losses(runner.model, loader, plain, runner.device, runner.codec, tell))
        # The terms of a family that are no text, such as "image".
        media = [name for name, total in rows[0].sums.items() if name != "text" and total.dim() == 0]
        found = {name: shown for name in media if (shown := _Ratio.of(rows, name)).count}
        for modality, shown in found.items():
            # Those of two families are no measures of each other.
            diffusion = diffusions.get(modality, pipeline.config.diffusion)
            name, unit, how = pipeline.family.image_metric(diffusion)
            metrics[f"{source.name}_{f'{modality}_loss' if modality in diffusions else name}"] = Metric(
                value=shown.value,
                count=shown.rows,
                interval=shown.interval,
                unit=unit,
                higher_is_better=False,
                how=how.format(source.name),
            )
        if found:
            continue
        measured = _text_metrics(pipeline, source, _Ratio.of(rows, "text"))
        # The first text source has the plain names; further ones carry their own.
        taken = not measured.keys().isdisjoint(metrics)
        metrics |= {f"{source.name}_{name}" if taken else name: metric for name, metric in measured.items()}
    return metrics


def _plain(config: Config) -> Config:
    """With the plain error as loss, so that models trained with other weights can be compared."""
    plain = {"loss_weight": "none"}
    modalities = [
        each.model_copy(update={"diffusion": each.diffusion.model_copy(update=plain)})
        for each in config.modalities
    ]
    return config.model_copy(
        update={"diffusion": config.diffusion.model_copy(update=plain), "modalities": modalities}
    )


@dataclass(frozen=True, slots=True)
class _Ratio:
    """A loss over rows: its sum, what it is counted over, and how far the mean might be off."""

    total: float
    count: float
    rows: int
    interval: Interval | None

    @classmethod
    def of(cls, rows: Sequence[LossTerms], name: str) -> Self:
        sums, counts = [float(row.sums[name]) for row in rows], [float(row.counts[name]) for row in rows]
        return cls(sum(sums), sum(counts), sum(map(bool, counts)), ratio_interval(sums, counts))

    @property
    def value(self) -> float:
        return self.total / self.count


def _text_metrics(pipeline: Pipeline, source: SourceConfig, found: _Ratio) -> dict[str, Metric]:
    texts = list(_texts(pipeline, source))
    tokens = sum(len(ids) + 1 for ids in texts)
    size = sum(len(pipeline.tokenizer.decode(ids).encode()) for ids in texts)
    if tokens != int(found.count):
        raise ValueError(f"the model was evaluated on {int(found.count)} of {tokens} tokens")
    metrics = {}
    threshold = None
    training = next((known for known in pipeline.config.data.sources if known.name == source.name), None)
    if training is not None:
        tell = ProgressLines(f"fitting the bigram on the training text of {source.name}")
        bigram = Bigram(tell.each(_texts(pipeline, training)), pipeline.config.model.vocabulary)
        nats = bigram.nats(tell.each(texts))
        threshold = nats / tokens
        how = "interpolated absolute-discount (0.75) bigram, fitted on the same training text and tokenizer"
        for unit, count in (("token", tokens), ("byte", size)):
            metrics[f"bigram_nats_per_{unit}"] = Metric(
                value=nats / count,
                unit=f"nats/{unit}",
                higher_is_better=False,
                how=f"{how}, over {count} {unit}s",
            )
    spread: dict[str, Any] = {"count": found.rows, "higher_is_better": False}
    metrics["text_loss_nats_per_token"] = Metric(
        value=found.value,
        interval=found.interval,
        unit="nats/token",
        threshold=threshold,
        **spread,
        how=f"cross entropy over the {tokens} tokens of validation {source.name}, <EOS> included; to beat: the bigram",
    )
    # The bytes of a row are not counted: as many as its tokens have on the whole.
    low_high = found.interval and (found.interval[0] * tokens / size, found.interval[1] * tokens / size)
    metrics["text_loss_nats_per_byte"] = Metric(
        value=found.total / size,
        interval=low_high,
        unit="nats/byte",
        how=f"the same over its {size} bytes",
        **spread,
    )
    return metrics


def _texts(pipeline: Pipeline, source: SourceConfig) -> Iterator[list[int]]:
    """Token ids of each document of a text source."""
    for document in documents(pipeline.config, [source], pipeline.tokenizer):
        yield [
            token for part in document.segments if isinstance(part, TextSegment) for token in part.token_ids
        ]
