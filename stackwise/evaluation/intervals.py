"""Confidence intervals over documents.

Tokens of one document are not independent, documents are nearly so: the variability of a mean per
token is therefore read from per-document sums, as in cluster sampling (Cochran, "Sampling
Techniques", 1977, ratio estimator). Pieces of a document that was cut at a row end count as
documents of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_Z = 1.959963984540054  # 97.5% point of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95% interval; ``low`` and ``high`` are None where the data hold
    a single independent observation and so no information about their spread."""

    value: float
    low: float | None
    high: float | None

    def scaled(self, factor: float, offset: float = 0.0) -> Estimate:
        """factor * estimate + offset, for factor >= 0."""
        low = None if self.low is None else factor * self.low + offset
        high = None if self.high is None else factor * self.high + offset
        return Estimate(factor * self.value + offset, low, high)


def student_quantile(freedom: int) -> float:
    """97.5% point of Student's t distribution with ``freedom`` >= 1 degrees of freedom.

    Exact for 1 and 2; else the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), within
    0.2% from 3 on.
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2.0 / (1.0 - 0.95**2))
    z, v = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (k + 1) for k, term in enumerate(terms))


def ratio_estimate(totals: Tensor, sizes: Tensor, draws: Tensor | None = None) -> Estimate:
    """sum(totals) / sum(sizes) with its interval over documents.

    ``totals`` (n,) and ``sizes`` (n,): sum and number of tokens of each document; documents without
    tokens are ignored. The variance is n / (n - 1) * sum((total - ratio * size)^2) / sum(sizes)^2,
    the quantile Student's with n - 1 degrees of freedom. It covers both which documents were held
    out and, where totals are Monte Carlo means, their error. A single document has no spread
    between documents: then ``draws`` (K,), its K Monte Carlo totals, give the interval.
    Raises ValueError when there is no token at all.
    """
    keep = sizes > 0
    totals, sizes = totals[keep].double(), sizes[keep].double()
    n, size = totals.numel(), float(sizes.sum())
    if n == 0:
        raise ValueError("sizes must hold at least one token, got none")
    ratio = float(totals.sum()) / size
    if n > 1:
        squares = float((totals - ratio * sizes).square().sum())
        error = math.sqrt(n / (n - 1) * squares) / size * student_quantile(n - 1)
    elif draws is not None and draws.numel() > 1:
        spread = float(draws.double().std()) / math.sqrt(draws.numel()) / size
        error = spread * student_quantile(draws.numel() - 1)
    else:
        return Estimate(ratio, None, None)
    return Estimate(ratio, ratio - error, ratio + error)


class DocumentSums:
    """Per-document sums gathered batch by batch, on the CPU in float64."""

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._sizes: list[Tensor] = []

    def add(self, totals: Tensor, sizes: Tensor) -> None:
        """``totals`` (..., n) and ``sizes`` (n,) of the documents of one batch; leading dimensions
        of ``totals`` are Monte Carlo draws, which are averaged."""
        draws = totals.double().reshape(-1, totals.shape[-1]).cpu()
        keep = sizes.cpu() > 0
        self._totals.append(draws[:, keep])
        self._sizes.append(sizes.cpu()[keep].double())

    @property
    def documents(self) -> int:
        return sum(sizes.numel() for sizes in self._sizes)

    @property
    def tokens(self) -> int:
        return int(sum(float(sizes.sum()) for sizes in self._sizes))

    def estimate(self) -> Estimate:
        """The mean per token; see ``ratio_estimate``."""
        if not self.tokens:
            raise ValueError("no token to evaluate: all are padding or special, or none was drawn")
        draws = torch.cat(self._totals, dim=1)
        only = draws[:, 0] if draws.shape[1] == 1 else None
        return ratio_estimate(draws.mean(0), torch.cat(self._sizes), only)
