"""The plan: every document once an epoch, shares of tokens, little padding, pairs whole, and any state resumable."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from transfusion.data.deck import Deck, SourceLengths, Variant, VariantRule
from transfusion.data.planner import Piece, Planner, PlanSettings, RowPlan, plan_once
from transfusion.errors import UserError

PATCHES = 16
RULE = VariantRule(seed=0, caption_first=0.8, caption_drop=0.1)


def sources(pairs: int = 300, texts: int = 40, share: float = 1.0) -> list[SourceLengths]:
    generator = np.random.default_rng(0)
    return [
        SourceLengths(
            name="pairs",
            share=1.0,
            text_tokens_N=generator.integers(2, 12, pairs),
            is_pair_N=np.ones(pairs, bool),
            patches=PATCHES,
        ),
        SourceLengths(
            name="texts",
            share=share,
            # Some texts are many rows long, as reference text is.
            text_tokens_N=(generator.lognormal(6, 1.5, texts)).astype(np.int64) + 1,
            is_pair_N=np.zeros(texts, bool),
            patches=PATCHES,
        ),
    ]


def settings(rows: int = 8, row_length: int = 512, seed: int = 0) -> PlanSettings:
    rule = VariantRule(seed=seed, caption_first=0.8, caption_drop=0.1)
    return PlanSettings(rows=rows, row_length=row_length, open_rows=16, variants=rule)


def length(source: SourceLengths, piece: Piece) -> int:
    text = int(source.text_tokens_N[piece.sample])
    return {Variant.TEXT: text + 2, Variant.CAPTION_DROPPED: PATCHES + 4}.get(
        Variant(piece.variant), text + PATCHES + 4
    )


def check_rows(
    given: list[SourceLengths], rows: list[RowPlan], row_length: int
) -> dict[tuple[int, int, int], int]:
    """No row is too long, pairs are whole, parts of texts join without gap; returns tokens by document."""
    parts: dict[tuple[int, int, int], list[tuple[int, int]]] = collections.defaultdict(list)
    for row in rows:
        assert 0 < sum(piece.tokens for piece in row) <= row_length
        for piece in row:
            if piece.variant != Variant.TEXT:
                assert piece.first == 0 and piece.tokens == length(given[piece.source], piece)
            parts[piece.source, piece.epoch, piece.sample].append((piece.first, piece.tokens))
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
    waiting = [tuple(Piece(*piece) for piece in row) for row in start["open"] + start["ready"]]
    totals = check_rows(
        given, [row for batch in batches for row in batch] + [row for row in waiting if row], 512
    )
    for number, source in enumerate(given):
        epochs, *_ = start["cursors"][source.name]
        assert epochs >= 2
        for epoch in range(epochs):
            drawn = {sample: tokens for (s, e, sample), tokens in totals.items() if (s, e) == (number, epoch)}
            assert sorted(drawn) == list(range(len(source.text_tokens_N)))
        whole = [document for document in totals if document[0] == number and document[1] < epochs]
        deck = Deck(source, RULE)
        for epoch in range(epochs):
            documents = {
                deck.document(epoch, place).sample: deck.document(epoch, place) for place in range(deck.size)
            }
            assert all(totals[d] == documents[d[2]].tokens for d in whole if d[1] == epoch)


@pytest.mark.parametrize("share", [0.25, 1.0, 3.0])
def test_shares_of_tokens_and_padding(share: float) -> None:
    planner = Planner(sources(share=share), settings())
    wanted = share / (1 + share)
    totals, shares, used = np.zeros(2), [], 0
    for _ in range(64 * 4):
        batch = planner.next_batch()
        tokens = np.zeros(2)
        for piece in (piece for row in batch for piece in row):
            tokens[piece.source] += piece.tokens
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
        for piece in (piece for row in planner.next_batch() for piece in row):
            whole = piece.tokens == length(given[piece.source], piece)
            assert whole or piece.tokens >= settings().shortest_piece


def test_any_batch_can_be_resumed_from_a_small_state() -> None:
    planner = Planner(sources(), settings())
    states, batches = [], []
    for _ in range(150):
        states.append(json.dumps(planner.state()))
        batches.append(planner.next_batch())
    assert max(map(len, states)) < 20_000
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
        text = [sum(piece.tokens for piece in row if piece.variant == Variant.TEXT) for row in batch]
        for ranks in (2, 3, 4):
            sums = [sum(text[rank::ranks]) for rank in range(ranks)]
            assert max(sums) - min(sums) < 0.35 * sum(text) / ranks


def test_variants_follow_their_shares_and_epochs_differ() -> None:
    source = sources(pairs=20_000)[0]
    deck = Deck(source, RULE)
    samples = np.arange(20_000)
    first, second = deck.variants(0, samples), deck.variants(1, samples)
    shares = np.bincount(first, minlength=4) / 20_000
    assert abs(shares[Variant.CAPTION_DROPPED] - 0.1) < 0.01
    assert abs(shares[Variant.CAPTION_FIRST] - 0.9 * 0.8) < 0.015
    assert abs(shares[Variant.IMAGE_FIRST] - 0.9 * 0.2) < 0.01
    assert 0.2 < (first != second).mean() < 0.6
    orders = [[deck.document(epoch, place).sample for place in range(50)] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_one_pass_holds_every_document_once() -> None:
    given = sources()
    totals = check_rows(given, list(plan_once(given, settings())), 512)
    assert len(totals) == 340 and {epoch for _, epoch, _ in totals} == {0}
    text = sum(tokens for (source, _, _), tokens in totals.items() if source == 1)
    assert text == int(given[1].text_tokens_N.sum()) + 2 * 40


@pytest.mark.parametrize("row_length", [32, 64, 4096])
def test_extreme_rows(row_length: int) -> None:
    given = sources()
    planner = Planner(given, settings(rows=3, row_length=row_length))
    check_rows(given, [row for _ in range(40) for row in planner.next_batch()], row_length)
