"""The arithmetic of linear attention in plain PyTorch: a state instead of scores.

With v'_j = [v_j, 1], S = Σ_j φ(k_j) v'_jᵀ and [n_i, d_i] = φ(q_i)ᵀ S, the output is n_i / d_i. For
the gradient dout, g'_i = [dout_i, -dout_i · out_i] / d_i is that of [n_i, d_i], and

    dφ(q_i) = S g'_i,   R = Σ_i φ(q_i) g'_iᵀ,   dφ(k_j) = R v'_j,   dv'_j = Rᵀ φ(k_j)

Causal rows go through it in chunks: S holds the keys of earlier chunks, R the rows of later ones,
and within a chunk the weights are a small masked matrix. Only the inputs are kept for backward.

Exponential maps work with u = log φ. With c the running maximum of u(k) over the keys so far, per
feature, C its value at the chunk's end, and m_i = max over features of u(q_i) + c_i:

    φ(q_i) → exp(u(q_i) + C - m_i),   φ(k_j) → exp(u(k_j) - C),   S → exp(C_before - C) S

The greatest product that row i may see is 1, so d_i >= 1. Where C rises by more than _SPREAD inside
a chunk (a key far outside the others' range), chunks are halved until it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_attention import EXPONENTIAL_MAPS, map_features

_CHUNK = 128  # rows of a causal chunk
_BLOCK = 1 << 24  # features held at once
_SPREAD = 60.0  # exponents of float32 reach 88


@dataclass(frozen=True)
class Map:
    """φ: its name, W (m, D) for "favor", and the square root of the scale."""

    name: str
    features: Tensor | None
    root: float

    @property
    def exponential(self) -> bool:
        return self.name in EXPONENTIAL_MAPS

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """φ(x), or u(x); ``bias`` (N, L) belongs to x (N, L, D)."""
        mapped = map_features(x, self.name, self.features, self.root)
        if bias is None:
            return mapped
        return mapped + bias[..., None] if self.exponential else mapped * bias.exp()[..., None]

    def backward(
        self, x: Tensor, grad: Tensor, dfeatures: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """dx for the gradient of what :meth:`__call__` returned; adds to the features' gradient."""
        if not self.exponential and bias is not None:
            grad = grad * bias.exp()[..., None]
        if self.name == "exp":
            return grad
        if self.name == "relu":
            return grad * (x > 0)
        if self.name == "elu":
            return grad * x.clamp(max=0).exp_()
        assert self.features is not None
        scaled = x * self.root
        if dfeatures is not None:
            dfeatures.addmm_(grad.flatten(0, -2).mT, scaled.flatten(0, -2))
        inner = grad @ self.features.to(x.dtype)
        return inner.sub_(scaled * grad.sum(-1, keepdim=True)).mul_(self.root)


@dataclass
class Heads:
    """One key head per leading index N: q (N, group, Lq, D), k (N, Lk, D), v1 (N, Lk, Dv + 1),
    bias (N, Lk). Causal rows end with the keys, and are no more than these."""

    q: Tensor
    k: Tensor
    v1: Tensor
    bias: Tensor | None


