"""Mask rates and masks: marginals, variance, exact counts, independence of the batch."""

from __future__ import annotations

import pytest
import torch

from stackwise.objectives.hashing import uniform
from stackwise.objectives.masking import (
    bernoulli_mask,
    document_subsets,
    fixed_count_mask,
    row_rates,
)


def rates_of(ids: torch.Tensor, draw: int, **options) -> torch.Tensor:
    return row_rates(ids, 0.0, 1.0, seed=0, draw=draw, **options)


@pytest.mark.parametrize(
    "options",
    [{"stratify": True}, {"stratify": False}, {"sampling": "uniform"}],
    ids=["stratified", "row-pure", "uniform"],
)
def test_rate_of_a_row_is_uniform_over_draws(options):
    ids = torch.tensor([17, 3, 250, 4])
    draws = torch.stack([rates_of(ids, draw, **options) for draw in range(4000)])
    for row in draws.T:
        counts = torch.histc(row, bins=20, min=0, max=1)
        assert ((counts - 200) ** 2 / 200).sum() < 50  # 19 degrees of freedom, p = 1e-4


def test_low_discrepancy_reduces_the_variance_of_a_batch_mean():
    consecutive = torch.arange(100, 116)
    shuffled = torch.randperm(10_000)[:16]

    def spread(ids: torch.Tensor, **options) -> float:
        return torch.stack([rates_of(ids, d, **options).mean() for d in range(500)]).var().item()

    independent = spread(consecutive, sampling="uniform")
    assert independent == pytest.approx(1 / 12 / 16, rel=0.25)
    assert spread(shuffled, stratify=True) < independent / 10
    assert spread(consecutive, stratify=False) < independent / 5


def test_stratified_rates_fall_into_one_stratum_each():
    rates = rates_of(torch.randperm(1000)[:20], 5).sort().values
    assert torch.allclose(rates.diff(), torch.full((19,), 0.05, dtype=torch.float64))


def test_row_pure_rates_do_not_depend_on_the_batch():
    whole = rates_of(torch.arange(50), 3, stratify=False)
    part = rates_of(torch.tensor([44, 7, 19]), 3, stratify=False)
    assert torch.equal(part, whole[[44, 7, 19]])
    assert not torch.equal(part, rates_of(torch.tensor([44, 7, 19]), 4, stratify=False))


def test_rates_stay_in_their_range_and_a_fixed_rate_is_exact():
    ids = torch.arange(1000)
    rates = row_rates(ids, 0.15, 0.9, seed=1, draw=0)
    assert rates.min() >= 0.15
    assert rates.max() <= 0.9
    assert (row_rates(ids, 0.3, 0.3, seed=1, draw=0) == 0.3).all()


def test_masks_do_not_depend_on_the_batch_and_differ_between_rows_and_draws():
    maskable = torch.ones(6, 64, dtype=torch.bool)
    ids = torch.tensor([5, 9, 2, 11, 40, 41])
    rates = torch.full((6,), 0.5, dtype=torch.float64)
    for mask in (bernoulli_mask, fixed_count_mask):
        whole = mask(maskable, ids, rates, seed=0, draw=0)
        order = torch.tensor([4, 0])
        part = mask(maskable[order], ids[order], rates[order], seed=0, draw=0)
        assert torch.equal(part, whole[order])
        assert torch.equal(mask(maskable, ids, rates, seed=0, draw=0), whole)
        for other in (dict(seed=0, draw=1), dict(seed=1, draw=0)):
            again = mask(maskable, ids, rates, **other)
            assert ((again != whole).sum(1) > 10).all()
        for i in range(6):
            for j in range(i):
                assert (whole[i] != whole[j]).sum() > 10


def test_bernoulli_marginal_rate_at_every_position():
    maskable = torch.ones(20_000, 8, dtype=torch.bool)
    rates = torch.full((20_000,), 0.3, dtype=torch.float64)
    mask = bernoulli_mask(maskable, torch.arange(20_000), rates, seed=2, draw=0)
    error = (mask.double().mean(0) - 0.3).abs() / (0.3 * 0.7 / 20_000) ** 0.5
    assert error.max() < 4


def test_fixed_count_is_exact_uniform_and_takes_the_smallest_hashes():
    maskable = torch.rand(3000, 12) < 0.8
    ids = torch.arange(3000)
    rates = row_rates(ids, 0.0, 1.0, seed=0, draw=0)
    mask = fixed_count_mask(maskable, ids, rates, seed=0, draw=0)
    expected = [round(t * n) for t, n in zip(rates.tolist(), maskable.sum(1).tolist(), strict=True)]
    assert mask.sum(1).tolist() == expected
    assert not (mask & ~maskable).any()
    half = fixed_count_mask(
        torch.ones_like(maskable), ids, torch.full((3000,), 0.5).double(), seed=0, draw=0
    )
    assert ((half.double().mean(0) - 0.5).abs() < 4 * 0.5 / 3000**0.5).all()
    pairs = (half[:, 0] & half[:, 1]).double().mean()
    assert pairs.item() == pytest.approx(6 / 12 * 5 / 11, abs=0.035)


def test_document_subsets_have_exact_sizes_and_uniform_members():
    n = 4000
    documents = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2]) + 3 * torch.arange(n)[:, None]
    maskable = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool).expand(n, 10)
    counts = torch.tensor([2, 1, 0]).repeat(n)
    mask = document_subsets(maskable, documents, torch.arange(n), counts, seed=0, draw=0)
    assert (mask[:, :5].sum(1) == 2).all()
    assert (mask[:, 5:8].sum(1) == 1).all()
    assert not mask[:, 8:].any()
    assert not mask[:, 2].any()
    share = mask.double().mean(0)
    assert share[[0, 1, 3, 4]].tolist() == pytest.approx([0.5] * 4, abs=0.035)
    assert share[5:8].tolist() == pytest.approx([1 / 3] * 3, abs=0.035)
    part = document_subsets(
        maskable[:2], documents[:2], torch.tensor([9, 4]), counts[:6], seed=0, draw=0
    )
    assert torch.equal(part, mask[[9, 4]])


def test_rates_and_masks_use_different_streams():
    ids = torch.arange(5000)
    rates = row_rates(ids, 0.0, 1.0, seed=0, draw=0, sampling="uniform")
    maskable = torch.ones(5000, 1, dtype=torch.bool)
    mask = bernoulli_mask(maskable, ids, rates, seed=0, draw=0)
    # E[mask] = E[t] = 1/2 and cov(mask, t) = var(t) = 1/12 only if mask hash and t are independent.
    covariance = ((mask[:, 0].double() - 0.5) * (rates - 0.5)).mean().item()
    assert covariance == pytest.approx(1 / 12, abs=0.015)
    assert not torch.equal(uniform(0, 0, ids), rates)


def test_empty_batch():
    empty = torch.empty(0, dtype=torch.int64)
    assert row_rates(empty, 0.1, 0.9, seed=0, draw=0).shape == (0,)
    maskable = torch.empty(0, 4, dtype=torch.bool)
    none = torch.empty(0, dtype=torch.float64)
    assert bernoulli_mask(maskable, empty, none, seed=0, draw=0).shape == (0, 4)
