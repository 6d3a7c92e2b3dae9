"""Linear attention in plain PyTorch: dense, packed, and as operations with their own backward.

The arithmetic is in linear_attention_scan.py; it is float32 (float64 for float64), whatever the
dtype of the inputs. Documents of one padded length form one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .attention import softmax_scale
from .attention_cpu_ops import check_totals
from .attention_plan import PackedPlan, plan_packed
from .autocast import to_autocast_dtype
from .library import define
from .linear_attention_scan import Heads, Map, attend, gradients


@dataclass(frozen=True)
class Piece:
    """``n`` documents of one padded shape: their tokens, and which of their keys are real."""

    queries: slice
    keys: slice
    n: int
    real: Tensor | None


def linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "favor",
    features: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    q, k, v = to_autocast_dtype(q.device.type, q, k, v)
    cu_seqlens_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    documents = (cu_seqlens_q, cu_seqlens_k)
    root = softmax_scale(q, scale) ** 0.5
    return _Linear.apply(q, k, v, features, key_bias, *documents, feature_map, causal, root)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, ctx.options = arguments[:7], arguments[7:]
        ctx.save_for_backward(*tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return _forward_op(*tensors, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wants = (ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        with torch.autocast(grad.device.type, enabled=False):
            grads = _backward_op(grad, *ctx.saved_tensors, *ctx.options, *wants)
        optional = (g if wanted else None for g, wanted in zip(grads[3:], wants, strict=True))
        return (*grads[:3], *optional, *(None,) * 5)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    feature_map: str,
    causal: bool,
    root: float,
) -> Tensor:
    phi, plan = Map(feature_map, features, root), _plan(q, k, cu_seqlens_q, cu_seqlens_k, causal)
    tq, tk, tv, tb = _tokens(plan, q, k, v, bias)
    out = tq.new_zeros(len(tq), q.shape[-2], v.shape[-1])
    for piece in _pieces(plan, q, k, cu_seqlens_q, cu_seqlens_k):
        part = attend(_heads(piece, tq, tk, tv, tb, causal), phi, causal)
        _write(out, piece.queries, piece.n, part, causal)
    out = out.view(*q.shape[:-1], v.shape[-1]) if plan is None else plan.q.tokens.scatter(out)
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    feature_map: str,
    causal: bool,
    root: float,
    features_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    phi, plan = Map(feature_map, features, root), _plan(q, k, cu_seqlens_q, cu_seqlens_k, causal)
    tq, tk, tv, tb = _tokens(plan, q, k, v, bias)
    high = _high(q)
    up = grad.reshape(-1, *grad.shape[-2:]) if plan is None else plan.q.tokens.gather_zeros(grad)
    dq, dk, dv = (torch.zeros_like(x) for x in (tq, tk, tv))
    dbias = None if tb is None else torch.zeros_like(tb)
    dfeatures = None
    if features is not None and features_grad:
        dfeatures = torch.zeros_like(features, dtype=high)
    for piece in _pieces(plan, q, k, cu_seqlens_q, cu_seqlens_k):
        heads = _heads(piece, tq, tk, tv, tb, causal)
        part_up = _rows(up, piece.queries, piece.n, heads.k.shape[0] // piece.n)
        part_up = part_up[:, :, part_up.shape[2] - heads.q.shape[2] :].to(high)
        grads = gradients(part_up, heads, phi, causal, dfeatures)
        _write(dq, piece.queries, piece.n, grads[0], causal)
        for target, part in ((dk, grads[1]), (dv, grads[2])):
            _write(target, piece.keys, piece.n, part[:, None], False)
        if dbias is not None:
            columns = grads[3].unflatten(0, (piece.n, -1))
            if dbias.shape[1] == 1:
                columns = columns.sum(1, keepdim=True)
            dbias[piece.keys] = columns.transpose(1, 2).flatten(0, 1)
    if plan is None:
        dq, dk, dv = (d.view(x.shape) for d, x in ((dq, q), (dk, k), (dv, v)))
    else:
        dq = plan.q.tokens.scatter(dq)
        dk, dv = plan.k.tokens.scatter(dk), plan.k.tokens.scatter(dv)
    out_bias = q.new_empty(0, dtype=high)
    if bias is not None and bias_grad and dbias is not None:
        if plan is None:
            dbias = dbias.unflatten(0, (-1, k.shape[-3])) if q.dim() == 4 else dbias
        else:
            dbias = plan.k.tokens.scatter(dbias)
        out_bias = dbias.mT.to(bias.dtype).contiguous()
    out_features = q.new_empty(0, dtype=high)
    if features is not None and dfeatures is not None:
        out_features = dfeatures.to(features.dtype)
    return dq, dk, dv, out_features, out_bias


def _high(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _plan(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
) -> PackedPlan | None:
    """The grouping of documents; None: dense, or one document after the other, since causal
    documents of one padded shape may differ in where their rows stand among their keys."""
    if cu_seqlens_q is None:
        return None
    plan = plan_packed(cu_seqlens_q, cu_seqlens_k)
    check_totals(plan, q, k)
    return plan if not causal or all(group.square for group in plan.groups) else None


def _pieces(
    plan: PackedPlan | None,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Iterator[Piece]:
    if plan is not None:
        for group in plan.groups:
            real = None
            if not group.full_keys:
                column = torch.arange(group.lk, device=q.device)
                real = column < group.lengths_k.view(-1, 1)
            yield Piece(group.queries, group.keys, group.n, real)
    elif cu_seqlens_q is not None:
        bounds_q = cu_seqlens_q.tolist()
        bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
        for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
            if a < b and c < d:
                yield Piece(slice(a, b), slice(c, d), 1, None)
    elif 0 not in (q.numel(), k.numel()):
        rows_q, rows_k = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
        yield Piece(slice(0, rows_q), slice(0, rows_k), q.shape[0], None)


def _tokens(
    plan: PackedPlan | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(tokens, H, D) of each, padded by the plan; the bias (tokens, Hkv or 1) in float32."""
    if bias is not None:
        bias = bias.mT.to(_high(q)).reshape(-1, bias.shape[-2])
    if plan is None:
        tq, tk, tv = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        return tq, tk, tv, bias
    rows = plan.k.tokens
    padded_bias = None if bias is None else rows.gather(bias)
    return plan.q.tokens.gather(q), rows.gather(k), rows.gather(v), padded_bias


