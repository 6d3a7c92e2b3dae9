"""Checkpoints are whole, verified, pruned, and survive kills, damage and full disks."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.runs.atomic import clean_temporary
from stackwise.runs.checkpoints import CheckpointFolder
from stackwise.runs.errors import RunError
from tests.runs.killing import die_at, kill_after, run_apart

GROUPS = ("model", "optimizer", "rng")


def tensors_of(step: int, size: int = 100) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {"x": torch.full((size,), float(step)), "n": torch.tensor(step)} for name in GROUPS
    }


def save(folder: Path, *steps: int, keep: int = 2) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, keep)
    for step in steps:
        checkpoints.save(step, tensors_of(step), {"at": step})
    return checkpoints


def assert_whole(folder: Path, size: int = 100) -> int:
    """Every checkpoint verifies, and the newest has everything of one step."""
    checkpoints = CheckpointFolder(folder, 2)
    for step in checkpoints.steps():
        checkpoints.open(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = checkpoints.latest()
    assert checkpoint is not None
    assert checkpoint.state == {"at": checkpoint.step}
    for name in GROUPS:
        loaded = checkpoint.load(name)
        assert loaded["n"].item() == checkpoint.step
        assert torch.equal(loaded["x"], torch.full((size,), float(checkpoint.step)))
    return checkpoint.step


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_round_trip_of_tensors_and_state(tmp_path):
    state = {"loss": 0.1 + 0.2, "best": float("inf"), "big": 2**80, "list": [1, "a", None]}
    weight = torch.randn(2, 3)
    path = CheckpointFolder(tmp_path, 2).save(3, {"model": {"w": weight}}, state)
    loaded = CheckpointFolder(tmp_path, 2).latest()
    assert loaded.path == path == tmp_path / "step_00000003"
    assert loaded.state == state
    assert loaded.step == 3
    assert loaded.names == ("model",)
    assert torch.equal(loaded.load("model")["w"], weight)


def test_no_checkpoint_is_none(tmp_path):
    assert CheckpointFolder(tmp_path / "none", 2).latest() is None


def test_newest_are_kept_and_nothing_else_is_left(tmp_path):
    save(tmp_path, 1, 2, 9, 10, 100)
    assert sorted(os.listdir(tmp_path)) == ["step_00000010", "step_00000100"]


def test_saving_after_going_back_discards_the_abandoned_continuation(tmp_path):
    save(tmp_path, 10, 20, 30, keep=3).save(15, tensors_of(15), {"at": 15})
    assert CheckpointFolder(tmp_path, 3).steps() == [10, 15]
    assert assert_whole(tmp_path) == 15


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = save(tmp_path, 5)
    checkpoints.save(5, tensors_of(7), {"at": 7})
    assert checkpoints.steps() == [5]
    assert checkpoints.latest().load("model")["n"].item() == 7


@pytest.mark.parametrize(
    "name", ["model.safetensors", "rng.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / name
    if damage == "flip":
        flip(path, path.stat().st_size // 2)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=f"step_00000002/{name} is") as caught:
        checkpoint = CheckpointFolder(tmp_path, 2).latest()
    assert len(caught) == 1
    assert checkpoint.step == 1
    assert checkpoint.load("model")["n"].item() == 1


def test_every_single_flipped_byte_is_detected(tmp_path):
    save(tmp_path, 1)
    checkpoints = CheckpointFolder(tmp_path, 2)
    for path in sorted((tmp_path / "step_00000001").iterdir()):
        for position in range(0, path.stat().st_size, 29):
            flip(path, position)
            with pytest.raises(RunError):
                checkpoints.open(1)
            flip(path, position)
    assert checkpoints.open(1).step == 1


def test_all_damaged_is_an_error_naming_the_files(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        os.truncate(tmp_path / f"step_{step:08d}" / "model.safetensors", 10)
    message = r"no intact checkpoint in .*step_00000002/model.*step_00000001/model.*Restore"
    not_used = pytest.warns(UserWarning, match="is not used")
    with not_used, pytest.raises(RunError, match=message):
        CheckpointFolder(tmp_path, 2).latest()


def test_damage_after_opening_is_found_when_loading(tmp_path):
    checkpoint = save(tmp_path, 1).latest()
    flip(checkpoint.path / "model.safetensors", 300)
    with pytest.raises(RunError, match=r"model\.safetensors is damaged: its SHA-256"):
        checkpoint.load("model")


def test_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000099")
    with pytest.warns(UserWarning, match="another step"), pytest.raises(RunError):
        CheckpointFolder(tmp_path, 2).latest()


def test_unknown_group_names_those_that_exist(tmp_path):
    with pytest.raises(RunError, match="model, optimizer, rng; there is no 'ema'"):
        save(tmp_path, 1).latest().load("ema")


@pytest.mark.parametrize(
    ("tensors", "state", "message"),
    [
        ({"model": {}}, {"t": torch.zeros(1)}, "state: .*Tensor.*tensors belong in a tensor group"),
        ({"../x": {}}, {}, r"tensor group '\.\./x'"),
        ({"model": {"w": 3}}, {}, "w is a int"),
    ],
)
def test_wrong_input_is_refused_before_writing(tmp_path, tensors, state, message):
    with pytest.raises(ValueError, match=message):
        CheckpointFolder(tmp_path, 2).save(1, tensors, state)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_announced_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1, keep=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(RunError, match=r"step_00000002: \d.* kB needed, 1\.0 kB free"):
            checkpoints.save(2, tensors_of(2), {"at": 2})
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert assert_whole(tmp_path) == 1


def _save_beyond_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        CheckpointFolder(folder, 1).save(2, tensors_of(2, 100_000), {"at": 2})
    except RunError as error:
        os._exit(42 if "disk filled up" in str(error) else 43)


def test_disk_that_fills_up_while_writing_leaves_the_last_checkpoint(tmp_path):
    save(tmp_path, 1, keep=1)
    assert run_apart(_save_beyond_limit, tmp_path) == 42
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert assert_whole(tmp_path) == 1


def _save_one(folder: Path, step: int) -> None:
    CheckpointFolder(folder, 1).save(step, tensors_of(step), {"at": step})


@pytest.mark.parametrize("step", [1, 2], ids=["same_step", "next_step"])
def test_killed_at_every_storage_operation_a_whole_checkpoint_remains(tmp_path, step):
    for operation in range(60):
        home = tmp_path / str(operation)
        save(home, 1, keep=1)
        died = die_at(operation, _save_one, home, step)
        clean_temporary(home)
        assert assert_whole(home) in (1, step)
        assert all(name.startswith("step_") for name in os.listdir(home))
        if not died:
            break
    else:
        pytest.fail("the save never finished")
    assert operation > 8


def _save_forever(ready: Any, folder: Path, first: int) -> None:
    checkpoints = CheckpointFolder(folder, 2)
    for step in range(first, first + 100_000):
        checkpoints.save(step, tensors_of(step, 100_000), {"at": step})
        ready.set()


def test_sigkill_at_random_moments_leaves_whole_checkpoints_and_cleans_up(tmp_path):
    last = 0
    for _ in range(4):
        kill_after(random.uniform(0, 0.1), _save_forever, tmp_path, last + 1)
        clean_temporary(tmp_path)
        assert all(name.startswith("step_") for name in os.listdir(tmp_path))
        step = assert_whole(tmp_path, 100_000)
        assert step > last
        last = step


def test_state_is_readable_json_for_people(tmp_path):
    save(tmp_path, 1)
    assert json.loads((tmp_path / "step_00000001" / "state.json").read_text()) == {"at": 1}
