"""What `transfusion data show` and `transfusion data stats` make of a configuration."""

from __future__ import annotations

import collections
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from transfusion.config import Config
from transfusion.data.index.image_shapes import cut_away
from transfusion.data.index.source_index import SourceIndex, build_indexes
from transfusion.data.loading.loader import plan_settings
from transfusion.data.loading.rows import RowBuilder, RowSettings
from transfusion.data.planning.packing import Planner
from transfusion.data.viewing.plan_stats import measure_plan
from transfusion.data.viewing.row_page import DrawnRow, Look, Pictures, overview, page
from transfusion.errors import UserError
from transfusion.sequence.tokenizer import Tokenizer

_SUFFIXES = (".html", ".png")
# Of the lengths of documents.
_QUANTILES = {"least": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "greatest": 1.0}


def show_rows(
    config: Config, out: Path, *, rows: int = 4, step: int = 0, pictures: Pictures | None = None
) -> None:
    """Draw the first rows of a global batch into `out`, as training would be given them.

    pictures: what arrays of each further modality look like. Raises UserError when there is no source, or `out` is
    neither .html nor .png.
    """
    if out.suffix not in _SUFFIXES:
        raise UserError(f"out {out} must end in {' or '.join(_SUFFIXES)}")
    indexes, tokenizer, config = _opened(config)
    planner = Planner([index.lengths for index in indexes], plan_settings(config))
    for _ in range(step):
        # Of a batch that is passed over, no row is wanted.
        planner.next_batch(0, config.data.global_batch_size)
    plans = planner.next_batch()[:rows]
    builder = RowBuilder(indexes, RowSettings.of(config))
    drawn = [
        DrawnRow(
            builder.build(plan),
            [f"{indexes[span.source].name} · {indexes[span.source].key(span.sample)}" for span in plan],
        )
        for plan in plans
    ]
    look = Look(config, tokenizer, pictures or {})
    if out.suffix == ".png":
        overview(drawn, look).save(out)
    else:
        title = f"Rows 0 to {len(drawn) - 1} of global batch {step}"
        out.write_text(page(drawn, look, title), encoding="utf-8")


def stats_config(config: Config, *, steps: int = 64) -> dict[str, Any]:
    """Plain values: of each source its samples, lengths and faults, and what the plan makes of them all."""
    indexes, _, config = _opened(config)
    found = asdict(measure_plan([index.lengths for index in indexes], plan_settings(config), batches=steps))
    for index in indexes:
        found["sources"][index.name] |= _source_stats(index, config)
    return found


def _opened(config: Config) -> tuple[list[SourceIndex], Tokenizer, Config]:
    """The indexes of the training sources, the tokenizer, and the configuration with its vocabulary."""
    if not config.data.sources:
        raise UserError("data.sources is empty; name at least one source with its shards")
    tokenizer = Tokenizer(config.data.tokenizer)
    config = config.with_vocabulary(tokenizer.vocabulary)
    return build_indexes(config, config.data.sources, tokenizer), tokenizer, config


def _source_stats(index: SourceIndex, config: Config) -> dict[str, Any]:
    tokens_C = index.lengths.text_tokens_C
    return {
        "shards": len(index.shards),
        "pairs": int(index.is_pair_N.sum()),
        "interleaved": int(index.lengths.interleaved_N.sum()),
        "texts": int((index.lengths.images_N == 0).sum()),
        "text_tokens": int(tokens_C.sum()),
        "text_lengths": {
            name: int(np.quantile(tokens_C, place, method="nearest")) for name, place in _QUANTILES.items()
        },
        "longer_than_a_row": int((tokens_C > config.data.sequence_length).sum()),
        "image_sizes": index.images_by_size(),
        "cut_away": cut_away(index, config.media_sizes),
        "faults": dict(collections.Counter(fault.reason for fault in index.faults).most_common()),
    }


def describe_stats(found: dict[str, Any]) -> str:
    """The figures as tables to read."""
    names = list(_QUANTILES)
    lines = [
        f"{'source':16} {'shards':>7} {'pairs':>11} {'interleaved':>11} {'texts':>11} {'share':>7} {'wanted':>7}"
        "   text tokens: " + " ".join(f"{name:>8}" for name in names)
    ]
    for name, each in found["sources"].items():
        lines.append(
            f"{name:16} {each['shards']:7,} {each['pairs']:11,} {each['interleaved']:11,} {each['texts']:11,}"
            f" {each['share']:7.4f} {each['wanted_share']:7.4f}   {each['text_tokens']:11,}: "
            + " ".join(f"{each['text_lengths'][quantile]:8,}" for quantile in names)
        )
    lines += [
        "",
        f"{found['batches']:,} batches of {found['rows']:,} rows of {found['sequence_length']:,}: padding"
        f" {found['padding_share']:.3%}, {found['texts_cut']:,} texts cut"
        f" ({found['texts_cut_that_fit_a_row']:,} of them would fit a row), {found['images_cut']} images cut",
        "",
    ]
    # The size of other media begins with their name.
    lines += [
        f"{name}: {count:,} {'of' if ' ' in size else 'images of'} {size}"
        for name, each in found["sources"].items()
        for size, count in each["image_sizes"].items()
    ]
    lines += [each["cut_away"] for each in found["sources"].values() if each["cut_away"]]
    faults = [
        f"{name}: {count:,} x {reason}"
        for name, each in found["sources"].items()
        for reason, count in each["faults"].items()
    ]
    return "\n".join([*lines, *(faults or ["no faults"])])
