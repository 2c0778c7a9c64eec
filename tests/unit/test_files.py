"""Atomic writes and digests: what a reader sees, what a failure leaves, what a hash follows."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transfusion import files
from transfusion.codec_train import state


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("former")
    with files.atomic_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "former"
    assert path.read_text() == "new"
    files.atomic_write_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("former")
    with pytest.raises(OSError, match="full"), files.atomic_file(path) as unfinished:
        unfinished.write_text("half")
        raise OSError("the disk is full")
    assert os.listdir(tmp_path) == ["a"] and path.read_text() == "former"


def test_what_a_killed_writer_left_is_found_by_its_name(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; from transfusion import files\n"
        "with files.atomic_file(pathlib.Path(sys.argv[1])) as unfinished:\n"
        "    unfinished.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("a[1].tar", "b.tar"):
        killed = subprocess.run([sys.executable, "-c", script, tmp_path / name])
        assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp-*"))) == 2
    files.remove_unfinished(tmp_path, {"a[1].tar"})
    assert [path.name.partition(".tmp-")[0] for path in tmp_path.iterdir()] == [".b.tar"]


def test_a_folder_is_replaced_and_removed_under_other_names(tmp_path: Path) -> None:
    folder, unfinished = tmp_path / "model", tmp_path / "unfinished"
    for text in ("first", "second"):
        unfinished.mkdir()
        (unfinished / "file").write_text(text)
        # What a process that was killed between the renames leaves.
        (tmp_path / "model.former.tmp").mkdir()
        files.replace_folder(unfinished, folder)
        assert os.listdir(tmp_path) == ["model"] and (folder / "file").read_text() == text
    files.remove_folder(folder)
    assert os.listdir(tmp_path) == []


def test_a_digest_is_that_of_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_READ_BYTES", 5)
    path = tmp_path / "a"
    path.write_bytes(bytes(range(12)))
    expected = hashlib.blake2b(bytes(range(12)), digest_size=16).hexdigest()
    assert files.file_digest(path) == files.digest(bytes(range(12))) == expected
    assert files.digest(b"", 4) == hashlib.blake2b(b"", digest_size=4).hexdigest()
    assert files.sha256(b"abc").startswith("ba7816bf8f01cfea")


def test_a_fingerprint_follows_the_values() -> None:
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})
    assert len(files.fingerprint([])) == 12


def test_a_name_has_one_number_for_ever() -> None:
    assert files.name_hash("order") == 0xDD79A144C4631E44
    assert files.name_hash("\udcff") != files.name_hash("\udcfe")


def test_what_a_killed_save_of_a_codec_left_is_gone_after_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / ".step_00000010.safetensors.tmp-1"
    leftover.write_bytes(b"half")
    path = state.save(tmp_path, 10, {"weight": torch.zeros(2)}, {})
    assert os.listdir(tmp_path) == [path.name]
