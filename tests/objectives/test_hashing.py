"""The counter-based generator is splitmix64, uniform, and the same everywhere."""

from __future__ import annotations

import pytest
import torch

from stackwise.objectives.hashing import (
    golden_sequence,
    hash_int,
    hash_keys,
    splitmix64,
    uniform,
    uniform_int,
)

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15


def unsigned(x: torch.Tensor) -> list[int]:
    return [value % WORD for value in x.tolist()]


def test_published_splitmix64_sequence_of_seed_zero():
    counters = torch.tensor([GOLDEN * k % WORD for k in (1, 2, 3)], dtype=torch.uint64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert unsigned(splitmix64(counters.view(torch.int64))) == expected


def test_integer_and_tensor_keys_give_the_same_bits():
    grid = hash_keys(3, torch.arange(4)[:, None], 2**63 + 5, torch.arange(5))
    for i in range(4):
        for j in range(5):
            assert grid[i, j].item() == hash_int(3, i, 2**63 + 5, j)


def test_keys_are_ordered_and_all_of_them_matter():
    values = {hash_int(*keys) for keys in [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2), (2, 2)]}
    assert len(values) == 6


def test_uniform_over_every_key():
    for keys in [
        (0, torch.arange(20_000)),
        (torch.arange(20_000), 0),
        (5, torch.arange(20_000), 9),
    ]:
        sample = uniform(*keys)
        counts = torch.histc(sample, bins=50, min=0, max=1)
        chi_square = ((counts - 400) ** 2 / 400).sum().item()
        assert 20 < chi_square < 95  # 49 degrees of freedom; one in 10,000 lies outside
        assert sample.min() >= 0
        assert sample.max() < 1


def test_neighbouring_rows_draws_and_positions_are_uncorrelated():
    draws = uniform(0, torch.arange(60)[:, None], torch.arange(2000))
    correlation = torch.corrcoef(draws)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 2000**0.5
    assert (
        torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))[0, 1].abs()
        < 5 / (60 * 1999) ** 0.5
    )


def test_uniform_int_covers_its_range_evenly():
    counts = torch.bincount(uniform_int(7, 1, torch.arange(7000)), minlength=7)
    assert counts.numel() == 7
    assert ((counts - 1000).abs() < 5 * 30).all()


def test_golden_sequence_is_exact_and_spread():
    offset = torch.tensor(hash_int(4))
    index = torch.tensor([0, 1, 2, 10**12])
    exact = [((hash_int(4) + int(i) * GOLDEN) % WORD) / WORD for i in index]
    assert torch.allclose(
        golden_sequence(offset, index), torch.tensor(exact, dtype=torch.float64), atol=1e-15
    )
    gaps = golden_sequence(offset, torch.arange(64)).sort().values.diff()
    assert gaps.max() < 2.7 / 64  # three-gap theorem: no gap above 1/64 * (1 + golden ratio)


@pytest.mark.gpu
def test_same_bits_on_the_gpu():
    keys = (7, torch.arange(300)[:, None], 11, torch.arange(1000))
    moved = tuple(k.cuda() if isinstance(k, torch.Tensor) else k for k in keys)
    assert torch.equal(hash_keys(*moved).cpu(), hash_keys(*keys))
    assert torch.equal(uniform(*moved).cpu(), uniform(*keys))
