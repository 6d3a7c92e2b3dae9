"""Which tokens of a batch are masked, and at which rate.

Legend: B rows, L row length. Every function is a pure function of (seed, row id, draw, position),
except the stratified rate of a batch (see ``row_rates``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stackwise.objectives.hashing import (
    STREAM_MASK,
    STREAM_TIME,
    golden_sequence,
    hash_keys,
    to_unit,
    uniform,
)

_LAST = torch.iinfo(torch.int64).max


def row_rates(
    row_ids: Tensor,
    low: float,
    high: float,
    *,
    seed: int,
    draw: int,
    sampling: Literal["low_discrepancy", "uniform"] = "low_discrepancy",
    stratify: bool = True,
) -> Tensor:
    """The mask rate t of every row, uniform on [low, high] over seeds and draws: (B,) float64.

    ``low_discrepancy`` with ``stratify`` spreads t evenly over the batch at hand, as MDLM does:
    t = low + (high - low) * frac(u + i / B) for the i-th row, one random u per (seed, draw,
    smallest row id). The variance of a batch's loss is smallest, but t depends on the batch.
    Without ``stratify`` t = low + (high - low) * frac(u + row_id * golden ratio), one u per
    (seed, draw): consecutive row ids are spread evenly and t depends on (seed, row_id, draw) alone,
    which is what cached activations need. ``uniform`` draws every row independently.
    """
    ids = row_ids.to(torch.int64)
    if sampling == "uniform":
        unit = uniform(STREAM_TIME, seed, draw, ids)
    elif stratify and ids.numel():
        offset = to_unit(hash_keys(STREAM_TIME, seed, draw, ids.min()))
        rank = torch.arange(ids.numel(), dtype=torch.float64, device=ids.device)
        unit = (offset + rank / ids.numel()) % 1.0
    else:
        offset = hash_keys(STREAM_TIME, seed, draw, device=ids.device)
        unit = golden_sequence(offset, ids)
    return low + (high - low) * unit


def _position_hash(row_ids: Tensor, length: int, *, seed: int, draw: int) -> Tensor:
    columns = torch.arange(length, device=row_ids.device)
    return hash_keys(STREAM_MASK, seed, draw, row_ids[:, None], columns)  # (B, L)


def bernoulli_mask(
    maskable: Tensor, row_ids: Tensor, rates: Tensor, *, seed: int, draw: int
) -> Tensor:
    """Masks every maskable token independently with its row's rate: (B, L) bool."""
    bits = _position_hash(row_ids, maskable.shape[1], seed=seed, draw=draw)
    return maskable & (to_unit(bits) < rates[:, None])


def fixed_counts(maskable: Tensor, rates: Tensor) -> Tensor:
    """round(t * maskable tokens) of every row, half to even: (B,) int64."""
    return torch.round(rates * maskable.sum(1)).to(torch.int64)


def fixed_count_mask(
    maskable: Tensor, row_ids: Tensor, rates: Tensor, *, seed: int, draw: int
) -> Tensor:
    """Masks exactly ``fixed_counts`` tokens of every row, a uniformly random subset: (B, L) bool.

    They are the maskable positions with the smallest hashes.
    """
    bits = _position_hash(row_ids, maskable.shape[1], seed=seed, draw=draw)
    # Unmaskable positions sort last; the stable sort settles ties by position.
    order = torch.where(maskable, bits, _LAST).argsort(dim=1, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return maskable & (rank < fixed_counts(maskable, rates)[:, None])


def document_subsets(
    maskable: Tensor, documents: Tensor, row_ids: Tensor, counts: Tensor, *, seed: int, draw: int
) -> Tensor:
    """A uniformly random subset of given size of every document's maskable tokens: (B, L) bool.

    ``documents`` (B, L) int64 numbers the documents 0..n-1 in row-major order, ``counts`` (n,)
    int64 is the size of each subset, at most the document's maskable tokens.
    """
    bits = _position_hash(row_ids, maskable.shape[1], seed=seed, draw=draw)
    bits = torch.where(maskable, bits, _LAST).flatten()
    flat = documents.flatten()
    order = bits.argsort(stable=True)
    order = order[flat[order].argsort(stable=True)]  # by document, then by hash
    lengths = torch.bincount(flat, minlength=counts.numel())
    starts = lengths.cumsum(0) - lengths
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - starts[flat[order]]
    return maskable & (rank < counts[flat]).view_as(maskable)
