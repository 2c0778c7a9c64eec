"""The plan: every document once an epoch, shares of tokens, little padding, pairs whole, and any state resumable."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import pytest

from transfusion.data.planning.epoch import EpochOrder, SourceLengths, Variant, VariantRule, Windows
from transfusion.data.planning.packing import (
    DocumentSpan,
    Planner,
    PlanSettings,
    RowPlan,
    balanced_order,
    plan_once,
)
from transfusion.errors import UserError

PATCHES = 16
CAPTIONS = 3
RULE = VariantRule(seed=0, caption_first=0.8, caption_dropout=0.1)


def sources(pairs: int = 300, texts: int = 40, share: float = 1.0) -> list[SourceLengths]:
    generator = np.random.default_rng(0)
    return [
        SourceLengths(
            name="pairs",
            schedule=((0, 1.0),),
            caption_start_N=np.arange(pairs + 1) * CAPTIONS,
            text_tokens_C=generator.integers(2, 12, pairs * CAPTIONS),
            images_N=np.ones(pairs, np.int64),
            interleaved_N=np.zeros(pairs, bool),
            patches=PATCHES,
        ),
        SourceLengths(
            name="texts",
            schedule=((0, share),),
            # Some texts are many rows long, as reference text is.
            text_tokens_C=(generator.lognormal(6, 1.5, texts)).astype(np.int64) + 1,
            caption_start_N=np.arange(texts + 1),
            images_N=np.zeros(texts, np.int64),
            interleaved_N=np.zeros(texts, bool),
            patches=PATCHES,
        ),
    ]


def settings(rows: int = 8, sequence_length: int = 512, seed: int = 0) -> PlanSettings:
    rule = VariantRule(seed=seed, caption_first=0.8, caption_dropout=0.1)
    return PlanSettings(rows=rows, sequence_length=sequence_length, packing_buffer=16, variants=rule)


def length(source: SourceLengths, span: DocumentSpan) -> int:
    text = int(source.text_tokens_C[source.caption_start_N[span.sample] + span.caption])
    return {Variant.TEXT: text + 2, Variant.CAPTION_DROPPED: PATCHES + 4}.get(
        Variant(span.variant), text + PATCHES + 4
    )


def check_rows(
    given: list[SourceLengths], rows: list[RowPlan], sequence_length: int
) -> dict[tuple[int, int, int], int]:
    """No row is too long, pairs are whole, parts of texts join without gap; returns tokens by document."""
    parts: dict[tuple[int, int, int], list[tuple[int, int]]] = collections.defaultdict(list)
    for row in rows:
        assert 0 < sum(span.tokens for span in row) <= sequence_length
        for span in row:
            if span.variant != Variant.TEXT:
                assert span.first == 0 and span.tokens == length(given[span.source], span)
            parts[span.source, span.epoch, span.sample].append((span.first, span.tokens))
    totals = {}
    for document, found in parts.items():
        assert len({first for first, _ in found}) == len(found), "a part was given twice"
        totals[document] = sum(tokens for _, tokens in found)
    return totals


def test_every_document_exactly_once_an_epoch() -> None:
    given = sources()
    planner = Planner(given, settings())
    batches = [planner.next_batch() for _ in range(64 * 6)]
    assert all(len(batch) == 8 for batch in batches)
    # At a block's end, what is drawn but not yet given stands in the state.
    start = planner.state()["start"]
    waiting = waiting_rows(given, start)
    totals = check_rows(given, [row for batch in batches for row in batch] + waiting, 512)
    for number, source in enumerate(given):
        epochs = start["sources"][source.name][0] // len(source)
        assert epochs >= 2
        for epoch in range(epochs):
            drawn = {sample: tokens for (s, e, sample), tokens in totals.items() if (s, e) == (number, epoch)}
            assert sorted(drawn) == list(range(len(source)))
        whole = [document for document in totals if document[0] == number and document[1] < epochs]
        documents = EpochOrder(source, RULE).documents(np.arange(epochs * len(source)))
        columns = (documents.epoch.tolist(), documents.sample.tolist(), documents.tokens.tolist())
        tokens = {(epoch, sample): length for epoch, sample, length in zip(*columns, strict=True)}
        assert all(totals[d] == tokens[d[1:]] for d in whole)


def waiting_rows(given: list[SourceLengths], start: dict[str, Any]) -> list[RowPlan]:
    """Rows that the state of a block's start holds."""
    rows = []
    for row in start["open"] + start["ready"]:
        spans = []
        for part in row:
            code, first, tokens = part if isinstance(part, list) else (part, 0, 0)
            behind, number = divmod(code, len(given))
            draw = start["sources"][given[number].name][0] - behind
            columns = EpochOrder(given[number], RULE).documents(np.array([draw]))
            found = columns._make(column.item() for column in columns)
            length = tokens or found.whole
            spans.append(
                DocumentSpan(number, found.epoch, found.sample, first, length, found.variant, found.caption)
            )
        rows.append(tuple(spans))
    return rows


