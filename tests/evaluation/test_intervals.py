"""Student quantiles, the ratio estimator and its coverage."""

from __future__ import annotations

import math

import pytest
import torch

from stackwise.evaluation.intervals import DocumentSums, Estimate, ratio_estimate, student_quantile


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_student_quantile_against_the_table(freedom, table):
    assert student_quantile(freedom) == pytest.approx(table, rel=2e-3)


def test_student_quantile_refuses_no_freedom():
    with pytest.raises(ValueError, match="got 0"):
        student_quantile(0)


def test_ratio_and_interval_by_hand():
    totals, sizes = torch.tensor([2.0, 9.0, 4.0]), torch.tensor([1, 3, 2])
    estimate = ratio_estimate(totals, sizes)
    residuals = [2 - 2.5, 9 - 7.5, 4 - 5]
    error = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 6 * 4.3027
    assert estimate.value == pytest.approx(2.5)
    assert estimate.low == pytest.approx(2.5 - error, rel=1e-4)
    assert estimate.high == pytest.approx(2.5 + error, rel=1e-4)


def test_documents_without_tokens_change_nothing():
    some = ratio_estimate(torch.tensor([1.0, 4.0]), torch.tensor([1, 2]))
    more = ratio_estimate(torch.tensor([1.0, 0.0, 4.0, 0.0]), torch.tensor([1, 0, 2, 0]))
    assert some == more


def test_interval_covers_the_truth_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(600):
        sizes = torch.randint(1, 20, (40,), generator=generator)
        # Tokens of a document share an effect: an interval over tokens would be far too narrow.
        effect = torch.randn(40, generator=generator)
        noise = torch.randn(40, generator=generator)
        totals = sizes * (3.0 + effect) + sizes.sqrt() * noise
        estimate = ratio_estimate(totals, sizes)
        covered += estimate.low <= 3.0 <= estimate.high
    assert 0.92 < covered / 600 < 0.98


def test_one_document_has_an_interval_only_from_its_draws():
    one = torch.tensor([6.0]), torch.tensor([3])
    assert ratio_estimate(*one) == Estimate(2.0, None, None)
    estimate = ratio_estimate(*one, torch.tensor([5.0, 7.0]))
    half = math.sqrt(2.0) / math.sqrt(2.0) / 3 * student_quantile(1)
    assert estimate.high - estimate.value == pytest.approx(half)


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        ratio_estimate(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="no token to evaluate"):
        DocumentSums().estimate()


def test_scaling_moves_all_three_figures():
    assert Estimate(2.0, 1.0, 4.0).scaled(0.5, 1.0) == Estimate(2.0, 1.5, 3.0)
    assert Estimate(2.0, None, None).scaled(3.0) == Estimate(6.0, None, None)


def test_sums_average_draws_and_skip_empty_documents():
    sums = DocumentSums()
    sums.add(torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 5.0]]), torch.tensor([1, 0, 2]))
    sums.add(torch.tensor([2.0]), torch.tensor([1]).expand(1))
    assert (sums.documents, sums.tokens) == (3, 4)