def _rows(x: Tensor, place: slice, n: int, kv_heads: int) -> Tensor:
    """Tokens (rows, H, D) of n documents as (n · Hkv, group, L, D)."""
    part = x[place]
    part = part.view(n, len(part) // n, kv_heads, -1, part.shape[-1]).permute(0, 2, 3, 1, 4)
    return part.flatten(0, 1)


def _heads(
    piece: Piece, tq: Tensor, tk: Tensor, tv: Tensor, tb: Tensor | None, causal: bool
) -> Heads:
    high, kv_heads = _high(tq), tk.shape[1]
    q = _rows(tq, piece.queries, piece.n, kv_heads).to(high)
    k, v = (_rows(x, piece.keys, piece.n, kv_heads)[:, 0].to(high) for x in (tk, tv))
    bias = None
    if tb is not None:
        bias = tb[piece.keys].unflatten(0, (piece.n, -1)).mT.expand(-1, kv_heads, -1)
    if piece.real is not None:
        hidden = ~piece.real[:, None].expand(-1, kv_heads, -1)
        bias = torch.zeros_like(hidden, dtype=high) if bias is None else bias
        bias = bias.masked_fill(hidden, -torch.inf)
    bias = None if bias is None else bias.flatten(0, 1)
    if causal:
        # Earlier rows see no key.
        q = q[:, :, max(0, q.shape[2] - k.shape[1]) :]
    ones = v.new_ones(*v.shape[:2], 1)
    return Heads(q.contiguous(), k.contiguous(), torch.cat([v, ones], dim=-1), bias)


def _write(target: Tensor, place: slice, n: int, part: Tensor, causal: bool) -> None:
    """Writes (n · Hkv, group, L, D) to tokens; a causal part is the last rows of each document."""
    rows = target[place]
    rows = rows.view(n, len(rows) // n, *rows.shape[1:])
    part = part.unflatten(0, (n, -1)).flatten(1, 2).transpose(1, 2)
    rows[:, rows.shape[1] - part.shape[1] :].copy_(part)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    optional = (
        x.new_empty(x.shape) if x is not None and wanted else q.new_empty(0, dtype=_high(q))
        for x, wanted in zip((features, bias), rest[-2:], strict=True)
    )
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *optional)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? features, Tensor? bias, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, str feature_map, bool causal, float root"
)
_forward_op = define(f"linear_attention({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
_backward_op = define(
    f"linear_attention_backward(Tensor grad, {_ARGUMENTS}, bool features_grad, bool bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)

dispatch.register("linear_attention", "torch", linear_attention_torch)
