"""CPU attention as single operations with their own backward: dense, and packed documents.

Two engines compute a batch. PyTorch's flash kernel keeps the scores in float32 and is the faster
one for float32; the tiles of attention_cpu.py are the faster ones in bf16, and take Dv != Dqk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attention_cpu, checks
from .attention import Window
from .attention_plan import Group, PackedPlan, Rows, Side, plan_packed
from .library import define
from .workspace import scratch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def uses_tiles(q: Tensor, v: Tensor) -> bool:
    """Whether the tiles of attention_cpu.py, and not PyTorch's kernel, take this case."""
    return q.dtype == torch.bfloat16 or q.shape[-1] != v.shape[-1]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """(B, Lq, Hq, Dv) by tiles. ``bias`` (B or 1, 1 or Hq, 1 or Lq, Lk), 0 and -inf or finite, must
    leave every row a finite score; with a bias, ``causal`` only says which keys it hides."""
    return _Dense.apply(q, k, v, bias, causal, scale)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: Window | None,
    scale: float,
) -> Tensor:
    """(total_q, Hq, Dv), one batch per group of the plan."""
    left, right = window if window is not None else (-1, -1)
    return _Packed.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, left, right, scale)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.options = (causal, scale)
        return _dense_op(q, k, v, bias, causal, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*_dense_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        causal: bool,
        left: int,
        right: int,
        scale: float,
    ) -> Tensor:
        options = (cu_seqlens_q, cu_seqlens_k, causal, left, right, scale)
        out, lse = _packed_op(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.options = (causal, left, right, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = _packed_backward_op(grad, *ctx.saved_tensors, *ctx.options)
        return (*grads, None, None, None, None, None, None)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    hq, hk, hv = _heads_first("q", q).mul_(scale), _heads_first("k", k), _heads_first("v", v)
    out = scratch().take("out", (*hq.shape[:3], v.shape[3]), q, q.dtype)
    attention_cpu.forward(hq, hk, hv, bias, causal, out)
    return _tokens_first(out)


def _dense_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    hq, hk, hv = _heads_first("q", q).mul_(scale), _heads_first("k", k), _heads_first("v", v)
    up = _heads_first("grad", grad)
    dq, dk, dv = _like("dq", hq), _like("dk", hk), _like("dv", hv)
    attention_cpu.backward(up, hq, hk, hv, bias, causal, dq, dk, dv)
    return _tokens_first(dq.mul_(scale)), _tokens_first(dk), _tokens_first(dv)


def _heads_first(name: str, x: Tensor) -> Tensor:
    """(B, L, H, D) to a scratch copy (B, H, L, D)."""
    x = x.transpose(1, 2)
    return scratch().take(name, tuple(x.shape), x, x.dtype).copy_(x)


def _tokens_first(x: Tensor) -> Tensor:
    """(B, H, L, D) to a new (B, L, H, D)."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _like(name: str, x: Tensor) -> Tensor:
    return scratch().take(name, tuple(x.shape), x, x.dtype)


def _plan(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> PackedPlan:
    plan = plan_packed(cu_seqlens_q, cu_seqlens_k)
    check_totals(plan, q, k)
    return plan


def check_totals(plan: PackedPlan, q: Tensor, k: Tensor) -> None:
    for name, side, x in (("q", plan.q, q), ("k", plan.k, k)):
        if side.total != x.shape[0]:
            accepted = f"the {x.shape[0]} rows of {name}"
            checks.fail(f"cu_seqlens_{name}", f"{side.total} as the last boundary", accepted)


def _window(left: int, right: int) -> Window | None:
    return None if left < 0 and right < 0 else (left, right)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the lse (total_q, Hq) where the backward pass will need it."""
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k)
    run = _packed_tiles if uses_tiles(q, v) else _packed_flash
    out, lse = run(q, k, v, plan, causal, _window(left, right), scale)
    hidden = plan.hidden(causal, _window(left, right))
    return (out if hidden is None else out.index_fill_(0, hidden, 0)), lse


def _packed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k)
    window = _window(left, right)
    hidden = plan.hidden(causal, window)
    if hidden is not None:
        grad = grad.index_fill(0, hidden, 0)
    if uses_tiles(q, v):
        return _packed_tiles_backward(grad, q, k, v, plan, causal, window, scale)
    return _packed_flash_backward(grad, q, k, v, out, lse, plan, causal, window, scale)


