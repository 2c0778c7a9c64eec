"""The data benchmark: tokens are accounted for, and a missed bar is told."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import data
import exact_batches
from transfusion.data.index.source_index import build_indexes
from transfusion.data.loading.loader import plan_settings
from transfusion.data.viewing.plan_stats import measure_plan
from transfusion.sequence.tokenizer import Tokenizer


def test_every_token_is_accounted_for(tmp_path: Path) -> None:
    config = exact_batches.make_config(tmp_path)
    indexes = build_indexes(config, config.data.sources, Tokenizer(config.data.tokenizer))
    lengths = [index.lengths for index in indexes]
    found = measure_plan(lengths, plan_settings(config), batches=64)
    assert data.tokens_dropped(lengths, config, found) == 0
    assert data.tokens_dropped(lengths, config, dataclasses.replace(found, tokens=found.tokens - 7)) == 7


def test_missed_bars() -> None:
    good = {"tokens_per_second": 10e6, "padding_share": 0.005, "images_cut": 0}
    assert data.missed(good) == []
    assert data.missed(good | {"images_cut": 1}) == ["images_cut is 1, must be at most 0"]
    assert data.missed(good | {"tokens_per_second": 9e6}) == [
        "tokens_per_second is 9e+06, must be at least 1e+07"
    ]


def test_transparent_is_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    flat = data.on_white(half)
    assert [flat.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]
