"""Random numbers without a generator: each is a hash of what it is for.

Whoever asks, on whichever rank or worker and in whichever order, gets the same number for the same words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bits(*words: ArrayLike) -> Words:
    """Hash of the words, element by element after broadcasting; always at least one-dimensional.

    words: integers in [0, 2^64) or arrays of them: seed, purpose, source, epoch, sample and so on.
    """
    state = np.zeros(1, dtype=np.uint64)
    for value in words:
        # The generator splitmix64, seeded by the words so far, at the place that this word says.
        state = _mix(state + (np.array(value, dtype=np.uint64, ndmin=1) + np.uint64(1)) * _GOLDEN)
    return state


def uniform(*words: ArrayLike) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, by the same words as `bits`."""
    return (bits(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(positions: ArrayLike, size: int, *words: ArrayLike) -> NDArray[np.int64]:
    """Where a keyed permutation of range(size) sends the positions.

    A Feistel network over the next power of four; results outside the range walk on along their cycle. The
    permutation itself is never in memory, so size may be hundreds of millions.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [bits(*words, turn) for turn in range(4)]
    places = np.array(positions, dtype=np.uint64, ndmin=1)
    waiting = np.arange(len(places))
    while len(waiting):
        left, right = places[waiting] >> np.uint64(half), places[waiting] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right * _GOLDEN + key) & mask)
        places[waiting] = (left << np.uint64(half)) | right
        waiting = waiting[places[waiting] >= size]
    return places.astype(np.int64)


def _mix(state: Words) -> Words:
    """The output function of splitmix64: every input bit reaches every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
