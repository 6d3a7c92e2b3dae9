"""save → validate → restore → reconstruct, every block in a folder of its own."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

from stackwise.runs import RunError, tensor_file
from stackwise.runs.backups import BlockBackups


class Stack(nn.Module):
    def __init__(self, n: int = 3, width: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(n)
        ).to(dtype)


def backups_of(path, model: Stack) -> BlockBackups:
    backups = BlockBackups(path / "full_precision", "run-7")
    for index, block in enumerate(model.blocks):
        backups.save(index, block.state_dict(), {"stage": index})
    return backups


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_every_block_has_its_own_folder_and_restores_its_own_values(tmp_path):
    # The published system wrote every backup to block_0, and its restore found nothing.
    model = Stack()
    backups = backups_of(tmp_path, model)
    assert sorted(p.name for p in backups.path.iterdir()) == ["block_0", "block_1", "block_2"]
    assert backups.indices() == [0, 1, 2]
    for index, block in enumerate(model.blocks):
        restored = backups.restore(index)
        assert restored.keys() == block.state_dict().keys()
        assert all(torch.equal(restored[k], v) for k, v in block.state_dict().items())


def test_indices_are_numbers_not_names(tmp_path):
    backups = BlockBackups(tmp_path, "r")
    for index in (10, 2, 0):
        backups.save(index, {"w": torch.full((1,), float(index))})
    assert backups.indices() == [0, 2, 10]
    assert backups.restore(10)["w"].item() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reconstruct_gives_bit_identical_blocks(tmp_path, dtype):
    model, fresh = Stack(dtype=dtype), Stack(dtype=dtype)
    assert not same(model, fresh)
    assert backups_of(tmp_path, model).reconstruct(fresh) == [0, 1, 2]
    assert same(model, fresh)


def test_reconstruct_some_blocks_leaves_the_others(tmp_path):
    model, fresh = Stack(), Stack()
    before = fresh.blocks[1][0].weight.detach().clone()
    backups_of(tmp_path, model).reconstruct(fresh, [2, 0])
    assert same(model.blocks[0], fresh.blocks[0])
    assert same(model.blocks[2], fresh.blocks[2])
    assert torch.equal(fresh.blocks[1][0].weight, before)


def test_manifest_tells_run_time_precision_shapes_and_hash(tmp_path):
    backups = backups_of(tmp_path, Stack(dtype=torch.bfloat16))
    manifest = json.loads((backups.folder(1) / "manifest.json").read_text())
    assert manifest["run_id"] == "run-7"
    assert manifest["block"] == 1
    assert manifest["stage"] == 1
    assert manifest["precision"] == "bfloat16"
    assert manifest["timestamp"].endswith("+00:00")
    assert manifest["shapes"]["0.weight"] == [4, 4]
    recorded = manifest["files"]["block.safetensors"]
    data = (backups.folder(1) / "block.safetensors").read_bytes()
    assert recorded == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_saving_again_replaces_the_block(tmp_path):
    backups = BlockBackups(tmp_path, "r")
    backups.save(0, {"w": torch.zeros(2)})
    backups.save(0, {"w": torch.ones(2)})
    assert backups.restore(0)["w"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["block_0"]


def test_missing_block_names_those_that_exist(tmp_path):
    backups = backups_of(tmp_path, Stack(2))
    with pytest.raises(RunError, match=r"block_5 is missing; blocks with a backup: 0, 1"):
        backups.restore(5)
    with pytest.raises(RunError, match="no block backups"):
        BlockBackups(tmp_path / "other", "r").reconstruct(Stack())


def test_altered_backup_is_refused_and_the_model_stays_untouched(tmp_path):
    backups = backups_of(tmp_path, Stack())
    path = backups.folder(2) / "block.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    fresh = Stack()
    before = [p.detach().clone() for p in fresh.parameters()]
    with pytest.raises(RunError, match=r"block_2/block\.safetensors is damaged"):
        backups.reconstruct(fresh)
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.parameters(), strict=True))


def test_moved_folder_is_not_taken_for_another_block(tmp_path):
    backups = backups_of(tmp_path, Stack(2))
    backups.folder(1).rename(backups.folder(4))
    with pytest.raises(RunError, match="holds block 1, not 4"):
        backups.restore(4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Stack(2), "has only 2 blocks"),
        (Stack(3, width=5), r"0\.weight is \(4, 4\) .* the model's is \(5, 5\)"),
        (Stack(3, dtype=torch.bfloat16), r"float32, the model's is .* torch\.bfloat16"),
    ],
)
def test_model_that_does_not_fit_is_refused_untouched(tmp_path, other, message):
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(RunError, match=message):
        backups_of(tmp_path, Stack()).reconstruct(other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_save_validates_what_reached_the_disk(tmp_path, monkeypatch):
    original = tensor_file.read_tensors

    def off_by_one_bit(path):
        tensors = original(path)
        tensors["w"].view(torch.int32)[0] ^= 1
        return tensors

    monkeypatch.setattr(tensor_file, "read_tensors", off_by_one_bit)
    with pytest.raises(RunError, match="w reads back different from what was written"):
        BlockBackups(tmp_path, "r").save(0, {"w": torch.ones(2)})


def test_wrong_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="index is -1"):
        BlockBackups(tmp_path, "r").save(-1, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="block 0 has no tensors"):
        BlockBackups(tmp_path, "r").save(0, {})