@pytest.mark.parametrize("share", [0.25, 1.0, 3.0])
def test_shares_of_tokens_and_padding(share: float) -> None:
    planner = Planner(sources(share=share), settings())
    wanted = share / (1 + share)
    totals, shares, used = np.zeros(2), [], 0
    for _ in range(64 * 4):
        batch = planner.next_batch()
        tokens = np.zeros(2)
        for span in (span for row in batch for span in row):
            tokens[span.source] += span.tokens
        totals += tokens
        used += int(tokens.sum())
        shares.append(tokens[1] / tokens.sum())
    assert abs(totals[1] / totals.sum() - wanted) < 0.01
    # Each batch of eight rows, though some texts are longer than a whole batch.
    assert np.abs(np.array(shares) - wanted).max() < 0.06
    assert used / (64 * 4 * 8 * 512) > 0.985


def test_texts_are_not_cut_short() -> None:
    planner = Planner(sources(), settings())
    given = sources()
    for _ in range(128):
        for span in (span for row in planner.next_batch() for span in row):
            whole = span.tokens == length(given[span.source], span)
            assert whole or span.tokens >= settings().min_span


def test_any_batch_can_be_resumed_from_a_small_state() -> None:
    planner = Planner(sources(), settings())
    states, batches = [], []
    for _ in range(150):
        states.append(json.dumps(planner.state()))
        batches.append(planner.next_batch())
    assert max(map(len, states)) < 6_000
    assert not any(word in states[-1] for word in ("rank", "world", "worker"))
    for first in (0, 1, 63, 64, 65, 127, 128, 140):
        resumed = Planner(sources(), settings(), json.loads(states[first]))
        assert [resumed.next_batch() for _ in range(first, 150)] == batches[first:]


def test_a_state_of_other_data_is_refused() -> None:
    state = Planner(sources(), settings()).state()
    for other in (sources(pairs=301), sources(share=2.0)):
        with pytest.raises(UserError, match="differ from those this run was started with"):
            Planner(other, settings(), state)
    with pytest.raises(UserError, match=r"run\.dir"):
        Planner(sources(), settings(seed=1), state)


def test_ranks_get_about_the_same_text() -> None:
    planner = Planner(sources(), settings(rows=24))
    for _ in range(40):
        batch = planner.next_batch()
        text = [sum(span.tokens for span in row if span.variant == Variant.TEXT) for row in batch]
        for ranks in (2, 3, 4):
            sums = [sum(text[rank::ranks]) for rank in range(ranks)]
            assert max(sums) - min(sums) < 0.35 * sum(text) / ranks


def test_variants_follow_their_shares_and_epochs_differ() -> None:
    epoch_order = EpochOrder(sources(pairs=20_000)[0], RULE)
    first, second = (epoch_order.documents(epoch * 20_000 + np.arange(20_000)) for epoch in range(2))
    shares = np.bincount(first.variant, minlength=4) / 20_000
    assert abs(shares[Variant.CAPTION_DROPPED] - 0.1) < 0.01
    assert abs(shares[Variant.CAPTION_FIRST] - 0.9 * 0.8) < 0.015
    assert abs(shares[Variant.IMAGE_FIRST] - 0.9 * 0.2) < 0.01
    by_sample = [epoch.variant[np.argsort(epoch.sample)] for epoch in (first, second)]
    assert 0.2 < (by_sample[0] != by_sample[1]).mean() < 0.6
    assert (first.sample != second.sample).any()


def test_captions_are_chosen_evenly_and_anew_each_epoch() -> None:
    epoch_order = EpochOrder(sources(pairs=20_000)[0], RULE)
    drawn = [epoch_order.documents(epoch * 20_000 + np.arange(20_000)) for epoch in range(2)]
    first, second = (epoch.caption[np.argsort(epoch.sample)] for epoch in drawn)
    assert np.allclose(np.bincount(first) / 20_000, 1 / CAPTIONS, atol=0.015)
    assert abs((first == second).mean() - 1 / CAPTIONS) < 0.015


def test_one_pass_holds_every_document_once() -> None:
    given = sources()
    totals = check_rows(given, list(plan_once(given, settings())), 512)
    assert len(totals) == 340 and {epoch for _, epoch, _ in totals} == {0}
    text = sum(tokens for (source, _, _), tokens in totals.items() if source == 1)
    assert text == int(given[1].text_tokens_C.sum()) + 2 * 40


@pytest.mark.parametrize("sequence_length", [32, 64, 4096])
def test_extreme_rows(sequence_length: int) -> None:
    given = sources()
    planner = Planner(given, settings(rows=3, sequence_length=sequence_length))
    check_rows(given, [row for _ in range(40) for row in planner.next_batch()], sequence_length)


