"""A document as the model sees it agrees with the plain forward and with the rules of the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from transfusion.errors import UserError
from transfusion.generate import Pipeline, inspection
from transfusion.schema import Batch, ImageSegment, SpecialToken, TextSegment

from .conftest import Truth


def test_losses_are_those_of_the_plain_forward(
    build_pipeline: Callable[..., Pipeline],
    pack: Callable[..., Batch],
    make_image: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspection, "_PIECE", 7)
    pipeline = build_pipeline()
    truth, image = Truth(pipeline, pack), torch.from_numpy(make_image(3))
    found = pipeline.inspect(["one", image, "two seven"])
    one, two = (pipeline.tokenizer.encode(text) for text in ("one", "two seven"))
    segments = [TextSegment(tuple(one)), ImageSegment(None, 16), TextSegment(tuple(two))]
    clean = pipeline.runner.codec.encode(image[None])[0]
    state_SD = truth.states(segments, [clean], [0])
    with torch.no_grad():
        nats_SV = -truth.model.lm_head(state_SD).double().log_softmax(-1)
    ids = found.layout.token_ids_S.tolist()
    boi, patch, eoi = SpecialToken.BEGIN_IMAGE, SpecialToken.PATCH, SpecialToken.END_IMAGE
    assert ids == [SpecialToken.BEGIN_DOCUMENT, *one, boi, *[patch] * 16, eoi, *two]
    assert found.nats[0] is None
    for place, (token, nats) in enumerate(zip(ids[1:], found.nats[1:], strict=True)):
        if token in (patch, eoi):
            assert nats is None
        else:
            assert nats == pytest.approx(nats_SV[place, token].item(), abs=1e-4)
    assert "".join(found.texts) == "<BOS>one<BOI><EOI>two seven"


def test_what_fills_the_row_can_be_looked_at_and_no_more(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline()
    (parts,) = pipeline.generate(["one"], max_tokens=1000)
    assert len(pipeline.inspect(parts).texts) > 250
    assert isinstance(parts[1], str)
    with pytest.raises(UserError, match=r"a document takes .* positions"):
        pipeline.inspect([parts[0], parts[1], "d" * 20])