def _bias(
    group: Group, causal: bool, window: Window | None, dtype: torch.dtype
) -> tuple[Tensor | None, bool]:
    """The group's mask, and whether the kernel's own causal rule applies instead of one."""
    if causal and group.square and window is None:
        return None, True
    return group.bias(causal, window, dtype), False


def _packed_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    causal: bool,
    window: Window | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    rows_q, rows_k = plan.q.heads(heads), plan.k.heads(kv_heads)
    hq = _gather("q", rows_q, q).mul_(scale)
    hk, hv = _gather("k", rows_k, k), _gather("v", rows_k, v)
    out = scratch().take("out", (len(hq), v.shape[2]), v, v.dtype)
    for group in plan.groups:
        bias, is_causal = _bias(group, causal, window, q.dtype)
        attention_cpu.forward(
            _batch_q(hq, group, heads), _batch_k(hk, group, kv_heads),
            _batch_k(hv, group, kv_heads), bias, is_causal, _batch_q(out, group, heads),
        )  # fmt: skip
    out = rows_q.scatter(out).view(q.shape[0], heads, v.shape[2])
    return out, q.new_empty(0, dtype=torch.float32)


def _packed_tiles_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    causal: bool,
    window: Window | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    rows_q, rows_k = plan.q.heads(heads), plan.k.heads(kv_heads)
    hq = _gather("q", rows_q, q).mul_(scale)
    hk, hv = _gather("k", rows_k, k), _gather("v", rows_k, v)
    up = _gather("grad", rows_q, grad, zeros=True)
    dq, dk, dv = _like("dq", hq), _like("dk", hk), _like("dv", hv)
    for group in plan.groups:
        bias, is_causal = _bias(group, causal, window, q.dtype)
        attention_cpu.backward(
            _batch_q(up, group, heads), _batch_q(hq, group, heads),
            _batch_k(hk, group, kv_heads), _batch_k(hv, group, kv_heads), bias, is_causal,
            _batch_q(dq, group, heads), _batch_k(dk, group, kv_heads),
            _batch_k(dv, group, kv_heads),
        )  # fmt: skip
    return (
        rows_q.scatter(dq).view(q.shape).mul_(scale),
        rows_k.scatter(dk).view(k.shape),
        rows_k.scatter(dv).view(v.shape),
    )


def _gather(name: str, rows: Rows, x: Tensor, zeros: bool = False) -> Tensor:
    """(total, H, D) to a scratch copy (padded · H, D), head-major in each document."""
    flat = x.reshape(-1, x.shape[-1])
    out = scratch().take(name, (len(rows.index), x.shape[-1]), x, x.dtype)
    return rows.gather_zeros(flat, out) if zeros else rows.gather(flat, out)


def _batch_q(x: Tensor, group: Group, heads: int) -> Tensor:
    """The group's part of head-major rows: (n, H, lq, D), a view."""
    rows = x[group.queries.start * heads : group.queries.stop * heads]
    return rows.view(group.n, heads, group.lq, x.shape[-1])


def _batch_k(x: Tensor, group: Group, heads: int) -> Tensor:
    rows = x[group.keys.start * heads : group.keys.stop * heads]
    return rows.view(group.n, heads, group.lk, x.shape[-1])


def _packed_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    causal: bool,
    window: Window | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tq, tk, tv = _tokens("q", plan.q, q), _tokens("k", plan.k, k), _tokens("v", plan.k, v)
    high = torch.promote_types(q.dtype, torch.float32)
    out, lse = _like("out", tq), scratch().take("lse", tuple(tq.shape[:2]), tq, high)
    for group in plan.groups:
        bias, is_causal = _flash_bias(group, causal, window, q.dtype)
        shape_q, shape_k = (group.n, group.lq), (group.n, group.lk)
        o, s = _flash(
            _batch(tq, group.queries, shape_q), _batch(tk, group.keys, shape_k),
            _batch(tv, group.keys, shape_k), 0.0, is_causal, attn_mask=bias, scale=scale,
        )  # fmt: skip
        _batch(out, group.queries, shape_q).copy_(o)
        lse[group.queries].view(group.n, group.lq, -1).transpose(1, 2).copy_(s)
    return plan.q.tokens.scatter(out), plan.q.tokens.scatter(lse)


