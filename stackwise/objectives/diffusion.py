"""Mask diffusion: predict the tokens that MASK replaced, at every mask rate.

The absorbing-state diffusion of MDLM (arXiv 2406.07524) and LLaDA (arXiv 2502.09992). With
t uniform on (0, 1] and weight 1/t the loss is an upper bound on -log p(text) per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stackwise.objectives.base import (
    MIN_RATE,
    Corrupted,
    MaskSampler,
    Objective,
    count,
    predictable_tokens,
    predicting_rows,
)
from stackwise.objectives.masking import fixed_counts
from stackwise.objectives.schedules import MaskPlan

if TYPE_CHECKING:
    from stackwise.data.batch import Batch


class DiffusionObjective(Objective):
    """Mask diffusion with rate t in [max(low, 1e-3), high] of the plan.

    ``weighting``: "plain" (1) or "inverse_t". With ``count="fixed"`` the realised rate masked /
    maskable of the row takes the place of t in 1/t: then the expected loss over uniform counts is
    the exact any-order likelihood bound. The normaliser is every token that could be masked.
    ``shift``: token j is predicted from position j - 1 (models made from causal checkpoints); the
    first token of a document is then never masked (``predictable_tokens``).
    """

    kind = "diffusion"
    needs_mask_token = True
    causal_only = False

    def __init__(
        self,
        mask_id: int,
        *,
        sampler: MaskSampler | None = None,
        weighting: Literal["plain", "inverse_t"] = "plain",
        shift: bool = False,
    ) -> None:
        self.mask_id = mask_id
        self.sampler = sampler or MaskSampler()
        self.weighting = weighting
        self.shift = shift

    def corrupt(
        self, batch: Batch, plan: MaskPlan, *, seed: int, draw: int, stratify: bool = True
    ) -> Corrupted:
        maskable = predictable_tokens(batch, self.shift)
        masked, rates = self.sampler.draw(
            batch, maskable, plan, seed=seed, draw=draw, stratify=stratify, min_rate=MIN_RATE
        )
        positions, rows = predicting_rows(masked, self.shift)
        weights = None
        if self.weighting == "inverse_t":
            per_row = self._inverse_rates(maskable, rates)
            weights = per_row[positions // batch.input_ids.shape[1]]
        return Corrupted(
            input_ids=batch.input_ids.masked_fill(masked, self.mask_id),
            rows=rows,
            targets=batch.input_ids.flatten()[positions],
            weights=weights,
            normalizer=count(maskable),
            t=rates.to(torch.float32),
        )

    def _inverse_rates(self, maskable: Tensor, rates: Tensor) -> Tensor:
        if self.sampler.count == "bernoulli":
            return rates.reciprocal().to(torch.float32)
        masked = fixed_counts(maskable, rates).clamp(min=1)
        return (maskable.sum(1) / masked).to(torch.float32)
