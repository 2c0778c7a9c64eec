"""The stream: the same global batches at any world size and worker count, from any step, past bad samples."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from transfusion.config import Config, SourceConfig
from transfusion.data.loading.loader import Loader, rows_per_rank
from transfusion.data.loading.validation import EvaluationLoader, documents
from transfusion.data.loading.workers import ProcessWorkers
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.schema import Batch, ImageSegment, Modality, SpecialToken
from transfusion.sequence.tokenizer import Tokenizer

MakeConfig = Callable[..., Config]
Rows = list[list[torch.Tensor]]
RowsOf = Callable[[Sequence[Batch]], Rows]
Same = Callable[[Rows, Rows], bool]
STEPS = 70


def loaders(
    config: Config, tokenizer: Tokenizer, world_size: int, state: dict[str, Any] | None = None
) -> list[Loader]:
    return [
        Loader(config, config.data.sources, tokenizer, rank=rank, world_size=world_size, state=state)
        for rank in range(world_size)
    ]


def global_step(ranks: Sequence[Loader], rows_of: RowsOf) -> Rows:
    """Rows of all ranks, in their order in the global batch."""
    steps = [loader.next_step() for loader in ranks]
    assert len({len(step) for step in steps}) == 1
    return [row for rows in zip(*map(rows_of, steps), strict=True) for row in rows]


@pytest.fixture(scope="module")
def truth(make_config: MakeConfig, tokenizer: Tokenizer, rows_of: RowsOf) -> tuple[list[Rows], list[str]]:
    """Global batches of one process without workers, and the state before each."""
    (loader,) = loaders(make_config(), tokenizer, 1)
    batches, states = [], []
    for _ in range(STEPS):
        states.append(json.dumps(loader.state()))
        batches.append(rows_of(loader.next_step()))
    return batches, states


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 0), (4, 0), (8, 0), (1, 3), (2, 1)])
def test_any_world_size_and_micro_batch_gives_the_same_rows(
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    truth: tuple[list[Rows], list[str]],
    rows_of: RowsOf,
    same: Same,
    world_size: int,
    micro_batch_size: int,
) -> None:
    ranks = loaders(make_config(micro_batch_size=micro_batch_size), tokenizer, world_size)
    for step in range(5):
        assert same(global_step(ranks, rows_of), truth[0][step])
    assert len({json.dumps(loader.state()) for loader in ranks}) == 1


@pytest.mark.parametrize("first", [1, 30, 63, 64, 65])
def test_resume_at_another_world_size(
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    truth: tuple[list[Rows], list[str]],
    rows_of: RowsOf,
    same: Same,
    first: int,
) -> None:
    """N11: the batches after a resume, bit for bit; their losses are in test_trainer.py."""
    for world_size in (1, 4):
        ranks = loaders(make_config(), tokenizer, world_size, json.loads(truth[1][first]))
        for step in range(first, first + 4):
            assert json.dumps(ranks[0].state()) == truth[1][step]
            assert same(global_step(ranks, rows_of), truth[0][step])


def test_workers_give_the_same_bits_and_may_die(
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    truth: tuple[list[Rows], list[str]],
    rows_of: RowsOf,
    same: Same,
) -> None:
    config = make_config(workers=2)
    ranks = loaders(config, tokenizer, 2)
    for step in range(4):
        assert same(global_step(ranks, rows_of), truth[0][step])
    workers = ranks[0]._workers
    assert isinstance(workers, ProcessWorkers)
    for worker in workers._workers:
        pid = worker._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    for step in range(4, 8):
        assert same(global_step(ranks, rows_of), truth[0][step])
        # What is prepared ahead is no part of the state.
        assert json.dumps(ranks[0].state()) == truth[1][step + 1]
    for loader in ranks:
        loader.close()
    with loaders(config, tokenizer, 1, json.loads(truth[1][40]))[0] as resumed:
        assert same(rows_of(resumed.next_step()), truth[0][40])


def test_batches_keep_the_rules(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    """N6: targets are shifted by one, and nothing is learned at or after <BOI>, a patch or <EOS>."""
    (loader,) = loaders(make_config(), tokenizer, 1)
    padding = 0
    for _ in range(20):
        (batch,) = loader.next_step()
        batch.mask.validate()
        token, target, weight = batch.token_ids_BS, batch.target_ids_BS, batch.text_weight_BS
        learned = weight > 0
        for silent in (
            SpecialToken.BEGIN_IMAGE,
            SpecialToken.PATCH,
            SpecialToken.END_DOCUMENT,
            SpecialToken.PADDING,
        ):
            assert not (learned & (token == silent)).any()
        for never in (
            SpecialToken.PATCH,
            SpecialToken.END_IMAGE,
            SpecialToken.PADDING,
            SpecialToken.BEGIN_DOCUMENT,
        ):
            assert not (learned & (target == never)).any()
        # The target is the next token wherever the next position belongs to the same piece.
        together = batch.mask.first_key[:, 1:] == batch.mask.first_key[:, :-1]
        together &= batch.modality_BS[:, 1:] != Modality.PADDING
        assert (target[:, :-1] == token[:, 1:])[together].all()
        assert (learned & (target == SpecialToken.BEGIN_IMAGE)).any()
        assert (learned & (target == SpecialToken.END_DOCUMENT)).any()
        padding += batch.counts.padding
    # Short rows leave gaps that no piece may fill; rows of 512 lose less than half of this.
    assert padding < 0.03 * 20 * 8 * 256
    assert loader.counters()["tokens"] == 20 * 8 * 256 - padding


def test_ranks_beyond_the_shards_get_data(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    """N12: eight ranks, one shard: every rank gets full rows."""
    ranks = loaders(make_config(), tokenizer, 8)
    assert len(ranks[0].indexes[1].shards) == 1
    assert all(batch.counts.tokens > 200 for loader in ranks for batch in loader.next_step())


def test_rows_that_ranks_cannot_share() -> None:
    assert rows_per_rank(8, 4) == 2
    with pytest.raises(UserError, match="nearest that can is 9"):
        rows_per_rank(8, 3)
    with pytest.raises(UserError, match="nearest that can is 8"):
        rows_per_rank(9, 4)
    with pytest.raises(UserError, match="nearest that can is 4"):
        rows_per_rank(1, 4)


def test_no_sources_and_foreign_states_are_one_line(
    make_config: MakeConfig, tokenizer: Tokenizer, truth: tuple[list[Rows], list[str]]
) -> None:
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        Loader(make_config(), [], tokenizer, rank=0, world_size=1)
    with pytest.raises(UserError, match=r"data\.validation is empty"):
        EvaluationLoader(make_config(), [], tokenizer)
    with pytest.raises(UserError, match="started with"):
        loaders(make_config(global_batch_size=16), tokenizer, 1, json.loads(truth[1][3]))


@pytest.fixture
def bad_shards(data: Path, tmp_path: Path) -> Path:
    """Digits with a torn shard, an empty caption, and an image that only decoding finds bad."""
    shutil.copytree(data / "digits/train", tmp_path, dirs_exist_ok=True)
    torn = tmp_path / "00001.tar"
    torn.write_bytes(torn.read_bytes()[: 1024 * 1024 - 512])
    changes: dict[str, bytes | None] = {"000000003.txt": b" "}
    for key in ("000000005", "000000006"):
        # Without its hash, which would tell at once.
        changes |= {f"{key}.png": None, f"{key}.json": b"{}"}
    damage(tmp_path / "00000.tar", changes)
    return tmp_path


def damage(shard: Path, changes: dict[str, bytes | None]) -> None:
    """Replace members; None makes an image whose pixels cannot be inflated though its checksums are right."""
    with tarfile.open(shard) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as archive:
        for name, content in members:
            changed = changes.get(name, content)
            content = undecodable(content) if changed is None else changed
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def undecodable(png: bytes) -> bytes:
    body = b"IDAT" + b"?" * 20
    chunk = struct.pack(">I", 20) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[-12:]


def test_bad_samples_are_counted_and_survived(
    bad_shards: Path, make_config: MakeConfig, tokenizer: Tokenizer, rows_of: RowsOf, same: Same
) -> None:
    source = SourceConfig(name="digits", shards=f"{bad_shards}/*.tar")
    # A shard that is cut short costs what the other one holds more.
    with pytest.raises(
        UserError, match=r"of 2000 samples are bad \(tar_truncated: \d{3}, caption_empty: 1\)"
    ):
        Loader(make_config(), [source], tokenizer, rank=0, world_size=1)
    config = make_config(max_bad_fraction=0.5)
    one, again = (Loader(config, [source], tokenizer, rank=0, world_size=1) for _ in range(2))
    assert [fault.reason for fault in one.faults()] == ["caption_empty", "tar_truncated"]
    assert one.faults()[0].key == "000000003" and len(one.indexes[0]) > 1200
    faults = 0
    for _ in range(40):
        step = one.next_step()
        assert same(rows_of(step), rows_of(again.next_step()))
        for batch in step:
            batch.mask.validate()
            faults += batch.counts.faults
    counted = one.counters()["faults"]
    assert faults >= 2 and len(one.faults()) == 4
    assert sum(counted.values()) == pytest.approx(2000 - len(one.indexes[0]) + 2, abs=2)
    assert {fault.key for fault in one.faults()[2:]} == {"000000005", "000000006"}


def test_too_many_bad_samples_are_refused_or_told(
    bad_shards: Path, make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    """Those of the index at once; those met on the way are counted, and judged by all ranks together."""
    source = SourceConfig(name="digits", shards=f"{bad_shards}/00000.tar")
    with pytest.raises(UserError, match="1 of 1000 samples are bad"):
        Loader(make_config(max_bad_fraction=0), [source], tokenizer, rank=0, world_size=1)
    many: dict[str, bytes | None] = {f"0000000{number}.png": None for number in range(10, 90)}
    many |= {f"0000000{number}.json": b"{}" for number in range(10, 90)}
    damage(bad_shards / "00000.tar", many)
    loader = Loader(make_config(), [source], tokenizer, rank=0, world_size=1)
    batches, readings = [], []
    for _ in range(40):
        batches += loader.next_step()
        readings.append(loader.reading)
    faults, samples = (sum(counts) for counts in zip(*readings, strict=True))
    assert faults == sum(batch.counts.faults for batch in batches) > 20
    # Every sample of this source has an image, which the batch holds or lacks.
    assert samples == faults + sum(batch.counts.images for batch in batches)


def test_validation_documents_come_once_on_any_number_of_ranks(
    make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    config = make_config()
    totals = []
    for world_size, rows in ((1, 0), (1, 5), (3, 2)):
        ranks = [
            EvaluationLoader(
                config, config.data.validation, tokenizer, rank=rank, world_size=world_size, rows=rows
            )
            for rank in range(world_size)
        ]
        passes = [list(loader) for loader in ranks]
        assert {len(batches) for batches in passes} == {len(ranks[0])}
        counts = [batch.counts for batch in itertools.chain(*passes)]
        totals.append((sum(c.text_targets for c in counts), sum(c.images for c in counts)))
        for batch in itertools.chain(*passes):
            batch.mask.validate()
            assert len(batch.token_ids_BS) == (rows or 8)
    assert len(set(totals)) == 1 and totals[0][1] == 297
    index = ranks[0].indexes[1]
    docs = EvaluationLoader(config, config.data.validation[1:], tokenizer)
    # Every token of every text and its <EOS> is predicted exactly once.
    assert sum(batch.counts.text_targets for batch in docs) == index.lengths.text_tokens_C.sum() + len(index)
    assert all(batch.media[0].image_weight_I.sum() == 0 for batch in docs)


def test_evaluation_is_the_same_every_time(
    make_config: MakeConfig, tokenizer: Tokenizer, rows_of: RowsOf, same: Same
) -> None:
    config = make_config()
    loader = EvaluationLoader(config, config.data.validation[:1], tokenizer)
    assert same(rows_of(list(loader)), rows_of(list(loader)))
    levels = torch.cat([batch.media[0].timestep_I for batch in loader])
    assert levels.min() < 50 and levels.max() > 950


def test_documents_in_file_order(
    make_config: MakeConfig, tokenizer: Tokenizer, tmp_path: Path, data: Path
) -> None:
    config = make_config()
    found = list(documents(config, config.data.validation, tokenizer))
    pairs = [document for document in found if document.source == "digits"]
    assert len(pairs) == 297 and pairs[7].key == "000000007"
    caption, image = pairs[7].segments
    assert isinstance(image, ImageSegment) and image.values_CHW.shape == (1, 8, 8) and image.patches == 16
    write_shards([{"txt": b"only text"}], tmp_path)
    (text,) = documents(config, [SourceConfig(name="t", shards=f"{tmp_path}/*.tar")], tokenizer)
    assert tokenizer.decode(text.segments[0].token_ids) == "only text"  # type: ignore[union-attr]
    assert caption != text.segments[0]
