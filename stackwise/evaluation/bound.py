"""Estimators of the loss per token: mask-diffusion bound, exact causal loss, mlm loss, accuracy.

The bound. For a document x of n tokens, the any-order likelihood bound of absorbing diffusion is

    NELBO(x) = E over l uniform on 1..n, S uniform among the subsets of size l,
               of (n / l) * sum over i in S of -log p(x_i | the tokens outside S)  >=  -log p(x),

which equals the integral over t in (0, 1] with weight 1/t, the count l integrated out (LLaDA,
arXiv 2502.09992; for the any-order view arXiv 2110.02037). Documents packed into one row
attend to themselves only, so the bound factorises over documents, and each draws its own count:
one forward pass gives an independent unbiased estimate for every document of the batch, whichever
documents share its row. Counts are stratified over the draws of a document. Drawing l exactly
avoids the count noise of masking each token with probability t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stackwise.evaluation.documents import Documents
from stackwise.evaluation.scoring import Scorer
from stackwise.objectives import MaskPlan, MLMObjective, predicting_rows


def nelbo_totals(
    scorer: Scorer,
    documents: Documents,
    *,
    mask_id: int,
    shift: bool,
    samples: int,
    mask_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Monte Carlo draws of every document's NELBO in nats, (samples, n) float64.

    Over a ``mask_range`` other than (0, 1) the counts are restricted to these rates and the result
    is the mean loss there, not a bound.
    """
    totals = []
    for sample in range(samples):
        counts = documents.stratified_counts(sample, samples, *mask_range)
        masked = documents.subset(counts, sample)
        positions, losses = _masked_losses(scorer, documents, masked, mask_id, shift)
        scale = documents.sizes / counts.clamp(min=1)
        totals.append(documents.sums(losses, positions) * scale)
    return torch.stack(totals)


def _masked_losses(
    scorer: Scorer, documents: Documents, masked: Tensor, mask_id: int, shift: bool
) -> tuple[Tensor, Tensor]:
    batch = documents.batch
    positions, rows = predicting_rows(masked, shift)
    if not positions.numel():
        return positions, positions.double()
    hidden = scorer.hidden(batch, batch.input_ids.masked_fill(masked, mask_id), rows)
    return positions, scorer.token_losses(hidden, batch.input_ids.flatten()[positions])


def causal_totals(scorer: Scorer, documents: Documents) -> Tensor:
    """Exact -log p of every document's evaluated tokens given all before them, (n,) float64 nats.

    The first token of a document has nothing before it and must not be among them.
    """
    batch = documents.batch
    positions, rows = predicting_rows(documents.tokens, shift=True)
    if not positions.numel():
        return documents.sums(positions.double(), positions)
    hidden = scorer.hidden(batch, batch.input_ids, rows)
    losses = scorer.token_losses(hidden, batch.input_ids.flatten()[positions])
    return documents.sums(losses, positions)


def mlm_totals(
    scorer: Scorer,
    documents: Documents,
    objective: MLMObjective,
    plan: MaskPlan,
    *,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Summed loss and number of the tokens mlm selects, both (n,), over ``samples`` draws."""
    batch = documents.batch
    totals = documents.sizes.new_zeros(documents.sizes.shape, dtype=torch.float64)
    selected = torch.zeros_like(totals)
    for draw in range(samples):
        corrupted = objective.corrupt(batch, plan, seed=documents.seed, draw=draw, stratify=False)
        if not corrupted.rows.numel():
            continue
        hidden = scorer.hidden(batch, corrupted.input_ids, corrupted.rows)
        losses = scorer.token_losses(hidden, corrupted.targets)
        # The hidden state and its target lie in one document, so the row stands for both.
        totals += documents.sums(losses, corrupted.rows)
        selected += documents.sums(torch.ones_like(losses), corrupted.rows)
    return totals, selected


def accuracy_totals(
    scorer: Scorer,
    documents: Documents,
    rate: float,
    *,
    mask_id: int,
    special_ids: Sequence[int],
    shift: bool,
    draw: int,
) -> tuple[Tensor, Tensor]:
    """Correct and masked tokens per document, both (n,) float64, at one mask rate.

    The prediction is the most likely token that is not special. ``draw`` tells the masks of
    different rates apart.
    """
    batch = documents.batch
    masked = documents.subset(documents.rate_counts(rate, draw), draw)
    positions, rows = predicting_rows(masked, shift)
    if not positions.numel():
        nothing = documents.sums(positions.double(), positions)
        return nothing, nothing
    hidden = scorer.hidden(batch, batch.input_ids.masked_fill(masked, mask_id), rows)
    banned = torch.tensor(sorted({*special_ids, mask_id}), device=positions.device)
    correct = scorer.predictions(hidden, banned) == batch.input_ids.flatten()[positions]
    return (
        documents.sums(correct, positions),
        documents.sums(torch.ones_like(correct), positions),
    )
