"""Sampling from a mask-diffusion model by filling in its most certain positions first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.generation.sampling import TokenSampler

if TYPE_CHECKING:
    from stackwise.model.decoder import Decoder


def step_counts(n_masked: int, steps: int | None, block_length: int | None) -> list[list[int]]:
    """How many tokens every step of every block fills in.

    ``n_masked`` tokens are cut into blocks of ``block_length``; ``steps`` (None: one per token,
    never more) are shared out in proportion, at least one per block, and a block's tokens evenly
    over its steps.
    """
    length = block_length or max(n_masked, 1)
    total = n_masked if steps is None else min(steps, n_masked)
    plan = []
    for start in range(0, n_masked, length):
        size = min(length, n_masked - start)
        n_steps = min(size, max(1, round(total * size / n_masked)))
        base, extra = divmod(size, n_steps)
        plan.append([base + (i < extra) for i in range(n_steps)])
    return plan


def fill_masks(
    model: Decoder,
    input_ids: Tensor,
    to_fill: Tensor,
    sampler: TokenSampler,
    *,
    shift: bool,
    steps: int | None = None,
    block_length: int | None = None,
) -> Tensor:
    """Fills the ``to_fill`` (L,) bool positions of ``input_ids`` (S, L); returns (S, L).

    Confidence remasking (LLaDA, arXiv 2502.09992; MaskGIT, arXiv 2202.04200): every step predicts
    all positions still masked, draws tokens where the prediction is most certain and leaves the
    others masked. Certainty is the largest probability at the position, not that of the token
    drawn: at temperature 0 the two are the same, and above it the order then depends on given
    tokens only, so that one token per step draws from the model's own joint distribution instead
    of favouring likely tokens. ``block_length`` finishes the masked positions in blocks from left
    to right (semi-autoregressive). With ``shift`` token j is read at position j - 1, so the first
    position must be given.
    """
    ids = input_ids.clone()
    samples, length = ids.shape
    open_positions = to_fill.expand(samples, length).clone()
    starts = torch.arange(samples, device=ids.device)[:, None] * length
    where = to_fill.nonzero()[:, 0]
    for counts in step_counts(where.numel(), steps, block_length):
        block, where = where[: sum(counts)], where[sum(counts) :]
        in_block = torch.zeros_like(to_fill).index_fill_(0, block, True)
        for count in counts:
            # (S, r): every sample has the same number of masked positions left in the block.
            candidates = (open_positions & in_block).nonzero()[:, 1].view(samples, -1)
            rows = (starts + candidates - int(shift)).flatten()
            logits = model(ids, rows=rows).logits.view(samples, candidates.shape[1], -1)
            certain = sampler.confidence(logits).argsort(dim=-1, descending=True, stable=True)
            chosen = certain[:, :count].sort(-1).values
            picked = logits.gather(1, chosen[..., None].expand(-1, -1, logits.shape[-1]))
            positions = candidates.gather(1, chosen)
            ids.scatter_(1, positions, sampler.draw(picked))
            open_positions.scatter_(1, positions, False)
    return ids
