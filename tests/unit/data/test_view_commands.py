"""Rows drawn and sources told: the page holds what the batch holds, and nothing from elsewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion.config import Config
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.rows import Row, RowSettings, joined
from transfusion.data.viewing.commands import describe_stats, show_rows, stats_config
from transfusion.data.viewing.row_page import _mask_pixels
from transfusion.errors import UserError
from transfusion.schema import ImageSegment, TextSegment
from transfusion.sequence.layout import tokenize_document
from transfusion.sequence.sizes import MediaSizes, Size
from transfusion.sequence.tokenizer import Tokenizer

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, tokenizer: Tokenizer) -> Config:
    return make_config(tokenizer=str(tokenizer.path))


def test_a_page_holds_the_rows_of_the_batch(config: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "rows.html"
    show_rows(config, out, rows=3, step=2)
    text = out.read_text(encoding="utf-8")
    with Loader(config, config.data.sources, tokenizer, rank=0, world_size=1) as loader:
        for _ in range(2):
            loader.next_step()
        (batch,) = loader.next_step()
    here = (batch.media[0].patch_slot_IP[:, 0] < 3 * 256).sum()
    assert text.count('class="image"') == here > 0 and text.count("<section>") == 3
    tokens = [int((row != 2).sum()) for row in batch.modality_BS[:3]]
    assert all(f"{used:,} of 256 positions" in text for used in tokens)
    # Nothing is fetched from elsewhere, and no text of the data becomes markup.
    assert not re.search(r'(src|href)="(?!data:)|https?://[^<]*"|<script', text)
    shown = html.unescape("".join(re.findall(r'<span class="token[^"]*">([^<]*)</span>', text)))
    first_text = tokenizer.decode(batch.token_ids_BS[0][batch.modality_BS[0] == 0][:20].tolist())
    assert first_text.split()[1] in shown


def test_an_image_of_the_rows(config: Config, tmp_path: Path) -> None:
    show_rows(config, tmp_path / "rows.png", rows=2)
    with Image.open(tmp_path / "rows.png") as image:
        assert image.size[0] > 1000
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    shares = {colour: count for count, colour in colours}
    assert shares[0x4F, 0x7C, 0xAC] > 1000 and shares[0xE0, 0x8E, 0x45] > 100
    with pytest.raises(UserError, match=r"must end in \.html or \.png"):
        show_rows(config, tmp_path / "rows.pdf")


def test_mask_pixels_are_the_mask() -> None:
    tokenized = [
        tokenize_document([TextSegment((9, 9)), ImageSegment(None, 4)]),
        tokenize_document([TextSegment((9, 9, 9))]),
    ]
    settings = RowSettings(
        seed=0, sequence_length=20, axes=1, channels=1, latent_channels=1, sizes=MediaSizes((Size(8, 8),), 1, 4),
        noise={},
    )  # fmt: skip
    row: Row = joined(tokenized, settings, (), ())
    pixels = _mask_pixels(row, 20)
    place = np.arange(20)
    seen = (place >= row.first_key_S[:, None]) & (place < row.end_key_S[:, None])
    ahead = seen & (place > place[:, None])
    assert ((pixels != 255).any(-1) == seen).all() and ahead.sum() == 6
    assert (pixels[ahead] == (0xE0, 0x8E, 0x45)).all() and (pixels[seen & ~ahead] == (0x9D, 0xB8, 0xD2)).all()
    # Several pairs in one pixel: their mean.
    assert _mask_pixels(row, 10).shape == (10, 10, 3)
    assert abs((255.0 - _mask_pixels(row, 10)).mean() - (255.0 - pixels).mean()) < 1


def test_statistics_of_the_sources(config: Config) -> None:
    found = stats_config(config, steps=64)
    digits, docs = found["sources"]["digits"], found["sources"]["docs"]
    assert digits["pairs"] == 297 and digits["texts"] == 0 and docs["pairs"] == 0 < docs["texts"]
    assert docs["text_lengths"]["least"] <= docs["text_lengths"]["median"] <= docs["text_lengths"]["greatest"]
    assert abs(digits["share"] - 0.5) < 0.02 and digits["faults"] == {}
    assert "no faults" in describe_stats(found)
    found["sources"]["docs"]["faults"] = {"not UTF-8": 3}
    assert "docs: 3 x not UTF-8" in describe_stats(found)
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        stats_config(Config())
