"""What a plan looks like, measured without reading anything: shares, padding, balance, time and memory.

Of the real lengths of an index, or of as many samples as are asked for, with lengths like those of an index.
Shape suffixes: D samples asked for together, Q quantiles, P spans.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transfusion.config import Config
from transfusion.data.index.source_index import build_indexes
from transfusion.data.loading.loader import plan_settings, rows_per_rank
from transfusion.data.planning import hash_rng
from transfusion.data.planning.epoch import Integers, Lengths, Schedule, Variant, share_at
from transfusion.data.planning.packing import PlanBlock, PlanSettings, fresh, plan_block
from transfusion.errors import UserError
from transfusion.files import name_hash
from transfusion.sequence.tokenizer import Tokenizer

_QUANTILES = 4096
# Without an index to go by: mean, and deviation of the logarithm.
_CAPTION_TOKENS, _TEXT_TOKENS = (16.0, 0.6), (600.0, 1.2)
_MANY = 700_000_000
_LENGTH, _IMAGE = name_hash("simulated length"), name_hash("simulated picture")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedLengths:
    """A source of any size: a sample's length is a hash that looks up a quantile, so none of them is stored.

    quantiles_Q: ascending token counts of texts or captions. pairs: share of samples with an image. context: patches of
    the noised copy of an image that its caption follows.
    """

    name: str
    schedule: Schedule
    samples: int
    quantiles_Q: Integers
    patches: int
    pairs: float
    context: int = 0
    # Order costs the plan next to nothing.
    windows: None = None

    def __len__(self) -> int:
        return self.samples

    def captions(self, sample_D: Integers) -> Integers:
        return np.ones_like(sample_D)

    def text_tokens(self, sample_D: Integers, caption_D: Integers) -> Integers:
        place_D = hash_rng.uniform(_LENGTH, name_hash(self.name), sample_D) * len(self.quantiles_Q)
        return self.quantiles_Q[place_D.astype(np.int64)]

    def image_tokens(self, sample_D: Integers) -> Integers:
        has_image_D = hash_rng.uniform(_IMAGE, name_hash(self.name), sample_D) < self.pairs
        return np.where(has_image_D, self.patches, 0)

    def context_tokens(self, sample_D: Integers) -> Integers:
        return np.where(self.image_tokens(sample_D) > 0, self.context, 0)

    def interleaved(self, sample_D: Integers) -> np.ndarray:
        return np.zeros(len(sample_D), bool)

    def digest(self) -> str:
        known = f"{self.pairs} {self.patches} {self.context} {name_hash(str(self.quantiles_Q.tolist()))}"
        return f"simulated {self.samples} {known}"


def simulated(source: Lengths, samples: int) -> SimulatedLengths:
    """As many samples, with lengths like those of the source."""
    every = np.arange(len(source), dtype=np.int64)
    patches = source.image_tokens(every)
    tokens = source.text_tokens(every, np.zeros_like(every))
    places = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return SimulatedLengths(
        name=source.name,
        schedule=source.schedule,
        samples=samples,
        quantiles_Q=np.quantile(tokens, places, method="nearest").astype(np.int64),
        patches=int(patches.max()),
        pairs=float((patches > 0).mean()),
        context=int(source.context_tokens(every).max()),
    )


def lognormal_lengths(
    name: str,
    schedule: Schedule,
    samples: int,
    mean_tokens: float,
    spread: float,
    patches: int = 0,
    context: int = 0,
) -> SimulatedLengths:
    """Texts, or with `patches` pairs, whose lengths are lognormal: `spread` is the deviation of their logarithm."""
    normal = np.sort(np.random.default_rng(0).standard_normal(_QUANTILES))
    tokens = np.exp(np.log(mean_tokens) - spread**2 / 2 + spread * normal)
    return SimulatedLengths(
        name=name,
        schedule=schedule,
        samples=samples,
        quantiles_Q=np.maximum(1, tokens).astype(np.int64),
        patches=patches,
        pairs=float(patches > 0),
        context=context,
    )


@dataclass(slots=True, kw_only=True)
class SourceSurvey:
    """One source in the plan. share_error: greatest distance to the wanted share, of a batch and of all."""

    samples: int
    documents: int = 0
    tokens: int = 0
    share: float = 0.0
    wanted_share: float = 0.0
    max_share_error_of_a_batch: float = 0.0

    @property
    def share_error(self) -> float:
        return abs(self.share - self.wanted_share)


@dataclass(slots=True, kw_only=True)
class Survey:
    """A stretch of a plan.

    imbalance: of text tokens and of images, the mean over batches of (greatest of a rank / mean of the ranks - 1).
    plan_ms_per_batch, tokens_per_second: processor time of one rank. peak_mib: of the whole process.
    """

    batches: int
    rows: int
    sequence_length: int
    ranks: int
    sources: dict[str, SourceSurvey]
    tokens: int = 0
    padding_share: float = 0.0
    spans: int = 0
    texts_cut: int = 0
    texts_cut_that_fit_a_row: int = 0
    images_cut: int = 0
    text_imbalance: float = 0.0
    image_imbalance: float = 0.0
    plan_ms_per_batch: float = 0.0
    tokens_per_second: float = 0.0
    resume_ms: float = 0.0
    state_bytes: int = 0
    peak_mib: float = 0.0
    added_mib: float = 0.0


def measure_plan(
    sources: Sequence[Lengths], settings: PlanSettings, *, batches: int, ranks: int = 1
) -> Survey:
    """Plan at least so many batches (whole blocks) as one of `ranks` ranks does, and look at all of the rows."""
    found = Survey(
        batches=0,
        rows=settings.rows,
        sequence_length=settings.sequence_length,
        ranks=ranks,
        sources={source.name: SourceSurvey(samples=len(source)) for source in sources},
    )
    before = _peak_mib()
    start, spent = fresh(sources), 0.0
    imbalances: list[tuple[float, float]] = []
    while found.batches < batches:
        begin = time.process_time()
        block = plan_block(sources, settings, start)
        block.rows(range(0, len(block.members), ranks))
        block_seconds = time.process_time() - begin
        spent += block_seconds
        found.resume_ms = max(found.resume_ms, block_seconds * 1e3)
        imbalances += _look(found, block, sources, start["batch"])
        found.batches += block.batches
        start = block.following
        state_bytes = len(json.dumps({"start": start, "used": 0, "fingerprint": "0" * 12}))
        found.state_bytes = max(found.state_bytes, state_bytes)
    found.padding_share = 1 - found.tokens / (found.batches * settings.rows * settings.sequence_length)
    for each in found.sources.values():
        each.share = each.tokens / found.tokens
        each.wanted_share /= found.batches
    found.text_imbalance, found.image_imbalance = (float(mean) for mean in np.mean(imbalances, axis=0))
    found.plan_ms_per_batch = spent / found.batches * 1e3
    found.tokens_per_second = found.tokens / spent
    found.peak_mib = _peak_mib()
    found.added_mib = found.peak_mib - before
    return found


def _look(
    found: Survey, block: PlanBlock, sources: Sequence[Lengths], step: int
) -> list[tuple[float, float]]:
    """Add a block to the survey; returns the imbalance of text and images of each batch."""
    spans = block.spans
    row_P = np.repeat(np.arange(len(block.members)), [len(row) for row in block.members])
    member_P = np.concatenate([np.array(row) for row in block.members])
    tokens_P, source_P = spans.tokens[member_P], spans.source[member_P]
    is_text_P = spans.variant[member_P] == Variant.TEXT
    is_cut_P = tokens_P < spans.whole[member_P]
    is_first_P = spans.first[member_P] == 0
    found.spans += len(member_P)
    found.tokens += int(tokens_P.sum())
    found.images_cut += int((is_cut_P & ~is_text_P).sum())
    cut_texts_P = is_cut_P & is_text_P & is_first_P
    found.texts_cut += int(cut_texts_P.sum())
    fits_P = spans.whole[member_P] <= found.sequence_length
    found.texts_cut_that_fit_a_row += int((cut_texts_P & fits_P).sum())
    by_batch = np.zeros((block.batches, len(sources)), dtype=np.int64)
    np.add.at(by_batch, (row_P // found.rows, source_P), tokens_P)
    shares = by_batch / by_batch.sum(1, keepdims=True)
    wanted = np.array([share_at(source.schedule, step) for source in sources])
    wanted = wanted / wanted.sum()
    for number, each in enumerate(found.sources.values()):
        each.documents += int((is_first_P & (source_P == number)).sum())
        each.tokens += int(by_batch[:, number].sum())
        each.wanted_share += float(wanted[number]) * block.batches
        error = float(np.abs(shares[:, number] - wanted[number]).max())
        each.max_share_error_of_a_batch = max(each.max_share_error_of_a_batch, error)
    # Rank r has rows r, r + ranks, ... of each batch.
    rank_P = row_P // found.rows * found.ranks + row_P % found.ranks
    text, images = (
        np.bincount(rank_P, weights, block.batches * found.ranks).reshape(block.batches, found.ranks)
        for weights in (tokens_P * is_text_P, ~is_text_P)
    )
    return list(zip(map(_imbalance, text), map(_imbalance, images), strict=True))


def _imbalance(of_ranks: np.ndarray) -> float:
    mean = of_ranks.mean()
    return float(of_ranks.max() / mean - 1) if mean else 0.0


def _peak_mib() -> float:
    """Resident memory at its greatest; macOS counts in bytes, Linux in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure_config(
    config: Config, *, simulate: bool = False, ranks: int = 1, steps: int = 64, samples: int = 0
) -> Survey:
    """The plan of a configuration; `simulate` puts sources of `samples` samples (0: as many) into its place.

    Without sources it simulates half pairs and half texts. Raises UserError as training would.
    """
    rows_per_rank(config.data.global_batch_size, ranks)
    sources: list[Lengths]
    if config.data.sources:
        indexes = build_indexes(config, config.data.sources, Tokenizer(config.data.tokenizer))
        sources = [index.lengths for index, source in zip(indexes, config.data.sources, strict=True)]
        if simulate:
            sources = [simulated(source, samples or len(source)) for source in sources]
    elif simulate:
        half, many, patches = ((0, 0.5),), samples or _MANY, config.patches_per_image
        context = patches if config.diffusion.context == "clean" else 0
        sources = [
            lognormal_lengths("pairs", half, many, *_CAPTION_TOKENS, patches=patches, context=context),
            lognormal_lengths("texts", half, many, *_TEXT_TOKENS),
        ]
    else:
        raise UserError("data.sources is empty; name a config with sources, or use --simulate")
    return measure_plan(sources, plan_settings(config), batches=steps, ranks=ranks)