def _blocks(heads: Heads, phi: Map) -> Iterator[tuple[slice, Heads]]:
    """Some key heads at a time."""
    n, group, lq, width = heads.q.shape
    m = width if phi.features is None else phi.features.shape[0]
    step = max(1, _BLOCK // max(1, (group * lq + heads.k.shape[1]) * m))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        bias = None if heads.bias is None else heads.bias[part]
        yield part, Heads(heads.q[part], heads.k[part], heads.v1[part], bias)


def attend(heads: Heads, phi: Map, causal: bool) -> Tensor:
    """(N, group, Lq, Dv)."""
    outs = []
    for _, block in _blocks(heads, phi):
        if causal:
            state = Scan(block, phi)
            sums = torch.cat([s for _, _, _, s in state.forward()], dim=2)
        else:
            phi_q, phi_k = _whole(block, phi)
            sums = (phi_q.flatten(1, 2) @ (phi_k.mT @ block.v1)).view(*phi_q.shape[:3], -1)
        total = sums[..., -1:]
        outs.append(sums[..., :-1] / total.masked_fill(total == 0, 1.0))
    return torch.cat(outs)


def gradients(
    up: Tensor, heads: Heads, phi: Map, causal: bool, dfeatures: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq (N, group, Lq, D), dk (N, Lk, D), dv (N, Lk, Dv), dbias (N, Lk)."""
    parts = []
    for part, block in _blocks(heads, phi):
        grads = _causal_gradients if causal else _whole_gradients
        slope_q, slope_k, dv, dbias = grads(up[part], block, phi)
        dq = phi.backward(block.q, slope_q, dfeatures)
        dk = phi.backward(block.k, slope_k, dfeatures, block.bias)
        parts.append((dq, dk, dv, dbias))
    dq, dk, dv, dbias = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return dq, dk, dv, dbias


def _whole(block: Heads, phi: Map) -> tuple[Tensor, Tensor]:
    """Features of the queries (N, group, Lq, m) and the keys (N, Lk, m), scaled."""
    phi_q, phi_k = phi(block.q), phi(block.k, block.bias)
    if phi.exponential:
        top = phi_k.amax(1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        phi_k = phi_k.sub_(top).exp_()
        phi_q = phi_q + top[:, None]
        phi_q = phi_q.sub_(phi_q.amax(-1, keepdim=True)).exp_()
    return phi_q, phi_k


def _whole_gradients(up: Tensor, block: Heads, phi: Map) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    phi_q, phi_k = _whole(block, phi)
    state = phi_k.mT @ block.v1
    slope = _sum_gradient(up, phi_q @ state[:, None])
    back = phi_q.flatten(1, 2).mT @ slope.flatten(1, 2)
    slope_q, slope_k = slope @ state[:, None].mT, block.v1 @ back.mT
    dv = (phi_k @ back)[..., :-1]
    dbias = (slope_k * phi_k).sum(-1)
    if phi.exponential:
        slope_q, slope_k = slope_q.mul_(phi_q), slope_k.mul_(phi_k)
    return slope_q, slope_k, dv, dbias


def _sum_gradient(up: Tensor, sums: Tensor) -> Tensor:
    """g' (..., Dv + 1) for dout and [n, d]; 0 where d is."""
    total = sums[..., -1:]
    inverse = torch.where(total == 0, 0.0, 1 / total)
    first = up * inverse
    last = -(first * sums[..., :-1]).sum(-1, keepdim=True) * inverse
    return torch.cat([first, last], dim=-1)


class Scan:
    """Chunks of causal rows, with features in the scale of their chunk."""

    def __init__(self, block: Heads, phi: Map) -> None:
        self.block, self.exponential = block, phi.exponential
        self.phi_q, self.phi_k = phi(block.q), phi(block.k, block.bias)
        self.first = block.k.shape[1] - block.q.shape[2]
        if phi.exponential:
            self.tops = self.phi_k.cummax(1).values
            self.row_tops = (self.phi_q + self.tops[:, None, self.first :]).amax(-1, keepdim=True)
            # A row without keys has only zeros.
            self.row_tops.masked_fill_(self.row_tops == -torch.inf, torch.inf)
        self.rows = self._chunk_rows()

    def _chunk_rows(self) -> int:
        rows = _CHUNK
        while self.exponential and rows > 1 and self._spread(rows) > _SPREAD:
            rows //= 2
        return rows

    def _spread(self, rows: int) -> float:
        """How much a running maximum rises inside a chunk, at most."""
        rises = []
        for start in range(self.first, self.tops.shape[1], rows):
            chunk = self.tops[:, start : start + rows]
            low = chunk[:, 0]
            if bool((low == -torch.inf).any()):
                low = chunk.masked_fill(chunk == -torch.inf, torch.inf).amin(1)
            rises.append((chunk[:, -1] - low).amax())
        return float(torch.stack(rises).amax()) if rises else 0.0

    def chunks(self) -> list[tuple[slice, slice]]:
        """(rows, keys); first the keys that come before every row."""
        n_rows, first = self.block.q.shape[2], self.first
        chunks = [(slice(0, 0), slice(0, first))] if first else []
        for start in range(0, n_rows, self.rows):
            stop = min(start + self.rows, n_rows)
            chunks.append((slice(start, stop), slice(start + first, stop + first)))
        return chunks

    def features(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """φ(q) (N, group · rows, m) and φ(k) (N, keys, m)."""
        phi_q, phi_k = self.phi_q[:, :, rows], self.phi_k[:, keys]
        if self.exponential:
            top = self.tops[:, keys.stop - 1 : keys.stop]
            top = top.masked_fill(top == -torch.inf, 0.0)
            phi_q = (phi_q + (top[:, None] - self.row_tops[:, :, rows])).exp_()
            phi_k = (phi_k - top).exp_()
        return phi_q.flatten(1, 2), phi_k

    def rescale(self, state: Tensor, before: slice, keys: slice) -> Tensor:
        """The state in the unit of chunk ``keys``, from or to that of the chunk ``before``."""
        if not self.exponential:
            return state
        low, high = self.tops[:, before.stop - 1], self.tops[:, keys.stop - 1]
        factor = (low - high).exp_().masked_fill_(low == -torch.inf, 0.0)
        return state.mul_(factor[..., None])

    def within(self, a: Tensor, b: Tensor) -> Tensor:
        """a bᵀ of one chunk without what is not causal, (N, group · rows, rows)."""
        rows = b.shape[1]
        return (a @ b.mT).view(a.shape[0], -1, rows, rows).tril_().flatten(1, 2)

    def forward(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Rows, keys, the state before them, and [n, d] (N, group, rows, Dv + 1), by chunk."""
        n, _, m = self.phi_k.shape
        v1 = self.block.v1
        state, before = v1.new_zeros(n, m, v1.shape[2]), None
        for rows, keys in self.chunks():
            phi_q, phi_k = self.features(rows, keys)
            if before is not None:
                state = self.rescale(state, before, keys)
            if rows.stop:
                sums = self.within(phi_q, phi_k) @ v1[:, keys] + phi_q @ state
                yield rows, keys, state, sums.view(n, -1, rows.stop - rows.start, sums.shape[2])
            state = torch.baddbmm(state, phi_k.mT, v1[:, keys])
            before = keys


def _causal_gradients(up: Tensor, block: Heads, phi: Map) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scan, v1 = Scan(block, phi), block.v1
    slope_q, slope_k = torch.zeros_like(scan.phi_q), torch.zeros_like(scan.phi_k)
    slopes = up.new_zeros(*up.shape[:3], v1.shape[2])
    dv1, dbias = torch.zeros_like(v1), v1.new_zeros(v1.shape[:2])
    for rows, keys, state, sums in scan.forward():
        phi_q, phi_k = scan.features(rows, keys)
        slopes[:, :, rows] = _sum_gradient(up[:, :, rows], sums)
        slope = slopes[:, :, rows].flatten(1, 2)
        part = scan.within(slope, v1[:, keys]) @ phi_k + slope @ state.mT
        part = part.mul_(phi_q) if phi.exponential else part
        slope_q[:, :, rows] = part.unflatten(1, (up.shape[1], -1))
    back, after = v1.new_zeros(v1.shape[0], slope_k.shape[2], v1.shape[2]), None
    for rows, keys in reversed(scan.chunks()):
        if after is not None:
            back = scan.rescale(back, keys, after)
        phi_q, phi_k = scan.features(rows, keys)
        part, values = v1[:, keys] @ back.mT, phi_k @ back
        if rows.stop:
            slope = slopes[:, :, rows].flatten(1, 2)
            part = part + scan.within(slope, v1[:, keys]).mT @ phi_q
            values = values + scan.within(phi_q, phi_k).mT @ slope
            back = torch.baddbmm(back, phi_q.mT, slope)
        dv1[:, keys] = values
        dbias[:, keys] = (part * phi_k).sum(-1)
        slope_k[:, keys] = part.mul_(phi_k) if phi.exponential else part
        after = keys
    return slope_q, slope_k, dv1[..., :-1], dbias
