"""Exact kernel attention in plain PyTorch, tile by tile: memory of the scores stays constant.

A tile is some items, some key heads and some query rows with all the keys that these rows may see,
so that a row's sum is known within its tile. Backward computes the weights again: only q, k and v
are kept between the passes. With g_ij the gradient of e_ij, P the (normalised) weights:

    dv_j = Σ_i P_ij dout_i,   dP_ij = dout_i · v_j
    g_ij = P_ij (dP_ij - Σ_j P_ij dP_ij), or P_ij dP_ij without normalisation
    gaussian   c_ij = g_ij / σ²               dσ = -2/σ Σ g_ij e_ij
    laplacian  c_ij = g_ij / (σ |q_i - k_j|)  dσ = -1/σ Σ g_ij e_ij
    dq_i = Σ_j c_ij (k_j - q_i),   dk_j = Σ_i c_ij (q_i - k_j)

Everything is float32 (float64 for float64), whatever the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .attention import Window, window_limits
from .attention_cpu_ops import check_totals
from .attention_plan import Group, PackedPlan, Rows, plan_packed
from .autocast import to_autocast_dtype
from .kernel_attention import head_bandwidths, zero_distance
from .library import define

_TILE = 1 << 20  # elements of scores
_CAUSAL_ROWS = 128  # rows per tile where keys can be left out


@dataclass(frozen=True)
class Rule:
    """Which kernel, and how far a row sees to either side of its position (-1: everything)."""

    laplacian: bool
    normalize: bool
    left: int
    right: int


@dataclass
class Batch:
    """Heads-first tensors of one shape; lengths (n, 1, 1, 1) where some of the rows are padding.

    ``q`` (n, Hq, lq, D), ``k`` (n, Hkv, lk, D), ``v`` (n, Hkv, lk, Dv); ``bias`` (n, Hkv or 1, lk);
    ``mask`` (n, 1 or Hq, lq, lk); ``shift`` is the position of row 0 among the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    shift: int | Tensor
    keys: Tensor | None

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class Tile:
    items: slice
    heads: slice  # of the keys
    rows: slice
    keys: slice
    shape: tuple[int, int, int, int]  # items, key heads, group, rows


def kernel_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    normalize: bool = True,
    causal: bool = False,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    window: Window | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    q, k, v = to_autocast_dtype(q.device.type, q, k, v)
    widths = head_bandwidths(bandwidth, q.shape[-2], q)
    cu_seqlens_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    documents = (cu_seqlens_q, cu_seqlens_k)
    rule = (kernel == "laplacian", normalize, *window_limits(causal, window))
    return _Kernel.apply(q, k, v, widths, key_bias, mask, *documents, *rule)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, rule = arguments[:8], arguments[8:]
        ctx.save_for_backward(*tensors)
        ctx.rule = rule
        with torch.autocast(tensors[0].device.type, enabled=False):
            return _forward_op(*tensors, *rule)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wants = (ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        with torch.autocast(grad.device.type, enabled=False):
            dq, dk, dv, dwidths, dbias = _backward_op(grad, *ctx.saved_tensors, *ctx.rule, *wants)
        optional = (dwidths if wants[0] else None, dbias if wants[1] else None)
        return (dq, dk, dv, *optional, *(None,) * 7)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    widths: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    laplacian: bool,
    normalize: bool,
    left: int,
    right: int,
) -> Tensor:
    rule, high = Rule(laplacian, normalize, left, right), widths.dtype
    if cu_seqlens_q is None:
        out = _attend(_dense_batch(q, k, v, bias, mask, high), widths, rule)
        return out.transpose(1, 2).to(q.dtype).contiguous()
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k)
    padded = torch.zeros(plan.q.padded, q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    for group, batch in _document_batches(q, k, v, bias, plan, high):
        padded[group.queries] = _tokens_first(_attend(batch, widths, rule)).to(q.dtype)
    return plan.q.tokens.scatter(padded)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    widths: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    laplacian: bool,
    normalize: bool,
    left: int,
    right: int,
    widths_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rule, high = Rule(laplacian, normalize, left, right), widths.dtype
    dwidths = torch.zeros_like(widths) if widths_grad else None
    dbias = torch.zeros_like(bias, dtype=high) if bias is not None and bias_grad else None
    if cu_seqlens_q is None:
        batch = _dense_batch(q, k, v, bias, mask, high)
        grads = [torch.zeros_like(x) for x in (batch.q, batch.k, batch.v)]
        up = grad.transpose(1, 2).to(high).contiguous()
        _gradients(up, batch, widths, rule, grads, dwidths, dbias)
        dq, dk, dv = (
            d.transpose(1, 2).to(x.dtype).contiguous()
            for d, x in zip(grads, (q, k, v), strict=True)
        )
        return dq, dk, dv, *_optional(widths, dwidths, bias, dbias)
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k)
    sides = (plan.q, plan.k, plan.k)
    sums = [
        torch.zeros(side.padded, *x.shape[1:], dtype=high, device=x.device)
        for side, x in zip(sides, (q, k, v), strict=True)
    ]
    up = plan.q.tokens.gather_zeros(grad)
    padded_bias = None
    if dbias is not None:
        padded_bias = torch.zeros(plan.k.padded, dbias.shape[0], dtype=high, device=q.device)
    for group, batch in _document_batches(q, k, v, bias, plan, high):
        grads = [torch.zeros_like(x) for x in (batch.q, batch.k, batch.v)]
        group_bias = None if batch.bias is None else torch.zeros_like(batch.bias)
        group_up = _heads_first(up, group.queries, group.n).to(high)
        _gradients(group_up, batch, widths, rule, grads, dwidths, group_bias if bias_grad else None)
        places = (group.queries, group.keys, group.keys)
        for total, place, part in zip(sums, places, grads, strict=True):
            total[place] = _tokens_first(part)
        if padded_bias is not None and group_bias is not None:
            padded_bias[group.keys] = group_bias.transpose(1, 2).flatten(0, 1)
    dq, dk, dv = (
        side.tokens.scatter(total).to(x.dtype)
        for side, total, x in zip(sides, sums, (q, k, v), strict=True)
    )
    if padded_bias is not None:
        dbias = plan.k.tokens.scatter(padded_bias).mT.contiguous()
    return dq, dk, dv, *_optional(widths, dwidths, bias, dbias)


