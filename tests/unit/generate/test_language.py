"""The choice of the next token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from transfusion.inference.text_sampling import TextSampling, mask_logits, sample_token
from transfusion.schema import SpecialToken


def _of_rows(sampling: TextSampling, rows: Iterable[int]) -> list[TextSampling]:
    """Each row has a seed of its own."""
    return [replace(sampling, seed=sampling.seed + row) for row in rows]


def _draws(logit_V: torch.Tensor, sampling: TextSampling, count: int) -> torch.Tensor:
    chosen = sample_token(logit_V.expand(count, -1), _of_rows(sampling, range(count)), [0] * count)
    return torch.bincount(chosen, minlength=len(logit_V)) / count


def test_only_text_and_two_control_tokens_can_be_chosen() -> None:
    logit_RV = mask_logits(torch.zeros(2, 40), 30, [4], torch.tensor([[True], [False]]))
    allowed = [logit_V.isfinite().nonzero().flatten().tolist() for logit_V in logit_RV]
    text = list(range(len(SpecialToken), 30))
    assert allowed == [
        [SpecialToken.END_DOCUMENT, SpecialToken.BEGIN_IMAGE, *text],
        [SpecialToken.END_DOCUMENT, *text],
    ]
    control = torch.full((200, 40), 0.0)
    control[:, : len(SpecialToken)] = 9.0
    restricted = mask_logits(control, 30, [4], torch.zeros(200, 1, dtype=torch.bool))
    sampling = TextSampling(temperature=5.0)
    chosen = set(sample_token(restricted, _of_rows(sampling, range(200)), [0] * 200).tolist())
    assert chosen <= {int(SpecialToken.END_DOCUMENT), *text}


def test_greedy_takes_the_likeliest() -> None:
    logit_RV = torch.randn(5, 50)
    assert torch.equal(sample_token(logit_RV, [TextSampling()] * 5, [0] * 5), logit_RV.argmax(-1))
    cold = TextSampling(temperature=1e-4)
    assert torch.equal(sample_token(logit_RV, [cold] * 5, [0] * 5), logit_RV.argmax(-1))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    probability = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 20_000
    for temperature in (1.0, 2.0):
        expected = (probability.log() / temperature).softmax(-1)
        drawn = _draws(probability.log(), TextSampling(temperature=temperature, seed=3), count)
        assert ((drawn - expected).abs() < 5 * (expected / count).sqrt()).all()


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    logit_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    count = 20_000
    for top_p, kept in ((0.01, [1]), (0.5, [1]), (0.6, [1, 3]), (0.8, [1, 3, 2]), (1.0, [0, 1, 2, 3])):
        drawn = _draws(logit_V, TextSampling(temperature=1.0, top_p=top_p), count)
        expected = torch.zeros(4)
        expected[kept] = logit_V[kept].exp() / logit_V[kept].exp().sum()
        assert ((drawn - expected).abs() <= 5 * (expected / count).sqrt()).all(), top_p


def test_forbidden_tokens_are_never_drawn() -> None:
    logit_V = torch.full((10,), -math.inf)
    logit_V[[2, 7]] = 0.0
    for top_p in (0.3, 1.0):
        drawn = _draws(logit_V, TextSampling(temperature=3.0, top_p=top_p), 5000)
        assert drawn[[2, 7]].sum() == 1.0


def test_a_draw_depends_on_seed_row_and_number_of_the_token() -> None:
    logit_RV = torch.zeros(4, 1000)
    settings = TextSampling(temperature=1.0, seed=5)
    rows, indices = [0, 1, 1, 2], [0, 0, 1, 0]
    samplings = _of_rows(settings, rows)
    together = sample_token(logit_RV, samplings, indices)
    for i in range(4):
        assert sample_token(logit_RV[:1], samplings[i : i + 1], indices[i : i + 1]) == together[i]
    assert len(set(together.tolist())) == 4
    shifted = TextSampling(temperature=1.0, seed=6)
    assert sample_token(logit_RV[:1], [shifted], [0]) == together[1]


def test_rows_of_one_call_have_settings_of_their_own() -> None:
    logit_RV = torch.randn(6, 50)
    samplings = [
        TextSampling(),
        TextSampling(temperature=1.0, seed=1),
        TextSampling(temperature=3.0, seed=1),
        TextSampling(temperature=1.0, top_p=0.2, seed=4),
        TextSampling(),
        TextSampling(temperature=1.0, top_p=1e-6, seed=9),
    ]
    together = sample_token(logit_RV, samplings, range(6))
    alone = [sample_token(logit_RV[i : i + 1], samplings[i : i + 1], [i]) for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]
    assert [together[i] for i in (0, 4, 5)] == [logit_RV[i].argmax() for i in (0, 4, 5)]
