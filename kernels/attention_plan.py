"""How packed documents are grouped into batches: computed once per cu_seqlens, used by every layer.

A document's place depends on its own lengths only: they are rounded up, and documents with equal
rounded lengths form one batch. So the result of a document does not depend on its neighbours.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks
from .attention import Window, window_limits

_T = TypeVar("_T")


@dataclass
class Group:
    """Documents of one padded shape; their queries are the n · lq padded rows from q_start."""

    n: int
    lq: int
    lk: int
    q_start: int
    k_start: int
    full_keys: bool  # no padded key
    square: bool  # every document has as many queries as keys
    lengths_q: Tensor  # (n, 1, 1, 1)
    lengths_k: Tensor
    q_rows: Tensor  # (n, lq) packed row of each padded query
    _cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def queries(self) -> slice:
        return slice(self.q_start, self.q_start + self.n * self.lq)

    @property
    def keys(self) -> slice:
        return slice(self.k_start, self.k_start + self.n * self.lk)

    def keep(self, causal: bool, window: Window | None) -> Tensor | None:
        """bool (n, 1, 1 or lq, lk) of the keys a row may see; None: all of them."""
        return _once(
            self._cache,
            ("keep", causal, window),
            lambda: self._keep(*window_limits(causal, window)),
        )

    def bias(self, causal: bool, window: Window | None, dtype: torch.dtype) -> Tensor | None:
        """:meth:`keep` as 0 and -inf. A row that may see nothing sees everything instead, so that
        no softmax divides by zero; :meth:`PackedPlan.hidden` lists these rows."""

        def build() -> Tensor | None:
            keep = self.keep(causal, window)
            if keep is None:
                return None
            keep = keep | ~keep.any(-1, keepdim=True)
            bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
            return bias.masked_fill_(~keep, -torch.inf)

        return _once(self._cache, ("bias", causal, window, dtype), build)

    def _keep(self, left: int, right: int) -> Tensor | None:
        if left < 0 and right < 0 and self.full_keys:
            return None
        device = self.lengths_k.device
        column = torch.arange(self.lk, device=device)
        keep = column < self.lengths_k
        if left < 0 and right < 0:
            return keep
        row = torch.arange(self.lq, device=device)[:, None] + (self.lengths_k - self.lengths_q)
        if left >= 0:
            keep = keep & (column >= row - left)
        if right >= 0:
            keep = keep & (column <= row + right)
        return keep


@dataclass
class Rows:
    """Two ways between packed rows and padded rows."""

    index: Tensor  # packed row of each padded row; padding repeats the document's last row
    inverse: Tensor  # padded row of each packed row
    padding: Tensor | None  # padded rows that stand for no packed row
    missing: Tensor | None  # packed rows whose document is in no group

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.index_select(x, 0, self.index, out=out)

    def gather_zeros(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Like :meth:`gather`, with zeros in the padding."""
        out = self.gather(x, out)
        return out if self.padding is None else out.index_fill_(0, self.padding, 0)

    def scatter(self, x: Tensor) -> Tensor:
        """Padded to packed; rows whose document is in no group become 0."""
        if len(x) == 0:
            return x.new_zeros(len(self.inverse), *x.shape[1:])
        out = x.index_select(0, self.inverse)
        return out if self.missing is None else out.index_fill_(0, self.missing, 0)


@dataclass
class Side:
    """The queries or the keys of a plan."""

    total: int
    padded: int
    tokens: Rows  # rows are tokens, in group order; identical to the packed order where that fits
    in_order: bool  # the padded order is the packed order
    _starts: Tensor  # (padded,) first padded token of each padded token's document
    _lengths: Tensor  # (padded,) padded length of that document
    _cache: dict[int, Rows] = field(default_factory=dict)

    def heads(self, heads: int) -> Rows:
        """Rows are (token, head) pairs, padded ones head-major in each document: (n, H, L)."""
        return _once(self._cache, heads, lambda: self._heads(heads))

    def _heads(self, heads: int) -> Rows:
        head = torch.arange(heads, device=self._starts.device)
        offset = torch.arange(self.padded, device=head.device) - self._starts
        place = (self._starts * heads + offset)[:, None] + self._lengths[:, None] * head
        source = self.tokens.index[:, None] * heads + head
        index = torch.empty_like(source).view(-1)
        index[place.view(-1)] = source.view(-1)
        padding, missing = self.tokens.padding, self.tokens.missing
        inverse = self.tokens.inverse.repeat_interleave(heads)  # zeros where there is no group
        if self.padded:
            inverse = place[self.tokens.inverse].view(-1)
        return Rows(
            index,
            inverse,
            None if padding is None else place[padding].view(-1),
            None if missing is None else (missing[:, None] * heads + head).view(-1),
        )


@dataclass
class PackedPlan:
    """Groups of documents and the row maps of queries and keys; see :func:`plan_packed`."""

    groups: list[Group]
    q: Side
    k: Side
    _cache: dict[Any, Tensor | None] = field(default_factory=dict)

    def hidden(self, causal: bool, window: Window | None) -> Tensor | None:
        """Packed query rows that may see no key although their document has some; None: none."""

        def build() -> Tensor | None:
            found = []
            for group in self.groups:
                keep = group.keep(causal, window)
                if keep is not None and keep.shape[2] > 1:
                    hidden = ~keep.any(-1)[:, 0] & _real(group)
                    found.append(group.q_rows[hidden])
            rows = torch.cat(found) if found else None
            return rows if rows is not None and rows.numel() else None

        return _once(self._cache, (causal, window), build)


