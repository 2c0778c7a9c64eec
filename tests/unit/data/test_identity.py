"""A shard is its bytes: what is written anew is noticed whatever its size and times say, and a copy is the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from transfusion.config import SourceConfig
from transfusion.data.index import build
from transfusion.data.index.build import IndexJob, IndexLocation, write_index
from transfusion.data.index.columns_file import read_header, write_columns
from transfusion.data.index.source_index import SourceIndex, build_index
from transfusion.data.shards import shard as module
from transfusion.data.shards.shard import LocalShard
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    f"a text with the number {number} in it, of the same length as all others" for number in range(100, 500)
]


def write(folder: Path, texts: list[str]) -> Path:
    (shard,) = write_shards([{"txt": text.encode()} for text in texts], folder)
    return shard


def opened(shard: Path, tokenizer: Tokenizer, **place: Path) -> SourceIndex:
    source = SourceConfig(name="s", shards=str(shard))
    return build_index(source, tokenizer, patches=16, sequence_length=128, place=IndexLocation(**place))


def texts_of(index: SourceIndex, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(index.text_ids(sample).tolist()) for sample in range(len(index))]


def changed_at(place: int) -> list[str]:
    """One letter of one text in the middle of a shard is another."""
    return [*TEXTS[:place], TEXTS[place].replace("same", "lame"), *TEXTS[place + 1 :]]


@pytest.mark.parametrize(
    "way", ["in place", "in place, time set back", "replaced", "replaced, time set back"]
)
def test_one_letter_in_a_large_shard_is_noticed(tmp_path: Path, tokenizer: Tokenizer, way: str) -> None:
    shard = write(tmp_path / "s", TEXTS)
    assert texts_of(opened(shard, tokenizer), tokenizer) == TEXTS
    before = shard.stat()
    new = write(tmp_path / "new", changed_at(123))
    assert new.stat().st_size == before.st_size
    if way.startswith("in place"):
        shard.write_bytes(new.read_bytes())
    else:
        new.replace(shard)
    if way.endswith("set back"):
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts_of(opened(shard, tokenizer), tokenizer) == changed_at(123)


def test_a_changed_shard_of_a_folder_of_indexes_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = write(tmp_path / "s", TEXTS)
    place = IndexLocation(folder=tmp_path / "index")
    place.folder.mkdir()  # type: ignore[union-attr]
    opened(shard, tokenizer, folder=tmp_path / "index")
    shard.write_bytes(write(tmp_path / "new", changed_at(200)).read_bytes())
    with pytest.raises(UserError, match="is stale: the shard has changed since; renew it with"):
        opened(shard, tokenizer, folder=tmp_path / "index")


def test_a_copy_is_read_once_and_then_known(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write(tmp_path / "s", TEXTS)
    opened(shard, tokenizer)
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    copy = tmp_path / "copy" / shard.name
    made = []
    monkeypatch.setattr(build, "index_shard", lambda *arguments: made.append(arguments))
    assert texts_of(opened(copy, tokenizer), tokenizer) == TEXTS
    # The next process asks for no digest.
    monkeypatch.setattr(module, "known_digest", None)
    index = opened(copy, tokenizer)
    assert texts_of(index, tokenizer) == TEXTS and not made
    os.close(index.part(0).open())


def test_a_copy_with_an_index_that_nobody_can_write_is_compared_each_time(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write(tmp_path / "s", TEXTS)
    opened(shard, tokenizer)
    shutil.copytree(tmp_path / "s", tmp_path / "copy")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(build, "_locked", refuse)
    copy = tmp_path / "copy" / shard.name
    assert texts_of(opened(copy, tokenizer), tokenizer) == TEXTS
    assert not list((tmp_path / "copy").glob("*.compared"))


def test_a_shard_that_changes_while_it_is_read_is_no_longer_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shard = write(tmp_path / "s", TEXTS)
    part = opened(shard, tokenizer).part(0)
    os.close(part.open())
    os.utime(shard, (5, 5))
    os.close(part.open())
    shard.write_bytes(write(tmp_path / "new", changed_at(7)).read_bytes())
    with pytest.raises(OSError, match="changed since it was indexed"):
        part.open()


def test_runs_with_two_tokenizers_keep_two_indexes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = train_tokenizer(["xylophone quartz vex"] * 50 + TEXTS, tmp_path / "other.model", vocabulary=300)
    shard = write(tmp_path / "s", TEXTS)
    first = opened(shard, tokenizer)
    second = opened(shard, other)
    assert texts_of(second, other) == TEXTS
    # Only now does the first map its columns.
    assert texts_of(first, tokenizer) == TEXTS
    assert len(list((tmp_path / "s").glob("*.index"))) == 2


def test_an_index_that_is_replaced_before_it_is_read_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = write(tmp_path / "s", TEXTS)
    early = opened(shard, tokenizer)
    # A read of `lengths` has mapped it; another process maps it later.
    part = build.ShardIndex(early.part(0).path, LocalShard(shard))
    shard.write_bytes(write(tmp_path / "new", TEXTS[:100]).read_bytes())
    opened(shard, tokenizer)
    with pytest.raises(OSError, match="replaced while it was read; start the command again"):
        part.key(0)


def test_all_bytes_are_compared_on_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = write(tmp_path / "s", TEXTS)
    part = opened(shard, tokenizer).part(0)
    part.compare(always=True)
    part._facts = part._facts | {"digest": "of other bytes"}
    assert not part.is_doubtful
    with pytest.raises(build.StaleIndex, match="the shard has changed since"):
        part.compare(always=True)


def test_data_index_compares_all_bytes_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard, out = write(tmp_path / "s", TEXTS), tmp_path / "out"
    job = IndexJob([str(shard)], tokenizer.path)
    write_index([job], out, max_share=1)
    (path,) = out.glob("*.index")
    made = path.read_bytes()
    write_index([job], out, max_share=1, read=True)
    assert path.read_bytes() == made
    # As if the disk had lost a bit: the state of the file is what it was.
    facts, columns = read_header(path.open("rb"))
    write_columns(
        path, {name: column.values(made) for name, column in columns.items()}, facts | {"digest": "0" * 32}
    )
    other = path.read_bytes()
    write_index([job], out, max_share=1)
    assert path.read_bytes() == other
    write_index([job], out, max_share=1, read=True)
    assert path.read_bytes() == made


def test_an_index_without_states_is_stale_and_no_riddle(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard, out = write(tmp_path / "s", TEXTS), tmp_path / "out"
    write_index([IndexJob([str(shard)], tokenizer.path)], out, max_share=1)
    (path,) = out.glob("*.index")
    facts, columns = read_header(path.open("rb"))
    values = {name: column.values(path.read_bytes()) for name, column in columns.items()}
    former = {name: fact for name, fact in facts.items() if name not in ("ctime_ns", "inode")} | {
        "policy": "former"
    }
    write_columns(path, values, former)
    with pytest.raises(UserError, match="is stale: it was made with other rules"):
        opened(shard, tokenizer, folder=out)
