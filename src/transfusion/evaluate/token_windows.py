"""How likely a model finds token ids, cut into windows of its sequence length as lm-evaluation-harness cuts them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.generate.scoring import TokenScore, score_tokens
from transfusion.inference.runner import ModelRunner
from transfusion.tokens import SpecialToken

# Positions of one call of the model, padding included.
_POSITIONS = 8192


class Window(NamedTuple):
    """Token ids, of which the last so many are scored behind the others."""

    ids: Sequence[int]
    targets: int


def rolling_windows(ids: Sequence[int], length: int) -> list[Window]:
    """Windows in which each token of a document is scored once, behind <BOS> and at most `length` tokens.

    Targets never overlap. The last window begins earlier instead of being short, so that its targets see as much as
    they can. This is `loglikelihood_rolling` of lm-evaluation-harness, with a context of 1.
    """
    document = [int(SpecialToken.BEGIN_DOCUMENT), *ids]
    borders = [*range(0, len(ids), length), len(ids)]
    return [
        Window(document[max(0, end - length) : end + 1], end - begin)
        for begin, end in itertools.pairwise(borders)
    ]


def score_windows(windows: Sequence[Window], runner: ModelRunner, doing: str) -> list[TokenScore]:
    """A score for each window. Long ones come first. doing: what is told to whoever waits."""
    tell, scores = ProgressLines(doing), dict[int, TokenScore]()
    rest = sorted(range(len(windows)), key=lambda number: -len(windows[number].ids))
    while rest:
        tell(len(scores), len(windows))
        count = max(1, _POSITIONS // len(windows[rest[0]].ids))
        batch, rest = rest[:count], rest[count:]
        found = score_tokens(
            [windows[number].ids for number in batch], [windows[number].targets for number in batch], runner
        )
        scores |= dict(zip(batch, found, strict=True))
    return [scores[number] for number in range(len(windows))]
