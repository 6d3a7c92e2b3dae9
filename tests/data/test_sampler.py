"""The sampler is a pure function; threads change nothing; failures and early stops are clean."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.data import PackedRows, RowSampler, TokenizerInfo, iterate_batches, pack_documents
from stackwise.data.sampler import permute

INFO = TokenizerInfo(100, 0, 1, 2, None, (0, 1, 2))


@pytest.fixture
def rows(tmp_path: Path) -> PackedRows:
    return pack_documents([[3 + n] * 5 for n in range(23)], tmp_path, INFO, 6, "none")


@pytest.mark.parametrize("n", [1, 2, 3, 17, 255, 256, 257, 5000])
def test_permute_is_a_permutation(n: int):
    for epoch in range(3):
        assert sorted(permute(np.arange(n), n, 7, epoch)) == list(range(n))


def test_orders_differ_between_epochs_and_seeds_and_are_spread():
    orders = {
        tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(9) for epoch in range(9)
    }
    assert len(orders) == 81
    firsts = Counter(int(permute(np.array([0]), 10, 3, epoch)[0]) for epoch in range(1000))
    assert set(firsts) == set(range(10))
    assert max(firsts.values()) < 2 * min(firsts.values())
    neighbours = np.diff(permute(np.arange(100_000), 100_000, 1, 0))
    assert (neighbours == 1).sum() < 10
    large = permute(np.arange(1000), 3_000_000_000, 1, 0)
    assert len(set(large.tolist())) == 1000
    assert large.min() >= 0
    assert 2_900_000_000 < large.max() < 3_000_000_000


def test_the_order_is_fixed_for_all_machines():
    sampler = RowSampler(1000, 4, seed=5)
    assert sampler.batch_rows(0)[0].tolist() == [638, 642, 434, 499]
    assert sampler.batch_rows(0)[0].dtype == np.int64


def test_batches_are_a_pure_function_of_their_index():
    sampler, again = RowSampler(23, 4, seed=1), RowSampler(23, 4, seed=1)
    forwards = [sampler.batch_rows(index) for index in range(40)]
    for index in reversed(range(40)):
        ids, epoch = again.batch_rows(index)
        assert ids.tolist() == forwards[index][0].tolist()
        assert epoch == forwards[index][1] == index // 5


def test_an_epoch_visits_rows_once_and_drops_the_short_batch():
    sampler = RowSampler(23, 4, seed=1)
    assert sampler.batches_per_epoch == 5
    for epoch in range(3):
        ids = np.concatenate([sampler.batch_rows(epoch * 5 + k)[0] for k in range(5)])
        assert len(set(ids.tolist())) == 20
    left_out = [
        set(range(23)) - {int(i) for k in range(5) for i in sampler.batch_rows(5 * e + k)[0]}
        for e in range(4)
    ]
    assert len({frozenset(ids) for ids in left_out}) > 1
    exact = RowSampler(20, 4, seed=1)
    ids = np.concatenate([exact.batch_rows(k)[0] for k in range(5)])
    assert sorted(ids.tolist()) == list(range(20))


def test_fewer_rows_than_a_batch_repeat():
    sampler = RowSampler(3, 8, seed=0)
    assert sampler.batches_per_epoch == 1
    for index in range(4):
        ids, epoch = sampler.batch_rows(index)
        assert epoch == index
        assert sorted(Counter(ids.tolist()).values()) == [2, 3, 3]


def test_without_shuffling_rows_come_in_order():
    sampler = RowSampler(7, 3, shuffle=False)
    assert [sampler.batch_rows(k)[0].tolist() for k in range(3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [0, 1, 2],
    ]


def test_threads_give_the_same_batches_in_the_same_order(rows: PackedRows):
    sampler = RowSampler(len(rows), 4, seed=2)
    alone = list(iterate_batches(rows, sampler, 3, 30))
    threaded = list(iterate_batches(rows, sampler, 3, 30, num_workers=3, pin_memory=True))
    assert [item[:2] for item in threaded] == [(k, k // 5) for k in range(3, 30)]
    for ours, theirs in zip(alone, threaded, strict=True):
        assert ours[:2] == theirs[:2]
        assert torch.equal(ours[2].input_ids, theirs[2].input_ids)
        assert torch.equal(ours[2].cu_seqlens, theirs[2].cu_seqlens)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_endless_iterator_can_be_stopped_and_leaves_no_thread(
    rows: PackedRows, num_workers: int
):
    before = threading.active_count()
    iterator = iterate_batches(rows, RowSampler(len(rows), 4), num_workers=num_workers)
    assert [index for index, _, _ in itertools.islice(iterator, 17)] == list(range(17))
    iterator.close()
    assert threading.active_count() == before
    assert next(iterator, None) is None


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_failure_in_a_thread_is_raised_in_its_place(
    rows: PackedRows, num_workers: int, monkeypatch: pytest.MonkeyPatch
):
    sampler = RowSampler(len(rows), 4, seed=2)
    faulty = sampler.batch_rows(6)[0].tolist()
    batch = PackedRows.batch

    def failing(self, row_ids):
        if list(row_ids) == faulty:
            raise OSError("disk gone")
        return batch(self, row_ids)

    monkeypatch.setattr(PackedRows, "batch", failing)
    seen = []
    batches = iterate_batches(rows, sampler, 0, 20, num_workers=num_workers)
    with pytest.raises(OSError, match="disk gone"):
        seen.extend(index for index, _, _ in batches)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_faulty_arguments_are_named_before_anything_is_read(rows: PackedRows):
    with pytest.raises(ValueError, match="n_rows must be at least 1, got 0"):
        RowSampler(0, 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        RowSampler(4, 0)
    with pytest.raises(ValueError, match="index must not be negative, got -1"):
        RowSampler(4, 2).batch_rows(-1)
    with pytest.raises(ValueError, match="num_workers must not be negative, got -1"):
        iterate_batches(rows, RowSampler(len(rows), 4), num_workers=-1)
    with pytest.raises(ValueError, match="the sampler is for 5 rows, the split has 23"):
        iterate_batches(rows, RowSampler(5, 4))