def describe(found: Survey) -> str:
    """The survey as a table to read."""
    lines = [
        f"{'source':16} {'samples':>13} {'documents':>12} {'tokens':>14} {'share':>8} {'wanted':>8}"
        f" {'error':>8} {'worst batch':>12}"
    ]
    for name, each in found.sources.items():
        lines.append(
            f"{name:16} {each.samples:13,} {each.documents:12,} {each.tokens:14,} {each.share:8.4f}"
            f" {each.wanted_share:8.4f} {each.share_error:8.5f} {each.max_share_error_of_a_batch:12.4f}"
        )
    facts = {
        "batches": f"{found.batches:,} of {found.rows:,} rows of {found.sequence_length:,}",
        "padding": f"{found.padding_share:.3%}",
        "texts cut": f"{found.texts_cut:,} ({found.texts_cut_that_fit_a_row:,} of them would fit a row)",
        "images cut": f"{found.images_cut}",
        "imbalance": f"text {found.text_imbalance:.2%}, images {found.image_imbalance:.2%} over {found.ranks} ranks",
        "planning": f"{found.plan_ms_per_batch:.1f} ms a batch, {found.tokens_per_second / 1e6:.1f} M tokens/s",
        "resume": f"{found.resume_ms:.0f} ms at most, from {found.state_bytes:,} bytes of state",
        "memory": f"{found.peak_mib:.0f} MiB at most, {found.added_mib:.0f} MiB of it for planning",
    }
    return "\n".join([*lines, "", *(f"{name:12} {fact}" for name, fact in facts.items())])
