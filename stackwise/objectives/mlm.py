"""Masked language modelling as BERT does it (arXiv 1810.04805): 80% MASK, 10% random, 10% kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.objectives.base import (
    Corrupted,
    MaskSampler,
    Objective,
    count,
    predictable_tokens,
    predicting_rows,
)
from stackwise.objectives.hashing import STREAM_ACTION, STREAM_TOKEN, uniform, uniform_int
from stackwise.objectives.schedules import MaskPlan

if TYPE_CHECKING:
    from stackwise.data.batch import Batch


class MLMObjective(Objective):
    """Selects tokens at the plan's rate; of these, ``mask_share`` become MASK, ``random_share`` a
    uniformly random ordinary token (never a special one), the rest stay. All are predicted.

    The normaliser is the number of selected tokens. Not a likelihood bound.
    """

    kind = "mlm"
    needs_mask_token = True
    causal_only = False

    def __init__(
        self,
        mask_id: int,
        vocab_size: int,
        special_ids: Iterable[int],
        *,
        sampler: MaskSampler | None = None,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        shift: bool = False,
    ) -> None:
        special = set(special_ids) | {mask_id}
        self.mask_id = mask_id
        self.sampler = sampler or MaskSampler()
        self.mask_share = mask_share
        self.random_share = random_share
        self.shift = shift
        self._ordinary = torch.tensor([i for i in range(vocab_size) if i not in special])
        if not self._ordinary.numel():
            raise ValueError(f"vocab_size {vocab_size} holds no token that is not special")

    def corrupt(
        self, batch: Batch, plan: MaskPlan, *, seed: int, draw: int, stratify: bool = True
    ) -> Corrupted:
        maskable = predictable_tokens(batch, self.shift)
        selected, rates = self.sampler.draw(
            batch, maskable, plan, seed=seed, draw=draw, stratify=stratify
        )
        positions, rows = predicting_rows(selected, self.shift)
        return Corrupted(
            input_ids=self._replace(batch, selected, seed, draw),
            rows=rows,
            targets=batch.input_ids.flatten()[positions],
            weights=None,
            normalizer=count(selected),
            t=rates.to(torch.float32),
        )

    def _replace(self, batch: Batch, selected: Tensor, seed: int, draw: int) -> Tensor:
        ids = batch.input_ids
        keys = (seed, draw, batch.row_ids[:, None], torch.arange(ids.shape[1], device=ids.device))
        action = uniform(STREAM_ACTION, *keys)
        choice = uniform_int(self._ordinary.numel(), STREAM_TOKEN, *keys)
        random_ids = self._ordinary.to(ids.device)[choice]
        to_mask = selected & (action < self.mask_share)
        to_random = selected & ~to_mask & (action < self.mask_share + self.random_share)
        return torch.where(to_random, random_ids, ids.masked_fill(to_mask, self.mask_id))
