"""What a plan looks like: the survey counts what the rows hold, and costs no memory for the samples it stands for."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest

from transfusion.config import load_config
from transfusion.data.planning.epoch import SourceLengths, Variant, VariantRule
from transfusion.data.planning.packing import Planner, PlanSettings
from transfusion.data.viewing.plan_stats import (
    describe,
    lognormal_lengths,
    measure_config,
    measure_plan,
    simulated,
)
from transfusion.errors import UserError

HALF = ((0, 0.5),)
SETTINGS = PlanSettings(
    rows=8,
    sequence_length=4096,
    packing_buffer=16,
    variants=VariantRule(seed=0, caption_first=0.8, caption_dropout=0.1),
)


def real() -> list[SourceLengths]:
    random = np.random.default_rng(0)
    pairs, texts = 6000, 3000
    return [
        SourceLengths(
            name="pairs", schedule=HALF, patches=64, images_N=np.ones(pairs, int), interleaved_N=np.zeros(pairs, bool),
            caption_start_N=np.arange(pairs + 1), text_tokens_C=random.integers(3, 16, pairs),
        ),
        SourceLengths(
            name="texts", schedule=HALF, patches=64, images_N=np.zeros(texts, int), interleaved_N=np.zeros(texts, bool),
            caption_start_N=np.arange(texts + 1),
            text_tokens_C=np.minimum(random.lognormal(5.7, 1.2, texts).astype(np.int64) + 1, 53_000),
        ),
    ]  # fmt: skip


def test_it_counts_what_the_rows_hold() -> None:
    found = measure_plan(real(), SETTINGS, batches=64, ranks=4)
    planner = Planner(real(), SETTINGS)
    tokens: collections.Counter[str] = collections.Counter()
    spans, worst, cut, imbalance = 0, 0.0, 0, []
    lengths = real()[1].text_tokens_C + 2
    for _ in range(64):
        batch = planner.next_batch()
        here: collections.Counter[str] = collections.Counter()
        text = [0] * 4
        for number, row in enumerate(batch):
            for span in row:
                spans += 1
                here[("pairs", "texts")[span.source]] += span.tokens
                is_text = span.variant == Variant.TEXT
                text[number % 4] += span.tokens * is_text
                cut += is_text and span.first == 0 and span.tokens < lengths[span.sample]
        worst = max(worst, abs(here["texts"] / here.total() - 0.5))
        imbalance.append(max(text) / (sum(text) / 4) - 1)
        tokens += here
    assert found.batches == 64 and found.spans == spans and found.tokens == tokens.total()
    assert {name: each.tokens for name, each in found.sources.items()} == dict(tokens)
    assert found.sources["texts"].max_share_error_of_a_batch == pytest.approx(worst)
    assert found.texts_cut == cut and found.text_imbalance == pytest.approx(np.mean(imbalance))
    assert found.padding_share == pytest.approx(1 - tokens.total() / (64 * 8 * 4096))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["sources"]["pairs"]["samples"] == 6000
    assert "padding" in describe(found)


def test_the_bars_of_packing() -> None:
    """Rows of 4,096, half text: at most 0.5 % of padding, no image cut, and the shares of batches and of the whole."""
    found = measure_plan(real(), SETTINGS, batches=640)
    assert found.tokens > 20_000_000
    assert found.padding_share < 0.005 and found.images_cut == 0
    for each in found.sources.values():
        assert each.share_error < 0.001 and each.max_share_error_of_a_batch < 0.03
    assert found.state_bytes < 6_000


def test_simulated_lengths_are_like_the_real_ones() -> None:
    pairs, texts = real()
    many = simulated(texts, 10_000_000)
    drawn = many.text_tokens(np.arange(200_000), np.zeros(200_000, np.int64))
    assert drawn.mean() == pytest.approx(texts.text_tokens_C.mean(), rel=0.03)
    assert np.quantile(drawn, 0.9) == pytest.approx(np.quantile(texts.text_tokens_C, 0.9), rel=0.03)
    assert (many.image_tokens(np.arange(100)) == 0).all()
    assert (simulated(pairs, 500).image_tokens(np.arange(100)) == 64).all()
    made = lognormal_lengths("made", HALF, 100, mean_tokens=600.0, spread=1.0)
    assert made.quantiles_Q.mean() == pytest.approx(600, rel=0.03)


def test_hundreds_of_millions_of_samples_take_no_memory() -> None:
    config = load_config(None, ["data.global_batch_size=512", "data.sequence_length=4096"])
    found = measure_config(config, simulate=True, ranks=64, steps=2, samples=700_000_000)
    assert found.sources["pairs"].samples == 700_000_000 and found.added_mib < 100
    assert found.images_cut == 0 and found.text_imbalance < 0.2


def test_what_cannot_be_surveyed() -> None:
    with pytest.raises(UserError, match="use --simulate"):
        measure_config(load_config(None, []))
    with pytest.raises(UserError, match="cannot be shared by 3 ranks"):
        measure_config(load_config(None, ["data.global_batch_size=8"]), simulate=True, ranks=3)
