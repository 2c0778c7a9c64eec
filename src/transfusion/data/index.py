"""What a source holds, where it stands and how long it is: all that planning needs, and no file read twice.

Shape suffixes: N samples of the source, T its text tokens, one after another.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from transfusion.config import SourceConfig
from transfusion.data.scan import Fault, RawSample, scan
from transfusion.data.sequence import PAIR_CONTROL_TOKENS
from transfusion.data.shards import expand
from transfusion.data.tokenizer import Tokenizer
from transfusion.errors import UserError

# Two bytes a token where the vocabulary allows.
TokenIds = NDArray[np.uint16] | NDArray[np.int32]

# Fewer samples than this say nothing about a share of bad ones: a run never dies of the first.
_FEWEST_TO_JUDGE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceIndex:
    """The good samples of one source, and the faults that were left out.

    shard_N: which shard. picture_offset_N, picture_size_N: bytes of the picture in it; size 0 is a text.
    token_start_N: N + 1 borders of each sample's ids (caption or text, no control tokens) in token_ids_T.
    """

    name: str
    shards: tuple[Path, ...]
    keys: tuple[str, ...]
    shard_N: NDArray[np.int32]
    picture_offset_N: NDArray[np.int64]
    picture_size_N: NDArray[np.int64]
    token_start_N: NDArray[np.int64]
    token_ids_T: TokenIds
    faults: tuple[Fault, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def is_pair_N(self) -> NDArray[np.bool_]:
        return self.picture_size_N > 0

    @property
    def text_tokens_N(self) -> NDArray[np.int64]:
        return np.diff(self.token_start_N)

    def text_ids(self, sample: int) -> TokenIds:
        """Ids of the sample's text or caption."""
        return self.token_ids_T[self.token_start_N[sample] : self.token_start_N[sample + 1]]

    def read_picture(self, sample: int) -> bytes:
        """Bytes of the sample's picture, as they are now in the shard. Raises OSError."""
        with self.shards[self.shard_N[sample]].open("rb") as stream:
            return os.pread(
                stream.fileno(), int(self.picture_size_N[sample]), int(self.picture_offset_N[sample])
            )

    def fault(self, sample: int, reason: str) -> Fault:
        """A fault of this sample, found when it was read."""
        return Fault(self.shards[self.shard_N[sample]].name, self.keys[sample], reason)


def build_index(source: SourceConfig, tokenizer: Tokenizer, *, patches: int, row_length: int) -> SourceIndex:
    """Read every shard of the source once.

    patches: of one picture; a pair longer than a row is a fault, since it is never cut.
    Raises UserError when a shard is missing or no good sample is left.
    """
    shards = tuple(expand(source.shards))
    longest_caption = row_length - patches - PAIR_CONTROL_TOKENS
    samples: list[tuple[int, RawSample]] = []
    faults: list[Fault] = []
    token_ids: list[list[int]] = []
    for number, shard in enumerate(shards):
        for found in scan(shard):
            if isinstance(found, Fault):
                faults.append(found)
                continue
            ids = tokenizer.encode(found.text)
            if found.picture_size and len(ids) > longest_caption:
                faults.append(Fault(shard.name, found.key, "longer than a row"))
                continue
            samples.append((number, found))
            token_ids.append(ids)
    if not samples:
        raise UserError(f"source {source.name} has no usable sample in {len(shards)} shards{_why(faults)}")
    return _packed(source.name, shards, samples, token_ids, faults, tokenizer.vocabulary)


def _packed(
    name: str,
    shards: tuple[Path, ...],
    samples: Sequence[tuple[int, RawSample]],
    token_ids: Sequence[Sequence[int]],
    faults: Sequence[Fault],
    vocabulary: int,
) -> SourceIndex:
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    total = int(starts[-1])
    packed: TokenIds = np.empty(total, np.uint16) if vocabulary <= 1 << 16 else np.empty(total, np.int32)
    for start, ids in zip(starts, token_ids, strict=False):
        packed[start : start + len(ids)] = ids
    return SourceIndex(
        name=name,
        shards=shards,
        keys=tuple(sample.key for _, sample in samples),
        shard_N=np.array([shard for shard, _ in samples], dtype=np.int32),
        picture_offset_N=np.array([sample.picture_offset for _, sample in samples], dtype=np.int64),
        picture_size_N=np.array([sample.picture_size for _, sample in samples], dtype=np.int64),
        token_start_N=starts,
        token_ids_T=packed,
        faults=tuple(faults),
    )


def too_many_faults(faults: int, samples: int, greatest_share: float) -> bool:
    """Whether more than this share of the samples (good and bad) is bad."""
    return faults > greatest_share * max(samples, _FEWEST_TO_JUDGE)


def refuse_too_many(indexes: Iterable[SourceIndex], greatest_share: float) -> None:
    """Raises UserError for a source with too many faults, with its reasons."""
    for index in indexes:
        faults = len(index.faults)
        if too_many_faults(faults, faults + len(index), greatest_share):
            raise UserError(
                f"source {index.name}: {faults} of {faults + len(index)} samples are bad{_why(index.faults)};"
                f" mend the shards or raise data.max_faults ({greatest_share})"
            )


def _why(faults: Iterable[Fault]) -> str:
    counts = collections.Counter(fault.reason for fault in faults)
    return (
        f" ({', '.join(f'{reason}: {count}' for reason, count in counts.most_common(4))})" if counts else ""
    )
