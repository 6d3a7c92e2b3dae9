"""Which rows form which batch, and batches prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.data.batch import Batch
from stackwise.data.rows import PackedRows

_ROUNDS = 8


class RowSampler:
    """An endless sequence of epochs over ``n_rows`` rows, cut into batches.

    Batch ``index`` is a pure function of (n_rows, batch_size, seed, shuffle, index): nothing has to
    be saved to resume. An epoch drops its last short batch; when there are fewer rows than
    ``batch_size``, every epoch is one batch in which rows repeat.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        if n_rows < 1:
            raise ValueError(f"n_rows must be at least 1, got {n_rows}: the split has no rows")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.batches_per_epoch = max(1, n_rows // batch_size)

    def batch_rows(self, index: int) -> tuple[NDArray[np.int64], int]:
        """Row ids (B,) int64 of batch ``index`` >= 0, and its epoch."""
        if index < 0:
            raise ValueError(f"index must not be negative, got {index}")
        epoch, within = divmod(index, self.batches_per_epoch)
        places = (within * self.batch_size + np.arange(self.batch_size)) % self.n_rows
        if self.shuffle:
            places = permute(places, self.n_rows, self.seed, epoch)
        return places, epoch


def permute(places: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of 0..n-1 sends ``places``, without building it.

    A balanced Feistel network over the smallest even power of two >= n (at least 2^8), walked
    until it falls below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(4, ((n - 1).bit_length() + 1) // 2)
    keys = _splitmix64(
        _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
        + np.uint64(epoch) * np.uint64(_ROUNDS)
        + np.arange(_ROUNDS, dtype=np.uint64)
    )
    values = places.astype(np.uint64)
    pending = np.ones(len(values), dtype=bool)
    while pending.any():
        values[pending] = _feistel(values[pending], half, keys)
        pending = values >= n
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    low_bits = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & low_bits
    for key in keys:
        left, right = right, left ^ (_splitmix64(right ^ key) & low_bits)
    return (left << np.uint64(half)) | right


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def iterate_batches(
    rows: PackedRows,
    sampler: RowSampler,
    start: int = 0,
    stop: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[int, int, Batch]]:
    """Yields (index, epoch, batch) for batches start..stop-1 in order; endless for stop None.

    ``num_workers`` threads prepare up to twice as many batches ahead; the result does not depend
    on it. What fails in a thread is raised here. Closing the iterator early stops the threads.
    ``pin_memory`` has no effect without CUDA.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    if sampler.n_rows != len(rows):
        raise ValueError(f"the sampler is for {sampler.n_rows} rows, the split has {len(rows)}")
    pin = pin_memory and torch.cuda.is_available()
    return _iterate(rows, sampler, _count(start, stop), num_workers, pin)


def _iterate(
    rows: PackedRows, sampler: RowSampler, indices: Iterator[int], num_workers: int, pin: bool
) -> Iterator[tuple[int, int, Batch]]:
    def load(index: int) -> tuple[int, int, Batch]:
        row_ids, epoch = sampler.batch_rows(index)
        batch = rows.batch(row_ids)
        return index, epoch, batch.pin_memory() if pin else batch

    if num_workers == 0:
        yield from map(load, indices)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="stackwise-batches")
    waiting: deque[Future[tuple[int, int, Batch]]] = deque()
    try:
        for index in indices:
            waiting.append(pool.submit(load, index))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _count(start: int, stop: int | None) -> Iterator[int]:
    index = start
    while stop is None or index < stop:
        yield index
        index += 1
