"""Rows through shared memory: the arrays arrive as they were, and do not travel by pipe."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest

from transfusion.data.loading import workers
from transfusion.data.loading.rows import Row, RowImage
from transfusion.data.loading.workers import _attempt, _Packed, _SharedBuffer, _work
from transfusion.data.shards.sample import Fault

LENGTH = 4096


class Builder:
    """Stands in for a RowBuilder: a row of random arrays of so many images."""

    def build(self, count: int) -> Row:
        if count < 0:
            raise ValueError("no such row")
        random = np.random.default_rng(count)
        images = tuple(
            RowImage(random.integers(0, 256, (3, 64, 64), dtype=np.uint8), 66 * number, 64, number, number)
            for number in range(count)
        )
        return Row(
            token_ids_S=random.integers(0, 1 << 40, LENGTH),
            modality_S=random.integers(0, 3, LENGTH, dtype=np.uint8),
            position_SA=random.integers(0, 99, (LENGTH, 3)),
            target_ids_S=random.integers(0, 99, LENGTH),
            text_weight_S=random.random(LENGTH, dtype=np.float32),
            first_key_S=random.integers(0, 99, LENGTH, dtype=np.int32),
            end_key_S=random.integers(0, 99, LENGTH, dtype=np.int32),
            twins=(),
            images=images,
            faults=(Fault("00000.tar", "key", "truncated"),),
            samples=count,
        )


def test_arrays_travel_through_shared_memory() -> None:
    ours = _SharedBuffer()
    theirs = _SharedBuffer(os.dup(ours._descriptor))
    kept = []
    # Larger and smaller in turn, so that the memory grows and is used again.
    for count in (1, 40, 0, 2):
        answer = _attempt(Builder(), count, theirs)  # type: ignore[arg-type]
        assert isinstance(answer, _Packed)
        assert len(answer.rest) < 200 * count + 2000 and answer.borders[-1] > LENGTH * 50
        kept.append((count, pickle.loads(answer.rest, buffers=ours.read(answer.borders))))
    for count, row in kept:
        # The first row is still what it was after others were written over its place.
        assert pickle.dumps(row) == pickle.dumps(Builder().build(count))
        assert row.token_ids_S.flags.writeable
    ours.close()
    theirs.close()


def test_a_worker_keeps_opencv_to_one_thread() -> None:
    opencv = pytest.importorskip("cv2")
    before = opencv.getNumThreads()
    opencv.setNumThreads(3)
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    buffer, handler = _SharedBuffer(), signal.getsignal(signal.SIGINT)
    try:
        _work(theirs, buffer, Builder())  # type: ignore[arg-type]
        assert opencv.getNumThreads() == 1
    finally:
        signal.signal(signal.SIGINT, handler)
        opencv.setNumThreads(before)
        buffer.close()


def test_a_failure_is_the_answer() -> None:
    buffer = _SharedBuffer()
    assert isinstance(_attempt(Builder(), -1, buffer), ValueError)  # type: ignore[arg-type]
    buffer.close()


@pytest.mark.parametrize("named", [True, False])
def test_memory_has_no_name(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memfd_create and without it."""
    if not named:
        monkeypatch.delattr(workers.os, "memfd_create", raising=False)
    buffer = _SharedBuffer()
    borders = buffer.write([memoryview(b"abc"), memoryview(b""), memoryview(b"de")])
    assert buffer.read(borders) == [b"abc", b"", b"de"]
    buffer.close()
