"""Saving whole or not at all, and refusing what cannot be trusted."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_batch, same_state, small_config, state_of, train_step

from transfusion.checkpoint import layout
from transfusion.checkpoint import save as saving
from transfusion.checkpoint.layout import MANIFEST, find_latest, read_manifest, step_folder
from transfusion.checkpoint.resume import SliceReader, load, resume
from transfusion.checkpoint.save import Saver, save
from transfusion.errors import UserError
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
AVERAGED = small_config(optimizer__ema_decay=0.5)


def trained(steps: int = 2) -> LocalEngine:
    engine = LocalEngine(AVERAGED, ALONE)
    for step in range(steps):
        train_step(engine, [make_batch("mixed", step)])
    return engine


def names(run: Path) -> list[str]:
    return sorted(path.name for path in layout.checkpoints_folder(run).iterdir())


def test_everything_comes_back(tmp_path: Path) -> None:
    engine = trained()
    state = TrainState(step=120, skipped_steps=1, tokens=10**10, images=3, data={"a": [1, {"b": None}]})
    folder = save(tmp_path, engine, state, keep=1)
    assert folder == tmp_path / "checkpoints" / "step_00000120"
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "rank_00000.safetensors"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000120\n"
    fresh = LocalEngine(AVERAGED, ALONE)
    assert resume(tmp_path, fresh) == state
    assert same_state(state_of(engine), state_of(fresh))
    assert fresh.updates == 2
    assert {int(state["step"]) for state in fresh.optimizer.state.values()} == {2}


def test_a_new_run_has_nothing_to_resume(tmp_path: Path) -> None:
    assert resume(tmp_path, LocalEngine(AVERAGED, ALONE)) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    engine = trained(0)
    for step in (1, 2, 10, 11):
        save(tmp_path, engine, TrainState(step=step), keep=2)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000011"]


def test_some_are_kept_for_ever(tmp_path: Path) -> None:
    engine = trained(0)
    saver = Saver(tmp_path, engine, keep=1, archive_interval=4)
    for step in range(2, 13, 2):
        saver.begin(TrainState(step=step), copy=True)
    saver.finish()
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000008", "step_00000012"]


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the state at `begin`, also where buffers of a former save are used again."""
    may_write = threading.Event()
    write = saving.write_tensors

    def slow(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(saving, "write_tensors", slow)
    engine = trained()
    saver = Saver(tmp_path, engine, keep=2)
    for step in (2, 3):
        may_write.clear()
        before, state = state_of(engine), TrainState(step=step)
        before = {name: tensor.clone() for name, tensor in before.items()}
        saver.begin(state, copy=True)
        train_step(engine, [make_batch("mixed", step)])
        state.step += 1
        assert not saver.written
        assert find_latest(tmp_path) == (None if step == 2 else step_folder(tmp_path, 2))
        may_write.set()
        saver.finish()
        assert not saver.written
        fresh = LocalEngine(AVERAGED, ALONE)
        assert resume(tmp_path, fresh) == TrainState(step=step)
        assert fresh.updates == step
        assert same_state(before, state_of(fresh)) and not same_state(before, state_of(engine))


def test_a_save_that_fails_on_the_way_says_so_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = trained(0)
    saver = Saver(tmp_path, engine, keep=2)
    saver.begin(TrainState(step=1), copy=True)
    saver.finish()

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_tensors", full)
    saver.begin(TrainState(step=2), copy=True)
    with pytest.raises(UserError, match=r"cannot save .*step_00000002: No space left on device; free space"):
        saver.finish()
    saver.finish()
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_disk_that_gives_back_other_bytes_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_tensors

    def corrupting(path: Path, *arguments: Any) -> Any:
        record = write(path, *arguments)
        with path.open("r+b") as file:
            file.seek(record.bytes // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        return record

    monkeypatch.setattr(saving, "write_tensors", corrupting)
    with pytest.raises(UserError, match="gives other bytes than were written; check the disk"):
        save(tmp_path, trained(0), TrainState(step=1), keep=1)
    assert find_latest(tmp_path) is None


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    engine = trained(0)
    save(tmp_path, engine, TrainState(step=1, tokens=5), keep=2)
    save(tmp_path, engine, TrainState(step=1, tokens=6), keep=2)
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert load(step_folder(tmp_path, 1), engine).tokens == 6


def test_an_average_turned_on_later_starts_at_the_weights(tmp_path: Path) -> None:
    plain = LocalEngine(small_config(), ALONE)
    train_step(plain, [make_batch("mixed", 0)])
    save(tmp_path, plain, TrainState(step=1), keep=1)
    averaged = trained()
    resume(tmp_path, averaged)
    state = state_of(averaged)
    assert all(torch.equal(state[f"ema/{name}"], state[f"weight/{name}"]) for name in averaged.masters)


def test_an_average_turned_off_later_is_left(tmp_path: Path) -> None:
    save(tmp_path, trained(), TrainState(step=1), keep=1)
    plain = LocalEngine(small_config(), ALONE)
    resume(tmp_path, plain)
    assert not any(key.startswith("ema/") for key in state_of(plain))


def test_bf16_weights_are_rounded_anew(tmp_path: Path) -> None:
    save(tmp_path, trained(), TrainState(step=1), keep=1)
    engine = LocalEngine(small_config(train__precision="bf16"), ALONE)
    resume(tmp_path, engine)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, engine.masters[name].bfloat16())


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the process die before its `count`-th action on the disk; returns how many there were."""
    actions = 0

    def dying(real: Any) -> Any:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal actions
            actions += 1
            if actions == count:
                raise Killed
            return real(*arguments, **options)

        return act

    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    return lambda: actions


def test_killed_at_any_action_a_complete_checkpoint_remains(tmp_path: Path) -> None:
    """Step 1 and 2 are saved; the save of step 3 dies at every point in turn."""
    engine = trained(0)
    reader = LocalEngine(AVERAGED, ALONE)
    killed = 0
    for count in range(1, 100):
        run = tmp_path / str(count)
        for step in (1, 2):
            save(run, engine, TrainState(step=step), keep=2)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(count, patch)
            try:
                save(run, engine, TrainState(step=3), keep=2)
            except Killed:
                killed += 1
            else:
                break
        state = resume(run, reader)
        assert state is not None and state.step in (2, 3)
        save(run, engine, TrainState(step=3), keep=2)
        assert names(run) == ["latest", "step_00000002", "step_00000003"]
    assert killed > 8


def test_an_old_checkpoint_half_deleted_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = trained(0)
    save(tmp_path, engine, TrainState(step=1), keep=1)

    def killed(folder: Path) -> None:
        (folder / layout.rank_file(0)).unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed)
        save(tmp_path, engine, TrainState(step=2), keep=1)
    assert layout.complete_checkpoints(tmp_path) == [step_folder(tmp_path, 2)]
    save(tmp_path, engine, TrainState(step=3), keep=1)
    assert names(tmp_path) == ["latest", "step_00000003"]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"^Permission denied \(.*checkpoints\)$"):
        resume(tmp_path, trained(0))


def test_an_unfinished_save_is_passed_over(tmp_path: Path) -> None:
    engine = trained(0)
    first = save(tmp_path, engine, TrainState(step=1), keep=3)
    torn = first.with_name("step_00000002.tmp")
    shutil.copytree(first, torn)
    nameless = step_folder(tmp_path, 3)
    nameless.mkdir()
    assert find_latest(tmp_path) == first
    state = resume(tmp_path, engine)
    assert state is not None and state.step == 1


def cut(folder: Path) -> None:
    path = folder / layout.rank_file(0)
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / layout.rank_file(0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose(folder: Path) -> None:
    (folder / layout.rank_file(0)).unlink()


def edit(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"tokens": 0', '"tokens": 1'))


def scribble(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


def age(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, "format_version": 7}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"rank_00000\.safetensors has \d+ bytes instead of \d+; delete the folder to continue"),
        (flip, r"the contents of rank_00000\.safetensors were changed; delete the folder"),
        (lose, r"rank_00000\.safetensors is missing; delete the folder"),
        (edit, r"manifest\.json was changed after it was written; delete the folder"),
        (scribble, r"manifest\.json is not a checkpoint's manifest; delete the folder"),
        (age, r"has checkpoint format 7, this version reads 2; use the version that wrote it"),
    ],
)
def test_damage_is_told(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    engine = trained()
    folder = save(tmp_path, engine, TrainState(step=1), keep=1)
    damage(folder)
    other = LocalEngine(AVERAGED, ALONE)
    before = state_of(other)
    with pytest.raises(UserError, match=message):
        resume(tmp_path, other)
    assert same_state(before, state_of(other))


def test_a_checkpoint_from_before_a_setting_is_as_its_default(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(0), TrainState(step=1), keep=1)
    manifest = layout.read_manifest(folder)
    del manifest.config["model"]["modality_weights"], manifest.config["model"]["qk_norm"]
    (folder / layout.MANIFEST).write_text(manifest.as_json())
    assert load(folder, LocalEngine(small_config(), ALONE)).step == 1
    own = LocalEngine(small_config(model__modality_weights="ffn"), ALONE)
    with pytest.raises(UserError, match=r"model\.modality_weights was 'shared' and is now 'ffn'"):
        load(folder, own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__hidden_size": 64}, r"model\.hidden_size was 32 and is now 64"),
        ({"model__layers": 3}, r"model\.layers was 2 and is now 3"),
        ({"model__layers": 1}, r"model\.layers was 2 and is now 1"),
        ({"model__patch_position": "none"}, r"model\.patch_position was 'sincos' and is now 'none'"),
        ({"model__rope_theta": 5000.0}, r"model\.rope_theta was 10000\.0 and is now 5000\.0"),
        ({"diffusion__prediction": "flow"}, r"diffusion\.prediction was 'epsilon' and is now 'flow'"),
        ({"model__vocabulary": 65}, r"model\.vocabulary was 64 and is now 65"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save(tmp_path, trained(0), TrainState(step=1), keep=1)
    engine = LocalEngine(small_config(**changes), ALONE)
    with pytest.raises(UserError, match=f"is of another model: {message}; restore the settings of the model"):
        load(folder, engine)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json: No such file"):
        load(tmp_path, trained(0))


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(
        UserError, match=r"cannot save .*step_00000001: .*; free space or set another run\.dir"
    ):
        save(tmp_path, trained(0), TrainState(step=1), keep=1)


def test_any_slice_can_be_read(tmp_path: Path) -> None:
    engine = trained()
    folder = save(tmp_path, engine, TrainState(step=1), keep=1)
    reader = SliceReader(folder, read_manifest(folder))
    weight = engine.masters["embedding.weight"].detach().flatten()
    assert torch.equal(reader.read("weight", "embedding.weight", 5, 70), weight[5:75])
    assert reader.read("weight", "embedding.weight", 5, 0).shape == (0,)
    assert torch.equal(reader.read_whole("weight", "embedding.weight"), engine.masters["embedding.weight"])
    with pytest.raises(
        UserError, match=r"is damaged: elements of embedding\.weight from 2048 on are missing in all files"
    ):
        reader.read("weight", "embedding.weight", 2000, 100)
