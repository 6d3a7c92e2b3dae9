"""A run folder is created once, found again, and held by one process at a time."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.runs import RunError, RunStore
from tests.runs.killing import kill_after, run_apart


def config_for(folder: Path, **training: Any) -> StackWiseConfig:
    config = StackWiseConfig()
    config.run.dir = str(folder)
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


def test_created_run_holds_its_configuration_and_opens_again(tmp_path):
    config = config_for(tmp_path, lr=3e-4, keep_checkpoints=3)
    store = RunStore.create(config)
    assert os.listdir(store.path) == ["config.yaml"]
    reopened = RunStore.open(store.path)
    assert reopened.id == store.id == store.path.name
    assert reopened.load_config() == config
    assert store.checkpoints.keep == reopened.checkpoints.keep == 3


def test_generated_ids_tell_date_and_mode_and_do_not_clash(tmp_path):
    config = config_for(tmp_path, mode="blockwise")
    ids = {RunStore.create(config).id for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch(r"20\d{6}-\d{6}-blockwise-[0-9a-f]{4}", run_id) for run_id in ids)


def test_generated_id_that_exists_is_drawn_again(tmp_path, monkeypatch):
    suffixes = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("stackwise.runs.store._new_id", lambda mode: f"{mode}-{next(suffixes)}")
    config = config_for(tmp_path)
    assert [RunStore.create(config).id for _ in range(2)] == ["layerwise-aaaa", "layerwise-bbbb"]


def test_existing_run_is_not_overwritten(tmp_path):
    config = config_for(tmp_path)
    config.run.id = "mine"
    RunStore.create(config).log_metrics({"step": 1})
    with pytest.raises(RunError, match="mine exists already: resume that run, choose another"):
        RunStore.create(config_for(tmp_path, lr=9.0), "mine")
    store = RunStore.open(tmp_path / "mine")
    assert store.load_config() == config
    assert store.read_metrics() == [{"step": 1}]
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".hidden", "a b", "-x"])
def test_id_that_is_no_plain_name_is_refused(tmp_path, run_id):
    with pytest.raises(ValueError, match="run id is"):
        RunStore.create(config_for(tmp_path), run_id)
    assert list(tmp_path.iterdir()) == []


def test_opening_what_is_no_run_names_the_runs_there_are(tmp_path):
    RunStore.create(config_for(tmp_path), "real")
    with pytest.raises(RunError, match=r"wrong is not a folder. Runs found: .*/real"):
        RunStore.open(tmp_path / "wrong")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty/config\.yaml is missing"):
        RunStore.open(tmp_path / "empty")


def test_run_is_found_by_its_id_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunStore.create(config_for(Path("runs")), "mine")
    assert RunStore.open("mine").path == Path("runs/mine")


def test_replaced_configuration_takes_effect(tmp_path):
    store = RunStore.create(config_for(tmp_path))
    store.save_config(config_for(tmp_path, keep_checkpoints=1))
    for step in (1, 2):
        store.save_checkpoint(step, {"model": {"w": torch.ones(1)}}, {})
    assert store.checkpoints.steps() == [2]
    assert RunStore.open(store.path).checkpoints.keep == 1


def test_blocks_are_backed_up_under_the_runs_name(tmp_path):
    store = RunStore.create(config_for(tmp_path), "mine")
    path = store.save_block(3, {"w": torch.arange(4.0)}, {"stage": 3})
    assert path == tmp_path / "mine" / "full_precision" / "block_3"
    assert '"run_id": "mine"' in (path / "manifest.json").read_text()
    assert torch.equal(store.load_block(3)["w"], torch.arange(4.0))


def _try_lock(path: Path, holder: int) -> None:
    try:
        RunStore.open(path).lock()
    except RunError as error:
        os._exit(42 if f"in use by process {holder} on " in str(error) else 43)
    os._exit(0)


def _hold_lock(ready: Any, path: Path) -> None:
    with RunStore.open(path).lock():
        (path / ".left.1-ab.tmp").write_text("half")
        ready.set()
        while True:
            pass


def test_second_process_is_refused_and_told_who_holds_the_run(tmp_path):
    store = RunStore.create(config_for(tmp_path))
    with store.lock():
        for _ in range(2):
            assert run_apart(_try_lock, store.path, os.getpid()) == 42
        with pytest.raises(RunError, match=rf"cannot train .* in use by process {os.getpid()}"):
            RunStore.open(store.path).lock()
    assert run_apart(_try_lock, store.path, os.getpid()) == 0
    with store.lock("resume"):
        pass


def test_lock_of_a_killed_process_is_free_and_its_leftovers_are_removed(tmp_path):
    store = RunStore.create(config_for(tmp_path))
    kill_after(0, _hold_lock, store.path)
    assert (store.path / ".left.1-ab.tmp").exists()
    with store.lock():
        assert sorted(os.listdir(store.path)) == [".lock", "config.yaml"]
