"""How likely the model finds texts and images that are given.

R rows, S positions, D width, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.families import Family
from transfusion.generate.request import Part, media, segments
from transfusion.inference.cache import pages_for
from transfusion.inference.image_scores import ROWS, GivenImage, Score
from transfusion.inference.runner import Media, ModelRunner
from transfusion.schema import TextSegment
from transfusion.sequence.layout import Layout
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer

# Tokens whose logits are in memory at once.
_LOGITS = 512


class TokenScore(NamedTuple):
    """How likely tokens are.

    Attributes:
        log_likelihood: Of all of them, in nats.
        is_greedy: Whether each is the likeliest one where it stands.
    """

    log_likelihood: float
    is_greedy: bool


class _Document(NamedTuple):
    layout: Layout
    images: list[Tensor | Media]
    # Tokens at its end that are scored.
    targets: int


def score_texts(
    contexts: Sequence[Sequence[Part]], texts: Sequence[str], runner: ModelRunner, tokenizer: Tokenizer
) -> list[Score]:
    """The log-likelihood of each text behind its context, all in one call of the model. Exact."""
    documents = [
        _text_document(context, text, runner, tokenizer)
        for context, text in zip(contexts, texts, strict=True)
    ]
    cache = runner.cache(sum(pages_for(len(document.layout)) for document in documents))
    rows = [cache.row(len(document.layout)) for document in documents]
    block = runner.prompt_block(
        [(document.layout, 0, len(document.layout)) for document in documents],
        [image for document in documents for image in document.images],
    )
    state_RSD = runner.states(cache.view(rows), block)
    scores = []
    for document, state_SD in zip(documents, state_RSD, strict=True):
        end = len(document.layout)
        token_N = torch.from_numpy(document.layout.token_ids_S[end - document.targets :]).to(state_SD.device)
        score = _score_states(state_SD[end - document.targets - 1 : end - 1], token_N, runner)
        scores.append(Score(score.log_likelihood, 0.0, document.targets, score.is_greedy))
    return scores


@torch.no_grad()
def score_tokens(
    rows: Sequence[Sequence[int]], targets: Sequence[int], runner: ModelRunner
) -> list[TokenScore]:
    """How likely the last tokens of each row are behind those before them, all in one call of the model. Exact.

    rows: token ids as they are, with <BOS> where a document begins. targets: how many of each row are scored, fewer
    than it has.
    """
    cache = runner.cache(sum(pages_for(len(row) - 1) for row in rows))
    view = cache.view([cache.row(len(row) - 1) for row in rows])
    state_RSD = runner.states(view, runner.text_block([row[:-1] for row in rows]))
    scores = []
    for row, count, state_SD in zip(rows, targets, state_RSD, strict=True):
        token_N = torch.tensor(row[len(row) - count :], device=state_SD.device)
        scores.append(_score_states(state_SD[len(row) - 1 - count : len(row) - 1], token_N, runner))
    return scores


def _score_states(state_ND: Tensor, token_N: Tensor, runner: ModelRunner) -> TokenScore:
    """Of the token that follows each state."""
    nats, greedy = 0.0, True
    for some_ND, id_N in zip(state_ND.split(_LOGITS), token_N.split(_LOGITS), strict=True):
        logit_NV = runner.logits(some_ND)
        nats += logit_NV.double().log_softmax(-1).gather(1, id_N[:, None]).sum().item()
        greedy = greedy and bool((logit_NV.argmax(-1) == id_N).all())
    return TokenScore(nats, greedy)


def _text_document(
    context: Sequence[Part], text: str, runner: ModelRunner, tokenizer: Tokenizer
) -> _Document:
    """Context and text as one document. A text that continues a text is tokenized with it."""
    *before, head = context if context and isinstance(context[-1], str) else [*context, ""]
    assert isinstance(head, str)
    known, ids = tokenizer.encode(head), tokenizer.encode(head + text)
    common = 0
    while common < min(len(known), len(ids)) and known[common] == ids[common]:
        common += 1
    layout = runner.lay_out([*segments(before, runner, tokenizer), TextSegment(tuple(ids))], finished=False)
    return _Document(layout, media(before), len(ids) - common)


def score_image(
    context: Sequence[Part],
    image: Tensor,
    runner: ModelRunner,
    tokenizer: Tokenizer,
    config: Config,
    family: Family,
    *,
    samples: int,
    seed: int,
) -> Score:
    """How likely an image, uint8 [C, H, W], is behind its context. Raises UserError for a family that cannot tell."""
    if family.score is None:
        raise UserError(f"images of model.family {config.model.family} cannot be scored; score texts")
    size = Size(*image.shape[1:])
    layout = runner.lay_out([*segments(context, runner, tokenizer), runner.image(size)], finished=False)
    count = layout.images[-1][0]
    drawn = min(samples, ROWS)
    cache = runner.cache(pages_for(count) + (drawn + 1) * (1 + pages_for(runner.sizes.patches(size) + 1)))
    row = cache.row(count)
    runner.read(cache.view([row]), runner.prompt_block([(layout, 0, count)], media(context)))
    encoded = runner.codec.encode(image[None].to(runner.device))[0]
    return family.score(runner, config.diffusion, GivenImage(encoded, size, cache, row), samples, seed)