def _optional(
    widths: Tensor, dwidths: Tensor | None, bias: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return (
        widths.new_empty(0) if dwidths is None else dwidths,
        widths.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _dense_batch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, high: torch.dtype
) -> Batch:
    q, k, v = (x.transpose(1, 2).to(high).contiguous() for x in (q, k, v))
    bias = None if bias is None else bias.to(high)
    return Batch(q, k, v, bias, mask, k.shape[2] - q.shape[2], None)


def _plan(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> PackedPlan:
    plan = plan_packed(cu_seqlens_q, cu_seqlens_k)
    check_totals(plan, q, k)
    return plan


def _document_batches(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: PackedPlan, high: torch.dtype
) -> Iterator[tuple[Group, Batch]]:
    rows_q, rows_k = plan.q.tokens, plan.k.tokens
    padded = [rows.gather(x) for rows, x in ((rows_q, q), (rows_k, k), (rows_k, v))]
    padded_bias = None if bias is None else _gather_bias(bias, rows_k, high)
    for group in plan.groups:
        places = (group.queries, group.keys, group.keys)
        bq, bk, bv = (
            _heads_first(x, place, group.n).to(high)
            for x, place in zip(padded, places, strict=True)
        )
        group_bias = None
        if padded_bias is not None:
            group_bias = padded_bias[group.keys].unflatten(0, (group.n, group.lk)).mT
        shift: int | Tensor = group.lengths_k - group.lengths_q
        yield (
            group,
            Batch(
                bq.contiguous(), bk.contiguous(), bv.contiguous(), group_bias, None,
                0 if group.square else shift, None if group.full_keys else group.lengths_k,
            ),
        )  # fmt: skip


def _gather_bias(bias: Tensor, rows: Rows, high: torch.dtype) -> Tensor:
    return rows.gather(bias.mT.to(high).contiguous())


def _heads_first(x: Tensor, place: slice, n: int) -> Tensor:
    """The rows ``place`` of padded tokens as (n, H, l, D), a view."""
    part = x[place]
    return part.view(n, len(part) // n, *x.shape[1:]).transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    """(n, H, l, D) to (n · l, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _attend(batch: Batch, widths: Tensor, rule: Rule) -> Tensor:
    """(n, Hq, lq, Dv)."""
    q, v = batch.q, batch.v
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    out5 = _grouped(out, batch)
    sizes = _sizes(batch)
    for tile in _tiles(batch, rule):
        weights, _ = _weights(batch, sizes, widths, rule, tile)
        part = torch.bmm(weights, _keys_of(v, tile))
        out5[tile.items, tile.heads, :, tile.rows] = part.view(*tile.shape, -1)
    return out


def _gradients(
    up: Tensor,
    batch: Batch,
    widths: Tensor,
    rule: Rule,
    grads: list[Tensor],
    dwidths: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Adds to the gradients of q, k, v, of the widths (Hq,) and of the bias."""
    dq5, dk, dv = _grouped(grads[0], batch), grads[1], grads[2]
    q5, up5, sizes = _grouped(batch.q, batch), _grouped(up, batch), _sizes(batch)
    for tile in _tiles(batch, rule):
        weights, exponent = _weights(batch, sizes, widths, rule, tile)
        rows, tile_up = _rows_of(q5, tile), _rows_of(up5, tile)
        keys, values = _keys_of(batch.k, tile), _keys_of(batch.v, tile)
        _keys_of(dv, tile).baddbmm_(weights.mT, tile_up)
        slope = torch.bmm(tile_up, values.mT)
        if rule.normalize:
            slope -= torch.linalg.vecdot(weights, slope)[..., None]
        slope *= weights
        if dbias is not None:
            _add_bias(dbias, slope, tile)
        if dwidths is not None:
            _add_widths(dwidths, slope, exponent, widths, rule, tile, batch.group)
        slope = _coefficients(slope, exponent, widths, rule, tile)
        part = torch.bmm(slope, keys)
        if rule.laplacian or not rule.normalize:
            # The normalised gaussian's rows sum to 0.
            part -= rows * slope.sum(-1, keepdim=True)
        dq5[tile.items, tile.heads, :, tile.rows] += part.view(*tile.shape, -1)
        target = _keys_of(dk, tile)
        target.baddbmm_(slope.mT, rows)
        target -= keys * slope.sum(1)[..., None]


def _weights(
    batch: Batch, sizes: tuple[Tensor, Tensor], widths: Tensor, rule: Rule, tile: Tile
) -> tuple[Tensor, Tensor]:
    """P and e of a tile, (items · heads, group · rows, keys); e without the key bias."""
    rows, keys = _rows_of(_grouped(batch.q, batch), tile), _keys_of(batch.k, tile)
    size_q = _rows_of(_grouped(sizes[0], batch), tile)
    size_k = _keys_of(sizes[1], tile).mT
    squared = torch.bmm(rows, keys.mT).mul_(-2).add_(size_q).add_(size_k).clamp_(min=0)
    factor = _per_row(widths, tile, batch.group)
    if rule.laplacian:
        squared.masked_fill_(squared <= zero_distance(size_q + size_k), 0)
        exponent = squared.sqrt_().mul_(-1 / factor)
    else:
        exponent = squared.mul_(-0.5 / factor**2)
    hidden, seen = _hidden(batch, rule, tile), exponent
    if batch.bias is not None or hidden is not None:
        view = exponent.view(*tile.shape, -1)
        if batch.bias is not None:
            view = view + _bias_of(batch.bias, tile)
        if hidden is not None:
            view = view.masked_fill(hidden, -torch.inf)
        seen = view.view(exponent.shape)
    if not rule.normalize:
        return torch.exp(seen), exponent
    top = seen.amax(-1, keepdim=True)
    weights = torch.exp(seen - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total.masked_fill(total == 0, 1.0)), exponent


def _coefficients(
    slope: Tensor, exponent: Tensor, widths: Tensor, rule: Rule, tile: Tile
) -> Tensor:
    """c_ij of the top of this file."""
    factor = _per_row(widths, tile, tile.shape[2])
    if not rule.laplacian:
        return slope.mul_(factor**-2)
    distance = exponent * -factor
    near = distance == 0
    return slope.div_(distance.masked_fill_(near, 1.0).mul_(factor)).masked_fill_(near, 0.0)


def _add_widths(
    dwidths: Tensor,
    slope: Tensor,
    exponent: Tensor,
    widths: Tensor,
    rule: Rule,
    tile: Tile,
    group: int,
) -> None:
    # A hidden pair has slope 0, and e without its bias is finite.
    products = torch.linalg.vecdot(slope, exponent).view(tile.shape).sum(dim=(0, 3)).flatten()
    heads = slice(tile.heads.start * group, tile.heads.stop * group)
    dwidths[heads] += products * (-(1.0 if rule.laplacian else 2.0) / widths[heads])


def _add_bias(dbias: Tensor, slope: Tensor, tile: Tile) -> None:
    """dbias (n, Hkv or 1, lk)."""
    columns = slope.sum(1).view(*tile.shape[:2], -1)
    if dbias.shape[1] == 1:
        dbias[tile.items, :, tile.keys] += columns.sum(1, keepdim=True)
    else:
        dbias[tile.items, tile.heads, tile.keys] += columns


def _tiles(batch: Batch, rule: Rule) -> Iterator[Tile]:
    q, k, group = batch.q, batch.k, batch.group
    (n, kv_heads, lk), lq = k.shape[:3], q.shape[2]
    if 0 in (n, kv_heads, group, lq, lk):
        return
    # Rows at known positions can leave out the keys that none of them sees.
    cut = isinstance(batch.shift, int) and (rule.left >= 0 or rule.right >= 0)
    rows = max(1, min(lq, _TILE // (group * lk)))
    rows = min(rows, _CAUSAL_ROWS) if cut else rows
    per_head = group * rows * lk
    heads = min(kv_heads, max(1, _TILE // per_head))
    items = min(n, max(1, _TILE // (per_head * kv_heads))) if heads == kv_heads else 1
    for start in range(0, lq, rows):
        stop = min(start + rows, lq)
        keys = slice(0, lk)
        if cut and isinstance(batch.shift, int):
            first = start + batch.shift - rule.left if rule.left >= 0 else 0
            last = stop + batch.shift + rule.right if rule.right >= 0 else lk
            keys = slice(max(first, 0), min(last, lk))
            if keys.start >= keys.stop:
                continue
        for i in range(0, n, items):
            for h in range(0, kv_heads, heads):
                last_i, last_h = min(i + items, n), min(h + heads, kv_heads)
                shape = (last_i - i, last_h - h, group, stop - start)
                yield Tile(slice(i, last_i), slice(h, last_h), slice(start, stop), keys, shape)


def _hidden(batch: Batch, rule: Rule, tile: Tile) -> Tensor | None:
    """What a tile must not see, broadcasting to (items, heads, group, rows, keys), or None."""
    device, hidden = batch.q.device, None
    column = torch.arange(tile.keys.start, tile.keys.stop, device=device)
    if batch.keys is not None:
        hidden = column >= batch.keys[tile.items]
    shift = batch.shift if isinstance(batch.shift, int) else batch.shift[tile.items]
    if rule.left >= 0 or rule.right >= 0:
        offset = column - torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None]
        offset = offset - shift
        for limit, outside in ((rule.right, offset > rule.right), (rule.left, -offset > rule.left)):
            if limit >= 0:
                hidden = outside if hidden is None else hidden | outside
    if hidden is not None and hidden.dim() == 4:
        hidden = hidden[:, :, None]
    if batch.mask is not None:
        part = ~batch.mask[tile.items, :, tile.rows, tile.keys]
        if part.shape[1] > 1:
            group = batch.group
            part = part[:, tile.heads.start * group : tile.heads.stop * group]
            part = part.unflatten(1, tile.shape[1:3])
        else:
            part = part[:, :, None]
        hidden = part if hidden is None else hidden | part
    return hidden


def _bias_of(bias: Tensor, tile: Tile) -> Tensor:
    heads = tile.heads if bias.shape[1] > 1 else slice(None)
    return bias[tile.items, heads, tile.keys][:, :, None, None]


def _sizes(batch: Batch) -> tuple[Tensor, Tensor]:
    """Squared norms of the queries and the keys, (n, H, l, 1)."""
    return tuple(x.square().sum(-1, keepdim=True) for x in (batch.q, batch.k))  # type: ignore[return-value]


def _per_row(widths: Tensor, tile: Tile, group: int) -> Tensor:
    """The widths of a tile's rows, (items · heads, group · rows, 1)."""
    part = widths[tile.heads.start * group : tile.heads.stop * group]
    part = part.view(1, -1, group, 1).expand(tile.shape)
    return part.reshape(tile.shape[0] * tile.shape[1], -1, 1)


def _grouped(x: Tensor, batch: Batch) -> Tensor:
    """(n, Hq, l, D) to (n, Hkv, group, l, D)."""
    return x.unflatten(1, (batch.k.shape[1], batch.group))


def _rows_of(x5: Tensor, tile: Tile) -> Tensor:
    """(items · heads, group · rows, D)."""
    part = x5[tile.items, tile.heads, :, tile.rows]
    return part.reshape(tile.shape[0] * tile.shape[1], -1, x5.shape[4])


def _keys_of(x: Tensor, tile: Tile) -> Tensor:
    """(items · heads, keys, D), a view."""
    return x[tile.items, tile.heads].flatten(0, 1)[:, tile.keys]


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, widths: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    widths_grad, bias_grad = rest[-2:]
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_grad else widths.new_empty(0)
    dwidths = widths.new_empty(widths.shape if widths_grad else (0,))
    return (*(x.new_empty(x.shape) for x in (q, k, v)), dwidths, dbias)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor widths, Tensor? bias, Tensor? mask, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool laplacian, bool normalize, int left, "
    "int right"
)
_forward_op = define(f"kernel_attention({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
_backward_op = define(
    f"kernel_attention_backward(Tensor grad, {_ARGUMENTS}, bool widths_grad, bool bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)

dispatch.register("kernel_attention", "torch", kernel_attention_torch)
