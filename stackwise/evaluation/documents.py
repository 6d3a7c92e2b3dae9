"""Documents of a packed batch and how many of their tokens a Monte Carlo draw masks.

Legend: B rows, L row length, n documents of the batch (padding tails included, with no tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.objectives.hashing import STREAM_COUNT, uniform
from stackwise.objectives.masking import document_subsets

if TYPE_CHECKING:
    from stackwise.data.batch import Batch


@dataclass(frozen=True)
class Documents:
    """The documents of one batch and the tokens of each that are evaluated."""

    batch: Batch
    tokens: Tensor  # (B, L) bool, tokens that are evaluated
    index: Tensor  # (B, L) int64, document of every token
    sizes: Tensor  # (n,) int64, evaluated tokens per document
    seed: int

    @classmethod
    def of(cls, batch: Batch, tokens: Tensor, seed: int) -> Documents:
        boundaries = batch.cu_seqlens.to(torch.int64)
        n = boundaries.numel() - 1
        index = torch.repeat_interleave(
            torch.arange(n, device=boundaries.device),
            boundaries.diff(),
            output_size=batch.input_ids.numel(),
        )
        sizes = torch.bincount(index[tokens.flatten()], minlength=n)
        return cls(batch, tokens, index.view_as(tokens), sizes, seed)

    def sums(self, values: Tensor, positions: Tensor) -> Tensor:
        """Per-document sums (n,) float64 of ``values`` (R,) at flattened ``positions`` (R,)."""
        result = values.new_zeros(self.sizes.numel(), dtype=torch.float64)
        return result.index_add_(0, self.index.flatten()[positions], values.double())

    def subset(self, counts: Tensor, draw: int) -> Tensor:
        """A random ``counts`` (n,) of every document's evaluated tokens: (B, L) bool."""
        return document_subsets(
            self.tokens, self.index, self.batch.row_ids, counts, seed=self.seed, draw=draw
        )

    def stratified_counts(
        self, sample: int, samples: int, low: float = 0.0, high: float = 1.0
    ) -> Tensor:
        """Masked tokens of every document in one of ``samples`` draws, (n,) int64 in 1..size.

        floor(u * size) + 1 with u = low + (high - low) * frac(offset + sample / samples), one
        random offset per document: over [0, 1) every count is equally likely in each draw, and the
        draws of a document are spread evenly.
        """
        unit = (self._unit(0) + sample / samples) % 1.0
        unit = low + (high - low) * unit
        counts = torch.floor(unit * self.sizes).to(torch.int64) + 1
        return torch.minimum(counts, self.sizes)

    def rate_counts(self, rate: float, draw: int) -> Tensor:
        """rate * size of every document, rounded up or down at random so that the mean is exact."""
        unit = self._unit(1 + draw)
        return torch.floor(rate * self.sizes + unit).to(torch.int64)

    def _unit(self, draw: int) -> Tensor:
        starts = self.batch.cu_seqlens[:-1].to(torch.int64)
        length = self.batch.input_ids.shape[1]
        row_ids = self.batch.row_ids[starts // length]
        return uniform(STREAM_COUNT, self.seed, draw, row_ids, starts % length)