def plan_packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None) -> PackedPlan:
    """The plan of packed attention for these boundaries, remembered while the tensors live.

    Reads the boundaries on the host: one synchronisation on a GPU, once per pair of tensors.

    Args:
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 or int64, from 0, never falling; the second
            defaults to the first.

    Raises:
        ValueError: the boundaries do not start at 0, fall, or differ in number.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens_q.is_inference() or cu_seqlens_k.is_inference():
        # These count no versions, so a change in place could not be noticed.
        return _build(cu_seqlens_q, cu_seqlens_k)
    key = (id(cu_seqlens_q), id(cu_seqlens_k))
    versions = (cu_seqlens_q._version, cu_seqlens_k._version)
    entry = _plans.get(key)
    if (
        entry is not None
        and entry[0]() is cu_seqlens_q
        and entry[1]() is cu_seqlens_k
        and entry[2] == versions
    ):
        return entry[3]
    plan = _build(cu_seqlens_q, cu_seqlens_k)

    def forget(_: object) -> None:
        _plans.pop(key, None)

    references = (weakref.ref(cu_seqlens_q, forget), weakref.ref(cu_seqlens_k, forget))
    _plans[key] = (*references, versions, plan)
    return plan


_plans: dict[
    tuple[int, int],
    tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, int], PackedPlan],
] = {}


def _once(cache: dict[Any, Any], key: Any, build: Callable[[], _T]) -> _T:
    if key not in cache:
        cache[key] = build()
    return cache[key]


def _real(group: Group) -> Tensor:
    offset = torch.arange(group.lq, device=group.lengths_q.device)
    return offset < group.lengths_q.view(-1, 1)


def _build(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> PackedPlan:
    device = cu_seqlens_q.device
    same = cu_seqlens_k is cu_seqlens_q
    bounds_q, lengths_q = _lengths("cu_seqlens_q", cu_seqlens_q)
    bounds_k, lengths_k = (bounds_q, lengths_q) if same else _lengths("cu_seqlens_k", cu_seqlens_k)
    if bounds_k.shape != bounds_q.shape:
        accepted = f"as many as cu_seqlens_q ({len(bounds_q)})"
        checks.fail("cu_seqlens_k", f"{len(bounds_k)} boundaries", accepted)
    padded_q, padded_k = _round_up(lengths_q), _round_up(lengths_k)
    used = (lengths_q > 0) & (lengths_k > 0)
    full, square = lengths_k == padded_k, lengths_q == lengths_k
    limit = int(padded_k.max()) + 1 if padded_k.numel() else 1
    code = torch.where(used, ((padded_q * limit + padded_k) * 2 + full) * 2 + square, -1)
    order = torch.argsort(code, stable=True)[int((~used).sum()) :]
    side_q = _side(bounds_q, lengths_q, padded_q, order, device)
    side_k = side_q if same else _side(bounds_k, lengths_k, padded_k, order, device)
    _, counts = torch.unique_consecutive(code[order], return_counts=True)
    groups, first, q_start, k_start = [], 0, 0, 0
    for n in counts.tolist():
        members = order[first : first + n]
        head = members[0]
        lq, lk = int(padded_q[head]), int(padded_k[head])
        group = Group(
            n=n,
            lq=lq,
            lk=lk,
            q_start=q_start,
            k_start=k_start,
            full_keys=bool(full[head]),
            square=bool(square[head]),
            lengths_q=lengths_q[members].view(n, 1, 1, 1).to(device),
            lengths_k=lengths_k[members].view(n, 1, 1, 1).to(device),
            q_rows=side_q.tokens.index[q_start : q_start + n * lq].view(n, lq),
        )
        groups.append(group)
        first, q_start, k_start = first + n, q_start + n * lq, k_start + n * lk
    return PackedPlan(groups, side_q, side_k)


def _lengths(name: str, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    lengths = bounds.diff()
    if bounds.dim() != 1 or not bounds.numel() or bounds[0] != 0 or bool((lengths < 0).any()):
        got = bounds.tolist() if bounds.numel() < 20 else f"shape {tuple(bounds.shape)}"
        checks.fail(name, got, "boundaries (n + 1,) that start at 0 and never fall")
    return bounds, lengths


def _round_up(lengths: Tensor) -> Tensor:
    """Padded length, a function of the length alone: padding stays a small part of any document,
    and the number of distinct lengths small for the short ones, of which there are many."""
    step = torch.where(lengths <= 64, 16, torch.where(lengths <= 512, 32, 1))
    return (lengths + step - 1) // step * step


def _side(
    bounds: Tensor, lengths: Tensor, padded: Tensor, order: Tensor, device: torch.device
) -> Side:
    total = int(bounds[-1])
    lengths, padded, starts = lengths[order], padded[order], bounds[:-1][order]
    ends = padded.cumsum(0)
    n_padded = int(ends[-1]) if ends.numel() else 0
    first = (ends - padded).repeat_interleave(padded)
    offset = torch.arange(n_padded) - first
    last = (lengths - 1).repeat_interleave(padded)
    index = starts.repeat_interleave(padded) + torch.minimum(offset, last)
    real = offset <= last
    inverse = torch.full((total,), -1, dtype=torch.int64)
    inverse[index[real]] = torch.arange(n_padded)[real]
    missing = torch.nonzero(inverse < 0)[:, 0]
    padding = torch.nonzero(~real)[:, 0]
    rows = Rows(
        index.to(device),
        inverse.clamp_(min=0).to(device),
        padding.to(device) if padding.numel() else None,
        missing.to(device) if missing.numel() else None,
    )
    in_order = n_padded == total and torch.equal(index, torch.arange(total))
    lengths_of_rows = padded.repeat_interleave(padded).to(device)
    return Side(total, n_padded, rows, in_order, first.to(device), lengths_of_rows)