def _packed_flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: PackedPlan,
    causal: bool,
    window: Window | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tq, tk, tv = _tokens("q", plan.q, q), _tokens("k", plan.k, k), _tokens("v", plan.k, v)
    up = _tokens("grad", plan.q, grad, zeros=True)
    to, ts = _tokens("out", plan.q, out), _tokens("lse", plan.q, lse)
    dq, dk, dv = _like("dq", tq), _like("dk", tk), _like("dv", tv)
    for group in plan.groups:
        bias, is_causal = _flash_bias(group, causal, window, q.dtype)
        shape_q, shape_k = (group.n, group.lq), (group.n, group.lk)
        grads = _flash_backward(
            _batch(up, group.queries, shape_q), _batch(tq, group.queries, shape_q),
            _batch(tk, group.keys, shape_k), _batch(tv, group.keys, shape_k),
            _batch(to, group.queries, shape_q),
            ts[group.queries].view(group.n, group.lq, -1).transpose(1, 2),
            0.0, is_causal, attn_mask=bias, scale=scale,
        )  # fmt: skip
        _batch(dq, group.queries, shape_q).copy_(grads[0])
        _batch(dk, group.keys, shape_k).copy_(grads[1])
        _batch(dv, group.keys, shape_k).copy_(grads[2])
    return plan.q.tokens.scatter(dq), plan.k.tokens.scatter(dk), plan.k.tokens.scatter(dv)


def _tokens(name: str, side: Side, x: Tensor, zeros: bool = False) -> Tensor:
    """Packed to padded token rows: x itself where that is the same, else a scratch copy."""
    if side.in_order:
        return x.contiguous()
    out = scratch().take(name, (side.padded, *x.shape[1:]), x, x.dtype)
    return side.tokens.gather_zeros(x, out) if zeros else side.tokens.gather(x, out)


def _flash_bias(
    group: Group, causal: bool, window: Window | None, dtype: torch.dtype
) -> tuple[Tensor | None, bool]:
    bias, is_causal = _bias(group, causal, window, dtype)
    return None if bias is None else bias.expand(group.n, 1, group.lq, group.lk), is_causal


def _batch(x: Tensor, rows: slice, shape: tuple[int, int]) -> Tensor:
    """The group's part of token rows: (n, H, L, D), a view."""
    return x[rows].view(*shape, *x.shape[1:]).transpose(1, 2)


def _dense_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _dense_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _packed_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    high = torch.promote_types(q.dtype, torch.float32)
    size = (0,) if uses_tiles(q, v) else q.shape[:2]
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(size, dtype=high)


def _packed_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_DENSE = "Tensor q, Tensor k, Tensor v, Tensor? bias, bool causal, float scale"
_DOCUMENTS = "Tensor cu_seqlens_q, Tensor? cu_seqlens_k"
_OPTIONS = "bool causal, int left, int right, float scale"
_dense_op = define(f"attention_cpu({_DENSE}) -> Tensor", _dense, _dense_fake)
_dense_backward_op = define(
    f"attention_cpu_backward(Tensor grad, {_DENSE}) -> (Tensor, Tensor, Tensor)",
    _dense_backward,
    _dense_backward_fake,
)
_packed_op = define(
    f"attention_packed_cpu(Tensor q, Tensor k, Tensor v, {_DOCUMENTS}, {_OPTIONS}) "
    "-> (Tensor, Tensor)",
    _packed,
    _packed_fake,
)
_packed_backward_op = define(
    "attention_packed_cpu_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_DOCUMENTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _packed_backward,
    _packed_backward_fake,
)
