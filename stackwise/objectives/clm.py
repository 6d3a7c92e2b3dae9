"""Next-token prediction within documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.objectives.base import Corrupted, Objective, count, predicting_rows
from stackwise.objectives.schedules import MaskPlan

if TYPE_CHECKING:
    from stackwise.data.batch import Batch


def next_token_targets(batch: Batch, eos_id: int | None) -> Tensor:
    """(B, L) bool: tokens that are predicted from the position before them.

    Ordinary (maskable) tokens that are not the first of their document, and the EOS that closes a
    document, so that a model learns to stop. An EOS used as padding follows no ordinary token and
    is not predicted.
    """
    inside = batch.position_ids > 0
    if eos_id is None:
        return batch.maskable & inside
    after_text = torch.nn.functional.pad(batch.maskable[:, :-1], (1, 0))
    closing = (batch.input_ids == eos_id) & after_text
    return (batch.maskable | closing) & inside


class CLMObjective(Objective):
    """Position i predicts token i + 1 of the same document; the input is not changed.

    The first token of a document has no position before it and carries no loss. The normaliser is
    the number of predicted tokens.
    """

    kind = "clm"
    needs_mask_token = False
    causal_only = True
    shift = True

    def __init__(self, eos_id: int | None = None) -> None:
        self.eos_id = eos_id

    def corrupt(
        self, batch: Batch, plan: MaskPlan, *, seed: int, draw: int, stratify: bool = True
    ) -> Corrupted:
        predicted = next_token_targets(batch, self.eos_id)
        positions, rows = predicting_rows(predicted, shift=True)
        return Corrupted(
            input_ids=batch.input_ids,
            rows=rows,
            targets=batch.input_ids.flatten()[positions],
            weights=None,
            normalizer=count(predicted),
            t=None,
        )
