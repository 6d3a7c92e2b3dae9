"""The activation cache returns exactly what was computed, or refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tqdm import tqdm

from stackwise.runs import RunError
from stackwise.training.activation_cache import (
    ActivationCache,
    CacheSpec,
    StaleCacheError,
)

SPEC = CacheSpec(
    n_rows=11,
    n_masks=2,
    seq_len=3,
    d_model=4,
    dtype=torch.float32,
    data_fingerprint="data",
    mask_seed=7,
    mask_low=0.15,
    mask_high=0.9,
    attention_mode="bidirectional",
)


def residual(spec: CacheSpec, row: int, mask: int, stage: int) -> torch.Tensor:
    """Some (L, D) values that no other row, mask or stage has."""
    generator = torch.Generator().manual_seed(row * 1_000_003 + mask * 1009 + stage)
    return torch.randn(spec.seq_len, spec.d_model, generator=generator).to(spec.dtype)


def expected(spec: CacheSpec, rows, mask: int, stage: int) -> torch.Tensor:
    return torch.stack([residual(spec, int(row), mask, stage) for row in rows])


def producer(spec: CacheSpec, stage: int, calls: list | None = None) -> Callable:
    def produce(slots: np.ndarray) -> torch.Tensor:
        if calls is not None:
            calls.append(slots.copy())
        return torch.stack([residual(spec, int(r), int(m), stage) for r, m in slots])

    return produce


def advancer(spec: CacheSpec, stage: int) -> Callable:
    """Checks that it is handed ``stage`` and returns ``stage + 1``."""

    def advance(slots: np.ndarray, hidden: torch.Tensor) -> torch.Tensor:
        assert torch.equal(hidden, producer(spec, stage)(slots))
        return producer(spec, stage + 1)(slots)

    return advance


def filled(
    folder: Path, spec: CacheSpec = SPEC, stage: int = 0, rows_per_shard: int = 4
) -> ActivationCache:
    cache = ActivationCache(folder, spec, batch_rows=2, rows_per_shard=rows_per_shard)
    cache.fill(stage, f"hash{stage}", producer(spec, stage))
    return cache


def assert_holds(cache: ActivationCache, stage: int) -> None:
    assert (cache.stage, cache.prefix_hash) == (stage, f"hash{stage}")
    rows = range(cache.spec.n_rows)
    for mask in range(cache.spec.n_masks):
        read = cache.read(rows, mask, stage, f"hash{stage}")
        assert torch.equal(read, expected(cache.spec, rows, mask, stage))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 11, 50])
def test_read_returns_what_was_written_in_any_order(tmp_path, dtype, rows_per_shard):
    spec = dataclasses.replace(SPEC, dtype=dtype)
    written = filled(tmp_path, spec, rows_per_shard=rows_per_shard)
    for cache in (written, ActivationCache(tmp_path, spec)):
        assert_holds(cache, 0)
        for rows in ([10, 0, 5], [3, 3, 3], np.random.permutation(11), torch.tensor([9, 2]), []):
            read = cache.read(rows, 1, 0, "hash0")
            assert read.dtype == dtype
            assert read.shape == (len(rows), 3, 4)
            for hidden, row in zip(read, rows, strict=True):
                assert torch.equal(hidden, residual(spec, int(row), 1, 0))


def test_a_mask_per_row_can_be_read(tmp_path):
    read = filled(tmp_path).read([4, 4, 8], [0, 1, 1], 0, "hash0")
    wanted = [residual(SPEC, 4, 0, 0), residual(SPEC, 4, 1, 0), residual(SPEC, 8, 1, 0)]
    assert torch.equal(read, torch.stack(wanted))


def test_bits_survive_even_for_nan_and_negative_zero(tmp_path):
    spec = dataclasses.replace(SPEC, dtype=torch.bfloat16, n_rows=1, n_masks=1)
    bits = torch.tensor([0x7FC1, -0x8000, 0x7F80, -0x003F] * 3, dtype=torch.int16).view(1, 3, 4)
    cache = ActivationCache(tmp_path, spec)
    cache.fill(0, "h", lambda slots: bits.view(torch.bfloat16))
    assert torch.equal(cache.read([0], 0, 0, "h").view(torch.int16), bits)


def test_read_is_a_copy(tmp_path):
    cache = filled(tmp_path)
    cache.read([0], 0, 0, "hash0").zero_()
    assert_holds(cache, 0)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 11, 13])
@pytest.mark.parametrize("batch_rows", [1, 2, 3, 8])
def test_batches_have_one_size_and_one_mask_and_cover_every_slot(tmp_path, n_rows, batch_rows):
    spec = dataclasses.replace(SPEC, n_rows=n_rows)
    cache = ActivationCache(tmp_path, spec, batch_rows=batch_rows, rows_per_shard=5)
    calls: list[np.ndarray] = []
    cache.fill(0, "hash0", producer(spec, 0, calls))
    assert all(slots.shape == (batch_rows, 2) for slots in calls)
    assert all(len(set(slots[:, 1])) == 1 for slots in calls)
    assert {tuple(slot) for slots in calls for slot in slots.tolist()} == {
        (row, mask) for row in range(n_rows) for mask in range(2)
    }
    assert_holds(cache, 0)


def test_fill_skips_shards_already_there_and_recomputes_others(tmp_path):
    cache = filled(tmp_path)
    calls: list[np.ndarray] = []
    cache.fill(0, "hash0", producer(SPEC, 0, calls))
    assert calls == []
    (tmp_path / "shard_00001.safetensors").unlink()
    cache = ActivationCache(tmp_path, SPEC, batch_rows=2)
    assert cache.stage is None
    cache.fill(0, "hash0", producer(SPEC, 0, calls))
    assert {int(row) for slots in calls for row in slots[:, 0]} == {4, 5, 6, 7}
    assert_holds(cache, 0)
    cache.fill(2, "hash2", producer(SPEC, 2))
    assert_holds(cache, 2)


def test_roll_replaces_every_shard(tmp_path):
    cache = filled(tmp_path)
    for stage in range(3):
        cache.roll(stage, f"hash{stage}", stage + 1, f"hash{stage + 1}", advancer(SPEC, stage))
        assert_holds(cache, stage + 1)
    assert_holds(ActivationCache(tmp_path, SPEC), 3)
    assert sorted(os.listdir(tmp_path)) == [
        "cache.json",
        *(f"shard_0000{i}.safetensors" for i in range(3)),
    ]


def test_roll_broken_off_by_an_error_continues_with_the_remaining_shards(tmp_path):
    broken = filled(tmp_path)
    done: list[int] = []

    def breaks(slots: np.ndarray, hidden: torch.Tensor) -> torch.Tensor:
        if slots[0, 0] >= 6:
            raise RuntimeError("broken off")
        return advancer(SPEC, 0)(slots, hidden)

    with pytest.raises(RuntimeError, match="broken off"):
        broken.roll(0, "hash0", 1, "hash1", breaks)
    for cache in (broken, ActivationCache(tmp_path, SPEC, batch_rows=2)):
        assert cache.stage is None
        assert cache.prefix_hash is None
        assert cache.boundaries() == {(0, "hash0"), (1, "hash1")}
        assert torch.equal(cache.read([3], 0, 1, "hash1")[0], residual(SPEC, 3, 0, 1))
        assert torch.equal(cache.read([4], 0, 0, "hash0")[0], residual(SPEC, 4, 0, 0))

    def continues(slots: np.ndarray, hidden: torch.Tensor) -> torch.Tensor:
        done.extend(slots[:, 0].tolist())
        return advancer(SPEC, 0)(slots, hidden)

    cache.roll(0, "hash0", 1, "hash1", continues)
    assert min(done) == 4
    assert_holds(cache, 1)


def test_roll_refuses_foreign_and_missing_shards_before_any_work(tmp_path):
    cache = filled(tmp_path)
    never = pytest.fail
    with pytest.raises(
        StaleCacheError, match=r"block 0 under weights hash0; rolling needs .* changed"
    ):
        cache.roll(0, "changed", 1, "hash1", never)
    with pytest.raises(StaleCacheError, match="rolling needs the output of block 1"):
        cache.roll(1, "hash1", 2, "hash2", never)
    (tmp_path / "shard_00002.safetensors").unlink()
    cache = ActivationCache(tmp_path, SPEC)
    with pytest.raises(StaleCacheError, match=r"shard_00002\.safetensors is missing"):
        cache.roll(0, "hash0", 1, "hash1", never)


@pytest.mark.parametrize("label", [(1, "hash0"), (0, "hash1")])
def test_read_refuses_another_boundary_or_other_weights(tmp_path, label):
    cache = filled(tmp_path)
    with pytest.raises(StaleCacheError, match=r"block 0 under weights hash0; .* was asked for"):
        cache.read([0], 0, *label)


@pytest.mark.parametrize(
    "change",
    [
        {"n_rows": 12},
        {"n_masks": 1},
        {"seq_len": 4},
        {"d_model": 8},
        {"dtype": torch.bfloat16},
        {"data_fingerprint": "other"},
        {"mask_seed": 8},
        {"mask_low": 0.2},
        {"mask_high": 0.8},
        {"attention_mode": "causal"},
        {"extra": "mlm"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_folder_of_another_spec_is_refused_naming_the_key(tmp_path, change):
    filled(tmp_path)
    assert set(change) <= {field.name for field in dataclasses.fields(CacheSpec)}
    with pytest.raises(StaleCacheError, match=f"was made for {next(iter(change))} .*, now"):
        ActivationCache(tmp_path, dataclasses.replace(SPEC, **change))
    assert_holds(ActivationCache(tmp_path, SPEC), 0)


def test_shard_copied_from_another_cache_or_place_is_refused(tmp_path):
    filled(tmp_path / "a")
    filled(tmp_path / "b", dataclasses.replace(SPEC, mask_seed=8))
    name = "shard_00000.safetensors"
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(StaleCacheError, match=r"shard_00000.* belongs to another cache"):
        ActivationCache(tmp_path / "a", SPEC)
    shutil.copy(tmp_path / "a" / "shard_00001.safetensors", tmp_path / "a" / name)
    with pytest.raises(StaleCacheError, match=r"shard_00000.* belongs to another cache"):
        ActivationCache(tmp_path / "a", SPEC)


def test_label_and_data_are_in_one_standard_safetensors_file(tmp_path):
    filled(tmp_path, stage=3)
    with safe_open(tmp_path / "shard_00001.safetensors", framework="pt") as file:
        assert file.metadata()["stage"] == "3"
        assert file.metadata()["prefix_hash"] == "hash3"
        hidden = file.get_tensor("hidden")
    assert hidden.shape == (2, 4, 12)
    assert torch.equal(hidden[1, 2].view(3, 4), residual(SPEC, 6, 1, 3))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_shard_is_refused_on_opening(tmp_path, keep):
    filled(tmp_path)
    path = tmp_path / "shard_00001.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(RunError, match=r"shard_00001\.safetensors is damaged"):
        ActivationCache(tmp_path, SPEC)


def test_shard_truncated_while_open_is_an_error_not_a_crash(tmp_path):
    cache = filled(tmp_path)
    os.truncate(tmp_path / "shard_00001.safetensors", 10)
    with pytest.raises(RunError, match=r"shard_00001\.safetensors was truncated while in use"):
        cache.read([5], 0, 0, "hash0")


def test_flipped_bit_is_detected_when_that_slot_is_read(tmp_path):
    filled(tmp_path)
    path = tmp_path / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + 2 * SPEC.slot_bytes + 5] ^= 4
    path.write_bytes(data)
    cache = ActivationCache(tmp_path, SPEC)
    assert torch.equal(cache.read([5], 0, 0, "hash0")[0], residual(SPEC, 5, 0, 0))
    with pytest.raises(RunError, match=r"shard_00001\.safetensors is damaged: the checksum"):
        cache.read([6], 0, 0, "hash0")


def test_damaged_settings_are_named(tmp_path):
    filled(tmp_path)
    os.truncate(tmp_path / "cache.json", 20)
    with pytest.raises(RunError, match=r"cache\.json is damaged"):
        ActivationCache(tmp_path, SPEC)


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    filled(tmp_path)
    (tmp_path / ".shard_00001.safetensors.123-abcd.tmp").write_bytes(b"half")
    assert_holds(ActivationCache(tmp_path, SPEC), 0)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.zeros(2, 3, 5), r"hidden is \(2, 3, 5\) .*stores \(2, 3, 4\) torch\.float32"),
        (torch.zeros(1, 3, 4), r"hidden is \(1, 3, 4\)"),
        (torch.zeros(2, 3, 4, dtype=torch.bfloat16), r"hidden is .* torch\.bfloat16"),
    ],
)
def test_wrong_result_of_produce_is_refused_and_not_stored(tmp_path, hidden, message):
    cache = ActivationCache(tmp_path, SPEC, batch_rows=2)
    with pytest.raises(ValueError, match=message):
        cache.fill(0, "hash0", lambda slots: hidden)
    assert os.listdir(tmp_path) == ["cache.json"]


@pytest.mark.parametrize(
    ("rows", "mask", "message"),
    [
        ([11], 0, "row_ids spans 11 to 11; 0 to 10 exist"),
        ([-1], 0, "row_ids spans -1"),
        ([0], 2, "mask_index spans 2 to 2; 0 to 1 exist"),
    ],
)
def test_unknown_rows_and_masks_are_refused(tmp_path, rows, mask, message):
    with pytest.raises(ValueError, match=message):
        filled(tmp_path).read(rows, mask, 0, "hash0")


def test_prefetch_gives_what_read_gives_in_order(tmp_path):
    cache = filled(tmp_path)
    requests = [(np.random.permutation(11)[:3], index % 2) for index in range(20)]
    got = list(cache.prefetch(iter(requests), 0, "hash0"))
    assert len(got) == 20
    for hidden, (rows, mask) in zip(got, requests, strict=True):
        assert torch.equal(hidden, expected(SPEC, rows, mask, 0))


def test_prefetch_reads_ahead_but_only_so_far(tmp_path):
    cache = filled(tmp_path)
    asked: list[int] = []
    third = threading.Event()

    def requests():
        for index in range(10):
            asked.append(index)
            if index == 2:
                third.set()
            yield [index], 0

    stream = cache.prefetch(requests(), 0, "hash0", depth=2)
    next(stream)
    assert third.wait(10), "nothing was read ahead"
    assert len(asked) <= 4
    stream.close()


@pytest.mark.parametrize("where", ["request", "read", "stale"])
def test_prefetch_raises_errors_of_its_thread_after_the_good_batches(tmp_path, where):
    cache = filled(tmp_path)

    def requests():
        yield [0], 0
        if where == "request":
            raise KeyError("sampler")
        yield [99], 0

    kind, label = {
        "request": (KeyError, "hash0"),
        "read": (ValueError, "hash0"),
        "stale": (StaleCacheError, "changed"),
    }[where]
    stream = cache.prefetch(requests(), 0, label)
    if where != "stale":
        assert torch.equal(next(stream), expected(SPEC, [0], 0, 0))
    with pytest.raises(kind):
        next(stream)


def test_closing_a_prefetch_ends_its_thread(tmp_path):
    cache = filled(tmp_path)
    before = threading.active_count()
    stream = cache.prefetch(((([0], 0)) for _ in range(10**9)), 0, "hash0")
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_progress_counts_the_slots_left_to_do(tmp_path):
    cache = ActivationCache(tmp_path, SPEC, batch_rows=2, rows_per_shard=4)
    with tqdm(total=None, disable=False, file=open(os.devnull, "w")) as progress:
        cache.fill(0, "hash0", producer(SPEC, 0), progress)
        assert (progress.n, progress.total) == (22, 22)
        cache.roll(0, "hash0", 1, "hash1", advancer(SPEC, 0), progress)
        assert (progress.n, progress.total) == (44, 44)


def test_required_bytes_covers_the_folder_and_one_shard_more(tmp_path):
    spec = dataclasses.replace(SPEC, n_rows=300, seq_len=64, d_model=32)
    cache = ActivationCache(tmp_path, spec, batch_rows=4)
    cache.fill(0, "h", lambda slots: torch.zeros(4, 64, 32))
    used = sum(path.stat().st_size for path in tmp_path.iterdir())
    largest = max(path.stat().st_size for path in tmp_path.iterdir())
    required = ActivationCache.required_bytes(spec)
    assert used + largest <= required <= 1.01 * (used + largest) + 10_000


def test_fits_respects_budget_and_free_space(tmp_path, monkeypatch):
    spec = dataclasses.replace(SPEC, n_rows=10**6, seq_len=128, d_model=64)
    needed = ActivationCache.required_bytes(spec)
    assert needed > 65.5e9
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert ActivationCache.fits(spec, tmp_path, needed / 1e9)[0]
    fits, reason = ActivationCache.fits(spec, tmp_path, 50.0)
    assert not fits
    assert reason == (
        f"the activation cache needs {needed / 1e9:.2f} GB, training.cache_budget_gb allows 50 GB"
    )
    usage = usage._replace(free=10 * 10**9)
    fits, reason = ActivationCache.fits(spec, tmp_path, 100.0)
    assert not fits
    assert reason.endswith(f"the disk of {tmp_path} has 10.00 GB")


def test_space_the_cache_already_occupies_counts_as_free(tmp_path, monkeypatch):
    filled(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    spare = ActivationCache.required_bytes(SPEC) - sum(
        path.stat().st_size for path in tmp_path.glob("shard_*")
    )
    for free, fits in ((spare, True), (spare - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert ActivationCache.fits(SPEC, tmp_path, 1.0)[0] == fits


def test_full_disk_in_mid_roll_leaves_every_shard_whole(tmp_path, monkeypatch):
    cache = filled(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    answers = iter([usage])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: next(answers, usage._replace(free=50)))
    with pytest.raises(RunError, match=r"shard_00001\.safetensors: .* needed, 50 bytes free"):
        cache.roll(0, "hash0", 1, "hash1", advancer(SPEC, 0))
    monkeypatch.undo()
    cache = ActivationCache(tmp_path, SPEC, batch_rows=2)
    assert cache.boundaries() == {(0, "hash0"), (1, "hash1")}
    cache.roll(0, "hash0", 1, "hash1", advancer(SPEC, 0))
    assert_holds(cache, 1)


def test_many_rows_make_few_shards_of_whole_batches(tmp_path):
    spec = dataclasses.replace(SPEC, n_rows=10**9, seq_len=4096, d_model=8192)
    cache = ActivationCache(tmp_path, spec, batch_rows=48)
    assert cache.n_shards <= 512
    assert cache.rows_per_shard % 48 == 0


def test_shard_size_is_remembered(tmp_path):
    filled(tmp_path, rows_per_shard=3)
    assert json.loads((tmp_path / "cache.json").read_text())["rows_per_shard"] == 3
    assert ActivationCache(tmp_path, SPEC, rows_per_shard=9).rows_per_shard == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_rows": 0}, "n_rows is 0"),
        ({"n_masks": 0}, "n_masks is 0"),
        ({"dtype": torch.int64}, r"dtype is torch\.int64"),
    ],
)
def test_impossible_spec_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **change)
