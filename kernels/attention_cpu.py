"""Softmax attention as batched matrix products on a CPU, tile by tile.

In bf16 it is faster than PyTorch's own CPU kernel, whose tiles are too small for
oneDNN. Like eager attention it rounds the scores to the input's dtype before the float32 softmax.
Backward computes the probabilities again: only q, k and v are kept between the passes.

Tensors are (n, heads, length, width), contiguous. A tile is some batch items, or some heads of one
item, and some rows; its scores stay in a scratch buffer that fits the caches. Which items share a
tile changes no product of an item, so none of its bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .workspace import scratch

_TILE = 1 << 21  # elements of scores
_CAUSAL_ROWS = 128  # rows per tile where later keys can be left out


@dataclass(frozen=True)
class _Tile:
    items: slice
    heads: slice  # of the keys
    rows: slice
    keys: int  # the first so many
    shape: tuple[int, int, int, int]  # items, key heads, group, rows


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, out: Tensor
) -> None:
    """Writes softmax(q kᵀ + bias) v, (n, Hq, Lq, Dv), to ``out``; q is scaled already.

    ``bias`` broadcasts to (n, Hq, Lq, Lk) and is added to the scores; every row that ``causal``
    leaves a key keeps a finite one. With a bias, ``causal`` only says which keys the bias hides.
    """
    q5, out5, bias5 = _grouped(q, k), _grouped(out, k), _grouped_bias(bias, k)
    for tile in _tiles(q5, k, causal):
        weights = _probabilities(_rows_of(q5, tile), _keys_of(k, tile), bias5, causal, tile)
        _write_rows(out5, tile, weights, _keys_of(v, tile))
    out[:, :, : _hidden_rows(q5, k, causal)] = 0


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes the gradients for the gradient (n, Hq, Lq, Dv) of :func:`forward`'s output; dq is that
    of the scaled q."""
    q5, grad5, bias5 = _grouped(q, k), _grouped(grad, k), _grouped_bias(bias, k)
    tiles = list(_tiles(q5, k, causal))
    once = all(tile.rows == slice(0, q5.shape[3]) and tile.keys == k.shape[2] for tile in tiles)
    once = once and bool(tiles)
    high = torch.promote_types(k.dtype, torch.float32)
    sums = [dk, dv] if once else [torch.zeros_like(x, dtype=high) for x in (dk, dv)]
    dq5 = _grouped(dq, k)
    for tile in tiles:
        rows, up = _rows_of(q5, tile), _rows_of(grad5, tile)
        keys, values = _keys_of(k, tile), _keys_of(v, tile)
        weights = _probabilities(rows, keys, bias5, causal, tile)
        _add_keys(sums[1], tile, weights.mT, up, once)
        slope = scratch().take("slope", tuple(weights.shape), weights, weights.dtype)
        torch.bmm(up, values.mT, out=slope)
        torch.ops.aten._softmax_backward_data.out(
            slope, weights, 2, weights.dtype, grad_input=slope
        )
        _write_rows(dq5, tile, slope, keys)
        _add_keys(sums[0], tile, slope.mT, rows, once)
    dq[:, :, : _hidden_rows(q5, k, causal)] = 0
    if not once:
        dk.copy_(sums[0])
        dv.copy_(sums[1])