def scheduled(*schedules: tuple[tuple[int, float], ...]) -> list[SourceLengths]:
    return [
        dataclasses.replace(source, schedule=schedule)
        for source, schedule in zip(sources(), schedules, strict=True)
    ]


def test_shares_change_at_their_step() -> None:
    given = scheduled(((0, 1.0),), ((0, 0.0), (70, 3.0), (200, 1.0)))
    planner = Planner(given, settings())
    shares, states = [], []
    for _ in range(300):
        states.append(json.dumps(planner.state()))
        tokens = np.zeros(2)
        for span in (span for row in planner.next_batch() for span in row):
            tokens[span.source] += span.tokens
        shares.append(tokens[1] / tokens.sum())
    # Rows that were open at a change still have what was drawn before.
    assert max(shares[:70]) == 0
    assert abs(np.mean(shares[75:200]) - 0.75) < 0.01 and np.abs(np.array(shares[75:200]) - 0.75).max() < 0.08
    assert abs(np.mean(shares[205:]) - 0.5) < 0.01
    for first in (69, 70, 71, 199, 200, 230):
        resumed = Planner(given, settings(), json.loads(states[first]))
        for step in range(first, first + 3):
            assert json.dumps(resumed.state()) == states[step]
            resumed.next_batch()


def test_a_source_that_was_rare_is_not_held_back() -> None:
    """One long text under a share of a thousandth is a lead of millions of tokens; a new share begins anew."""
    planner = Planner(scheduled(((0, 1.0),), ((0, 0.001), (64, 1.0))), settings())
    for _ in range(68):
        planner.next_batch(0, 8)
    tokens = np.zeros(2)
    for _ in range(8):
        for span in (span for row in planner.next_batch() for span in row):
            tokens[span.source] += span.tokens
    assert abs(tokens[1] / tokens.sum() - 0.5) < 0.05


@pytest.mark.slow
def test_what_was_drawn_never_drifts_from_the_shares() -> None:
    """Clocks go on from block to block: at any block's end no source is ahead by more than a row or so."""
    given = sources()
    planner = Planner(given, settings())
    epoch_orders = [EpochOrder(source, RULE) for source in given]
    for block in range(1, 21):
        for _ in range(64):
            planner.next_batch(0, 8)
        start = planner.state()["start"]
        assert start["batch"] == 64 * block
        drawn = []
        for epoch_order in epoch_orders:
            draw, first, _ = start["sources"][epoch_order.source.name]
            drawn.append(int(epoch_order.documents(np.arange(draw)).tokens.sum()) + first)
        assert abs(drawn[0] - drawn[1]) <= 2 * 512


def test_the_poorest_batch_is_dealt_the_richest_row() -> None:
    text = np.arange(64 * 8)
    order = balanced_order(text, 8, turn=0)
    assert sorted(order.tolist()) == text.tolist()
    sums = text[order].reshape(64, 8).sum(1)
    assert sums.max() - sums.min() <= 64
    # Among equals the turn decides, so that blocks do not all serve the same batch first.
    assert (
        balanced_order(np.zeros(64, np.int64), 1, turn=0) != balanced_order(np.zeros(64, np.int64), 1, turn=1)
    ).any()


def test_ranks_are_given_their_own_rows() -> None:
    whole = Planner(sources(), settings())
    ranks = [Planner(sources(), settings()) for _ in range(4)]
    for _ in range(70):
        batch = whole.next_batch()
        for rank, planner in enumerate(ranks):
            assert planner.next_batch(rank, 4) == batch[rank::4]
    assert len({json.dumps(planner.state()) for planner in [whole, *ranks]}) == 1


def test_the_stream_of_local_sources_stays_what_it_is() -> None:
    """Windows are of remote sources alone: runs that were begun before there were any go on."""
    common: dict[str, Any] = {"schedule": ((0, 1.0),), "interleaved_N": np.zeros(500, bool), "patches": 16}
    given = [
        SourceLengths(
            name="pairs",
            caption_start_N=np.arange(501) * 2,
            text_tokens_C=np.arange(1000) % 13 + 2,
            images_N=np.ones(500, np.int64),
            **common,
        ),
        SourceLengths(
            name="texts",
            caption_start_N=np.arange(501),
            text_tokens_C=np.arange(500) * 7 % 900 + 1,
            images_N=np.zeros(500, np.int64),
            **common,
        ),
    ]
    planner = Planner(given, settings(seed=5))
    digest = hashlib.sha256()
    for _ in range(70):
        batch = [[tuple(map(int, span)) for span in row] for row in planner.next_batch()]
        digest.update(repr(batch).encode())
    assert (planner.state()["fingerprint"], digest.hexdigest()[:16]) == ("2a1cbb702ded", "0c49aca3cee8a144")
    windowed = dataclasses.replace(given[0], windows=Windows(np.full(10, 50), 3))
    prints = {Planner([source], settings()).state()["fingerprint"] for source in (given[0], windowed)}
    assert len(prints) == 2
