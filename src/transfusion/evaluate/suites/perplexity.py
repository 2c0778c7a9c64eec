"""The suite of perplexities: how well texts are predicted, as lm-evaluation-harness counts it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from transfusion.config import SourceConfig
from transfusion.data.index.source_index import build_indexes
from transfusion.errors import UserError, shown
from transfusion.evaluate.metrics.bootstrap import ratio_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites.settings import PerplexitySuite
from transfusion.evaluate.token_windows import rolling_windows, score_windows
from transfusion.generate.pipeline import Pipeline

_MAX_WORD_NATS = 700
# A text and its token ids.
Text = tuple[str, Sequence[int]]


def perplexity(pipeline: Pipeline, out: Path, settings: PerplexitySuite) -> dict[str, Metric]:
    """Nats a token and a byte, bits a byte and word perplexity of each file, or of each validation source of texts.

    A .jsonl holds a text in each line, under `text`. Leaves no evidence. Raises UserError for a file that cannot be
    read, and where there is no text.
    """
    texts = [Path(name) for name in settings.texts]
    found = {path.stem: _of_file(pipeline, path) for path in texts}
    if len(found) < len(texts):
        raise UserError(
            "two files of perplexity.texts have the same name, which their metrics would share; rename one"
        )
    if not texts:
        found = {source.name: _of_source(pipeline, source) for source in pipeline.config.data.validation}
    metrics: dict[str, Metric] = {}
    for name, some in found.items():
        if any(ids for _, ids in some):
            metrics |= {f"{name}_{what}": metric for what, metric in _measured(pipeline, name, some).items()}
        elif texts:
            raise UserError(f"{name} of perplexity.texts holds no text; leave it out")
    if not metrics:
        raise UserError("data.validation has no documents of text alone; name files in perplexity.texts")
    return metrics


def _measured(pipeline: Pipeline, name: str, texts: Sequence[Text]) -> dict[str, Metric]:
    length = pipeline.config.data.sequence_length
    windows = [rolling_windows(ids, length) for _, ids in texts]
    scores = iter(
        score_windows(
            [window for some in windows for window in some],
            pipeline.runner,
            f"perplexity of {name}, windows of {length} tokens",
        )
    )
    nats_N = [-math.fsum(next(scores).log_likelihood for _ in some) for some in windows]
    tokens_N = [len(ids) for _, ids in texts]
    bytes_N = [len(text.encode()) for text, _ in texts]
    words_N = [len(re.split(r"\s+", text)) for text, _ in texts]
    how = (
        f"{{}} of {len(texts)} texts of {name} ({sum(tokens_N)} tokens, {sum(bytes_N)} bytes, {sum(words_N)} words) in"
        f" windows of {length} tokens: rolling log-likelihood of lm-evaluation-harness with context 1, <BOS> first,"
        " <EOS> not counted"
    )
    figures: dict[str, tuple[str, str, Sequence[int], Callable[[float], float]]] = {
        "nats_per_token": ("nats/token", "cross entropy a token", tokens_N, float),
        "nats_per_byte": ("nats/byte", "cross entropy a byte", bytes_N, float),
        "bits_per_byte": ("bits/byte", "cross entropy a byte", bytes_N, lambda nats: nats / math.log(2)),
    }
    nats = math.fsum(nats_N)
    # A page without spaces is one word, whose perplexity may be beyond all numbers.
    if nats / sum(words_N) < _MAX_WORD_NATS:
        figures["word_perplexity"] = ("", "exp of the cross entropy a word", words_N, _exp)
    metrics = {}
    for what, (unit, sort, counts_N, scale) in figures.items():
        around = ratio_interval(nats_N, counts_N)
        metrics[what] = Metric(
            value=scale(nats / sum(counts_N)),
            unit=unit,
            higher_is_better=False,
            how=how.format(sort),
            count=len(texts),
            interval=around and (scale(around[0]), scale(around[1])),
        )
    return metrics


def _exp(nats: float) -> float:
    return math.exp(min(nats, _MAX_WORD_NATS))


def _of_source(pipeline: Pipeline, source: SourceConfig) -> list[Text]:
    """The documents of text alone."""
    found: list[Text] = []
    for index in build_indexes(pipeline.config, [source], pipeline.tokenizer):
        for sample in np.flatnonzero(index.lengths.images_N == 0).tolist():
            ids = index.text_ids(sample).tolist()
            found.append((pipeline.tokenizer.decode(ids), ids))
    return found


def _of_file(pipeline: Pipeline, path: Path) -> list[Text]:
    return [(text, pipeline.tokenizer.encode(text)) for text in _texts_in(path)]


def _texts_in(path: Path) -> Iterator[str]:
    try:
        content = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8"
        raise UserError(
            f"cannot read {shown(path)} of perplexity.texts: {reason}; name a file of text"
        ) from None
    if path.suffix.lower() != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(
                    f'{shown(path)} of perplexity.texts: line {number} is no {{"text": "..."}}; repair or remove it'
                ) from None
            yield text