def _tiles(q5: Tensor, k: Tensor, causal: bool) -> Iterator[_Tile]:
    n, kv_heads, group, lq, _ = q5.shape
    lk = k.shape[2]
    if 0 in (n, kv_heads, group, lq, lk):
        return
    first = _hidden_rows(q5, k, causal)
    rows = max(1, min(lq, _TILE // (group * lk)))
    if causal and lq > _CAUSAL_ROWS:
        rows = min(rows, _CAUSAL_ROWS)
    per_head = group * rows * lk
    heads = min(kv_heads, max(1, _TILE // per_head))
    items = min(n, max(1, _TILE // (per_head * kv_heads))) if heads == kv_heads else 1
    for start in range(first, lq, rows):
        stop = min(start + rows, lq)
        keys = stop + lk - lq if causal else lk
        for i in range(0, n, items):
            for h in range(0, kv_heads, heads):
                last_i, last_h = min(i + items, n), min(h + heads, kv_heads)
                shape = (last_i - i, last_h - h, group, stop - start)
                yield _Tile(slice(i, last_i), slice(h, last_h), slice(start, stop), keys, shape)


def _hidden_rows(q5: Tensor, k: Tensor, causal: bool) -> int:
    """Leading rows that stand before the first key."""
    lq, lk = q5.shape[3], k.shape[2]
    return lq if lk == 0 else max(0, lq - lk) if causal else 0


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(n, Hq, L, D) to (n, Hkv, Hq / Hkv, L, D)."""
    return x.unflatten(1, (k.shape[1], x.shape[1] // k.shape[1]))


def _grouped_bias(bias: Tensor | None, k: Tensor) -> Tensor | None:
    if bias is None:
        return None
    return bias[:, :, None] if bias.shape[1] == 1 else _grouped(bias, k)


def _rows_of(x5: Tensor, tile: _Tile) -> Tensor:
    """(items · heads, group · rows, D)."""
    return x5[tile.items, tile.heads, :, tile.rows].reshape(
        tile.shape[0] * tile.shape[1], -1, x5.shape[4]
    )


def _keys_of(x: Tensor, tile: _Tile) -> Tensor:
    """(items · heads, keys, D), a view."""
    return x[tile.items, tile.heads].flatten(0, 1)[:, : tile.keys]


def _probabilities(
    rows: Tensor, keys: Tensor, bias5: Tensor | None, causal: bool, tile: _Tile
) -> Tensor:
    shape = (rows.shape[0], rows.shape[1], keys.shape[1])
    scores = scratch().take("scores", shape, rows, rows.dtype)
    torch.bmm(rows, keys.mT, out=scores)
    if bias5 is not None:
        scores.view(*tile.shape, -1).add_(_bias_of(bias5, tile))
    elif causal:
        n = tile.shape[3]
        future = scores.new_full((n, n), -torch.inf).triu_(1)
        scores.view(-1, n, shape[2])[..., shape[2] - n :].add_(future)
    return torch.ops.aten._softmax.out(scores, 2, False, out=scores)


def _bias_of(bias5: Tensor, tile: _Tile) -> Tensor:
    index = [
        part if size > 1 else slice(None)
        for part, size in zip(
            (tile.items, tile.heads, slice(None), tile.rows), bias5.shape, strict=False
        )
    ]
    return bias5[tuple(index)][..., : tile.keys]


def _write_rows(out5: Tensor, tile: _Tile, a: Tensor, b: Tensor) -> None:
    """out[tile's rows] = a b."""
    target = out5[tile.items, tile.heads, :, tile.rows]
    if tile.shape[3] == out5.shape[3]:
        torch.bmm(a, b, out=target.view(a.shape[0], a.shape[1], b.shape[2]))
    else:
        part = scratch().take("part", (*a.shape[:2], b.shape[2]), a, a.dtype)
        target.copy_(torch.bmm(a, b, out=part).view(*tile.shape, b.shape[2]))


def _add_keys(out: Tensor, tile: _Tile, a: Tensor, b: Tensor, once: bool) -> None:
    """out[tile's keys] = a b, or += in out's dtype when several tiles share these keys."""
    target = _keys_of(out, tile)
    if once:
        torch.bmm(a, b, out=target)
    elif a.dtype == out.dtype:
        target.baddbmm_(a, b)
    else:
        shape = (a.shape[0], a.shape[1], b.shape[2])
        part = torch.bmm(a, b, out=scratch().take("part", shape, a, a.dtype))
        # Adding a bf16 tensor to a float32 one would convert it through fresh memory.
        target.add_(scratch().take("wide", shape, a, out.dtype).copy_(part))
