"""What an objective is: a corruption of a batch and the rows that carry its loss.

Legend: B rows, L row length, R predicted tokens. The loss of a batch is
sum(weights * cross entropy at ``rows`` against ``targets``) / normalizer, and 0 when R is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stackwise.objectives.masking import bernoulli_mask, fixed_count_mask, row_rates
from stackwise.objectives.schedules import MaskPlan

if TYPE_CHECKING:
    from stackwise.data.batch import Batch

# Below this rate 1/t would let single tokens dominate; the value of MDLM and LLaDA.
MIN_RATE = 1e-3


@dataclass(frozen=True)
class Corrupted:
    """A batch as the model sees it, and what it has to predict.

    ``rows`` (R,) int64: ascending, unique positions in the flattened (B * L) tokens whose hidden
    state predicts; ``targets`` (R,) int64. ``normalizer``: what the summed loss is divided by (at
    least 1). ``t`` (B,) float32: mask rate of every row, None for clm.
    """

    input_ids: Tensor  # (B, L) int64, MASK written in
    rows: Tensor  # (R,) int64
    targets: Tensor  # (R,) int64
    weights: Tensor | None  # (R,) float32, None = all 1
    normalizer: int
    t: Tensor | None  # (B,) float32


def predictable_tokens(batch: Batch, shift: bool) -> Tensor:
    """(B, L) bool: maskable tokens that have a position to be predicted from.

    With ``shift`` token j is predicted from position j - 1 of its document, so the first token of a
    document is context only: it is never masked and carries no loss.
    """
    return batch.maskable & (batch.position_ids > 0) if shift else batch.maskable


def predicting_rows(predicted: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Flattened positions (R,) of the ``predicted`` (B, L) tokens and of their hidden states."""
    positions = predicted.flatten().nonzero()[:, 0]
    return positions, positions - 1 if shift else positions


class Objective(ABC):
    """A training objective; see ``build_objective``."""

    kind: str
    needs_mask_token: bool
    causal_only: bool
    shift: bool

    @abstractmethod
    def corrupt(
        self, batch: Batch, plan: MaskPlan, *, seed: int, draw: int, stratify: bool = True
    ) -> Corrupted:
        """Corrupts a batch and lists its predictions.

        A pure function of (batch rows, plan, seed, draw): which tokens are masked depends on the
        row's id, never on the row's place in the batch. ``draw`` counts visits of a row (the
        epoch; with cached activations the mask number). ``stratify=True`` spreads the mask rates
        over the batch at hand; ``stratify=False`` makes the rate, too, a function of (seed,
        row id, draw), as cached activations require (``row_rates``).
        """


@dataclass(frozen=True)
class MaskSampler:
    """How mask rates and masked tokens are drawn."""

    count: Literal["bernoulli", "fixed"] = "bernoulli"
    t_sampling: Literal["low_discrepancy", "uniform"] = "low_discrepancy"

    def draw(
        self,
        batch: Batch,
        maskable: Tensor,
        plan: MaskPlan,
        *,
        seed: int,
        draw: int,
        stratify: bool,
        min_rate: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """(masked tokens (B, L) bool, rates (B,) float64) for the given ``maskable`` tokens."""
        low, high = max(plan.low, min_rate), max(plan.high, min_rate)
        rates = row_rates(
            batch.row_ids,
            low,
            high,
            seed=seed,
            draw=draw,
            sampling=self.t_sampling,
            stratify=stratify,
        )
        mask = bernoulli_mask if self.count == "bernoulli" else fixed_count_mask
        return mask(maskable, batch.row_ids, rates, seed=seed, draw=draw), rates


def count(mask: Tensor) -> int:
    """Number of True values, at least 1: safe to divide by."""
    return max(int(torch.count_nonzero(mask)), 1)
