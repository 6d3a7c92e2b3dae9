"""The tiles of packed documents in the order of their launch, made on the device.

The number of tiles depends on the lengths, which only the device knows; the grid is the most that
the total allows, and its last entries are empty. Nothing waits for the device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Documents:
    """Boundaries of packed queries and keys, and the schedules made from them so far.

    ``starts_q``, ``lengths_q`` and those of the keys are int64 (n + 2,): tokens before the first
    and after the last boundary are the first and the last entry, which see nothing.
    """

    starts_q: Tensor
    lengths_q: Tensor
    starts_k: Tensor
    lengths_k: Tensor
    total_q: int
    total_k: int
    _made: dict[Any, Tensor] = field(default_factory=dict)

    def queries(self, group: int, block: int, left: int, right: int) -> Tensor:
        """Tiles of ``block`` rows of queries, ``group`` rows each; see :func:`schedule`."""
        return self._once(True, group, block, left, right)

    def keys(self, block: int, left: int, right: int) -> Tensor:
        """Tiles of ``block`` keys; see :func:`schedule`."""
        return self._once(False, 1, block, left, right)

    def _once(self, queries: bool, *options: int) -> Tensor:
        key = (queries, *options)
        if key not in self._made:
            self._made[key] = schedule(self, queries, *options)
        return self._made[key]


def schedule(
    documents: Documents, queries: bool, group: int, block: int, left: int, right: int
) -> Tensor:
    """(tiles, 5) int32: first query, number of queries, first key, number of keys, tile.

    Ordered by the number of keys (queries) that the tile's queries (keys) may see, most first:
    what takes longest starts first.
    """
    d = documents
    lengths, other = (d.lengths_q, d.lengths_k) if queries else (d.lengths_k, d.lengths_q)
    other = other.clone()
    other[0] = other[-1] = 0  # tokens of no document
    total = d.total_q if queries else d.total_k
    tiles = (lengths * group + block - 1) // block
    ends = tiles.cumsum(0)
    slot = torch.arange(total * group // block + len(lengths), device=lengths.device)
    document = torch.searchsorted(ends, slot, right=True).clamp_(max=len(lengths) - 1)
    used = slot < ends[-1]
    tile = slot - (ends - tiles)[document]
    first = tile * block // group
    last = torch.minimum((tile * block + block - 1) // group, lengths[document] - 1)
    offset = (other - lengths)[document]
    # Keys see the queries of a window that is turned round.
    before, after = (left, right) if queries else (right, left)
    low, high = torch.zeros_like(first), other[document]
    if before >= 0:
        low = torch.clamp(first + offset - before, min=0)
    if after >= 0:
        high = torch.minimum(high, last + offset + after + 1)
    work = torch.where(used, (high - low).clamp(min=0), -1)
    sides = (lengths, other) if queries else (other, lengths)
    columns = (d.starts_q, sides[0], d.starts_k, sides[1])
    entries = torch.stack([*(c[document] for c in columns), tile], dim=1)
    entries = torch.where(used[:, None], entries, 0)
    return entries[torch.argsort(work, descending=True, stable=True)].to(torch.int32)


def documents(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, total_q: int, total_k: int
) -> Documents:
    """The documents of these boundaries, remembered while the tensors live and do not change."""
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    stream = _stream(cu_seqlens_q)
    if cu_seqlens_q.is_inference() or cu_seqlens_k.is_inference() or stream is None:
        return _build(cu_seqlens_q, cu_seqlens_k, total_q, total_k)
    key = (id(cu_seqlens_q), id(cu_seqlens_k), stream)
    state = (cu_seqlens_q._version, cu_seqlens_k._version, total_q, total_k)
    entry = _known.get(key)
    if (
        entry is not None
        and entry[0]() is cu_seqlens_q
        and entry[1]() is cu_seqlens_k
        and entry[2] == state
    ):
        return entry[3]
    found = _build(cu_seqlens_q, cu_seqlens_k, total_q, total_k)

    def forget(_: object) -> None:
        _known.pop(key, None)

    references = (weakref.ref(cu_seqlens_q, forget), weakref.ref(cu_seqlens_k, forget))
    _known[key] = (*references, state, found)
    return found


_known: dict[
    tuple[int, int, int],
    tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, ...], Documents],
] = {}


def _stream(x: Tensor) -> int | None:
    """The stream that orders the work on ``x``; None while it is captured into a graph, whose
    tensors hold nothing before the first replay."""
    if x.device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(x.device).cuda_stream


def _build(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int) -> Documents:
    starts_q, lengths_q = _bounds(cu_seqlens_q, total_q)
    starts_k, lengths_k = _bounds(cu_seqlens_k, total_k)
    return Documents(starts_q, lengths_q, starts_k, lengths_k, total_q, total_k)


def _bounds(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Starts and lengths; boundaries that fall or pass the total reach no other memory."""
    inner = cu_seqlens.detach().to(torch.int64).clamp(0, total).cummax(0).values
    ends = torch.nn.functional.pad(inner, (1, 0))
    ends = torch.nn.functional.pad(ends, (0, 1), value=total)
    return ends[:-1], ends.diff()
