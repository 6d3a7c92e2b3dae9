"""Which tiles the linear attention kernels use, how rows are cut into chunks, and what is covered.

No GPU has run these kernels yet: the tiles are the largest that compile without spills in every
map, on every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linear_attention import EXPONENTIAL_MAPS
from .launch import architecture, power_of_two

LEAST_BLOCK = 16


@dataclass(frozen=True)
class LinearPlan:
    """Chunks of ``rows`` tokens, ``features`` at a time; ``value_warps`` are those of the kernel
    of dv. The scan moves tiles of the state."""

    rows: int
    features: int
    num_warps: int
    num_stages: int
    value_warps: int
    scan_features: int = 16
    scan_columns: int = 64
    scan_warps: int = 4


def plan_linear(
    width: int, v_width: int, features: int, dtype: torch.dtype, arch: int, feature_map: str
) -> LinearPlan:
    """For head dimensions up to ``widest``. An exponential map needs registers for its running
    maxima. Only wgmma takes an operand from shared memory: what
    has none, and products of float32 operands (float16 and float32 inputs), needs smaller tiles."""
    rows, block, num_warps, value_warps = 16, 16, 4, 4
    if arch == 90 and dtype == torch.bfloat16:
        narrow = max(width, v_width) <= 64 or feature_map not in EXPONENTIAL_MAPS
        block = 64 if narrow else 32
        rows, num_warps, value_warps = 64, 8, 8
    elif arch == 90 and dtype == torch.float16:
        rows, block = 32, 32
    elif dtype == torch.bfloat16:
        rows = 32
    elif arch != 90 and dtype == torch.float32:
        value_warps = 8
    block = min(block, max(LEAST_BLOCK, power_of_two(features)))
    return LinearPlan(rows, block, num_warps, 1, value_warps)


def most_registers(feature_map: str, arch: int) -> int | None:
    """The bound told to ptxas: of its own accord it spills two registers of small kernels."""
    return 168 if feature_map != "favor" and arch != 90 else None


def widest(dtype: torch.dtype, arch: int) -> int:
    """The largest head dimension whose tiles fit the registers."""
    return 128 if dtype == torch.bfloat16 and arch == 90 else 64


def block_width(width: int) -> int:
    return max(LEAST_BLOCK, power_of_two(width))


@dataclass(frozen=True)
class Chunks:
    """``table`` (T, 3) int32: document (-1: none), first token, tokens. ``documents`` (n, 2) int32:
    first chunk, chunks. T is an upper bound that needs no look at the boundaries."""

    table: Tensor
    documents: Tensor


def cut(cu_seqlens: Tensor, total: int, rows: int) -> Chunks:
    """Cuts documents with these boundaries (n + 1,) of ``total`` tokens, on the device."""
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    counts = (lengths + rows - 1) // rows
    ends = counts.cumsum(0)
    documents = torch.stack([ends - counts, counts], dim=1)
    size = total // rows + len(lengths)
    index = torch.arange(size, device=bounds.device)
    document = torch.searchsorted(ends, index, right=True)
    used = document < len(lengths)
    document = document.clamp(max=max(len(lengths) - 1, 0))
    start = bounds[document] + (index - documents[document, 0]) * rows
    count = (bounds[document + 1] - start).clamp(max=rows)
    table = torch.stack([document.where(used, -1), start, count], dim=1)
    return Chunks(table.int(), documents.int())


def not_covered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: Tensor | None = None,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the kernels do not take a case of linear attention, or None."""
    for name, x in (("q", q), ("v", v)):
        most = widest(x.dtype, architecture(x.device))
        if x.shape[-1] > most:
            return f"{name} has head dimension {x.shape[-1]}; accepted: up to {most} in {x.dtype}"
    if features is not None and features.requires_grad and torch.is_grad_enabled():
        return "features want a gradient; accepted: fixed features"
    if causal and cu_seqlens_q is None and q.shape[1] != k.shape[1]:
        return f"causal with {q.shape[1]} queries and {k.shape[1]} keys; accepted: equal numbers"
    if causal and cu_seqlens_k is not None and cu_seqlens_k is not cu_seqlens_q:
        return "causal with other documents of keys; accepted: cu_seqlens_q for both"
    return None
