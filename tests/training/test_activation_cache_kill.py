"""A kill while the cache is filled or rolled leaves shards that are each wholly at one boundary."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.training.activation_cache import ActivationCache, CacheSpec
from tests.runs.killing import die_at, kill_after

SPEC = CacheSpec(
    n_rows=24,
    n_masks=2,
    seq_len=8,
    d_model=128,
    dtype=torch.bfloat16,
    data_fingerprint="data",
    mask_seed=0,
    mask_low=0.15,
    mask_high=0.9,
    attention_mode="bidirectional",
)


def hidden_of(slots: np.ndarray, stage: int) -> torch.Tensor:
    """Every value of a slot is its row + 24 mask + 48 stage, which bfloat16 holds exactly."""
    values = torch.as_tensor(slots[:, 0] + 24 * slots[:, 1] + 48 * stage)
    return values.to(SPEC.dtype)[:, None, None].expand(-1, SPEC.seq_len, SPEC.d_model)


def open_cache(folder: Path) -> ActivationCache:
    return ActivationCache(folder, SPEC, batch_rows=4, rows_per_shard=8)


def fill(cache: ActivationCache) -> None:
    cache.fill(0, "hash0", lambda slots: hidden_of(slots, 0))


def roll(cache: ActivationCache, stage: int) -> None:
    cache.roll(
        stage,
        f"hash{stage}",
        stage + 1,
        f"hash{stage + 1}",
        lambda slots, hidden: hidden + 48,
    )


def assert_every_shard_is_whole(cache: ActivationCache) -> None:
    for start in range(0, SPEC.n_rows, cache.rows_per_shard):
        shard = cache._shards.get(start // cache.rows_per_shard)
        if shard is None:
            continue
        rows = np.arange(start, start + 8)
        for mask in range(2):
            slots = np.stack([rows, np.full(8, mask)], axis=1)
            read = cache.read(rows, mask, shard.stage, shard.prefix_hash)
            assert shard.prefix_hash == f"hash{shard.stage}"
            assert torch.equal(read, hidden_of(slots, shard.stage))


def _fill_and_roll_once(folder: Path) -> None:
    cache = open_cache(folder)
    fill(cache)
    roll(cache, 0)


def test_killed_at_every_storage_operation_filling_and_rolling_continue(tmp_path):
    mixed = 0
    for operation in range(60):
        folder = tmp_path / str(operation)
        died = die_at(operation, _fill_and_roll_once, folder)
        cache = open_cache(folder)
        assert not list(folder.glob(".*"))
        assert_every_shard_is_whole(cache)
        mixed += len(cache.boundaries()) == 2
        if (1, "hash1") not in cache.boundaries():
            fill(cache)
        roll(cache, 0)
        assert cache.stage == 1
        assert_every_shard_is_whole(cache)
        if not died:
            break
    else:
        pytest.fail("the work never finished")
    assert mixed >= 4


def _roll_forever(ready: Any, folder: Path) -> None:
    cache = open_cache(folder)
    if not cache.boundaries():
        fill(cache)
    ready.set()
    for stage in range(min(stage for stage, _ in cache.boundaries()), 4):
        roll(cache, stage)
    signal.pause()  # a fast machine is through before the kill, which must still find the process


def test_sigkill_at_random_moments_of_rolling_never_mixes_a_shard(tmp_path):
    for trial in range(4):
        folder = tmp_path / str(trial)
        kill_after(random.uniform(0, 0.03), _roll_forever, folder)
        cache = open_cache(folder)
        assert_every_shard_is_whole(cache)
        stages = sorted(stage for stage, _ in cache.boundaries())
        assert len(stages) == 1 or stages == [stages[0], stages[0] + 1]
        for stage in range(stages[0], 5):
            roll(cache, stage)
        assert cache.stage == 5
        assert_every_shard_is_whole(cache)
        assert sorted(os.listdir(folder)) == [
            "cache.json",
            *(f"shard_0000{index}.safetensors" for index in range(3)),
        ]
