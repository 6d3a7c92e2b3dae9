"""Packed attention in plain PyTorch: one batched attention per group of equal padded length.

How many groups there are depends on the values of cu_seqlens, which a compiler does not know: it
sees one operation that keeps its inputs, and computes the groups again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import Window, expand_key_bias
from .attention_composed import (
    composed_attention,
    composed_attention_backward,
    scaled_dot_product,
)
from .attention_cpu_ops import check_totals
from .attention_plan import Rows, plan_packed
from .library import define, unobserved


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    causal: bool,
    scale: float,
    window: Window | None,
    key_bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> Any:
    """(total_q, Hq, Dv), and lse (Hq, total_q) if asked for; every option, on every device."""
    run = _grouped if unobserved(q, k, v) else _Grouped.apply
    out, lse = run(
        q, k, v, key_bias, sinks, cu_seqlens_q, cu_seqlens_k,
        causal, *(window or (-1, -1)), scale, softcap, return_lse,
    )  # fmt: skip
    return (out, lse.mT) if return_lse else out


def _grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(total_q, Hq, Dv) and lse (total_q, Hq), which has no rows where it is not asked for."""
    window = None if left < 0 and right < 0 else (left, right)
    plan = plan_packed(cu_seqlens_q, cu_seqlens_k)
    check_totals(plan, q, k)
    rows_q, rows_k = plan.q.tokens, plan.k.tokens
    padded_q, padded_k, padded_v = _pad(q, rows_q), _pad(k, rows_k), _pad(v, rows_k)
    bias = None
    if key_bias is not None:
        bias = _pad(expand_key_bias(key_bias, q.shape[1]).mT, rows_k)
    plain = bias is None and softcap is None and sinks is None and not return_lse
    high = torch.promote_types(q.dtype, torch.float32)
    # Without documents the empty result still belongs to the graph of q.
    outs = [padded_q[:0, :, :1].expand(0, q.shape[1], v.shape[2])]
    lses = [q.new_zeros(0, q.shape[1], dtype=high)]
    for group in plan.groups:
        batch_q = padded_q[group.queries].unflatten(0, (group.n, group.lq))
        batch_k = padded_k[group.keys].unflatten(0, (group.n, group.lk))
        batch_v = padded_v[group.keys].unflatten(0, (group.n, group.lk))
        keep = group.keep(causal, window)
        if plain:
            out = scaled_dot_product(batch_q, batch_k, batch_v, keep, False, scale)
            outs.append(out.flatten(0, 1))
            continue
        group_bias = None
        if bias is not None:
            group_bias = bias[group.keys].unflatten(0, (group.n, group.lk)).mT[:, :, None, :]
        out, lse = composed_attention(
            batch_q, batch_k, batch_v, keep, group_bias, scale, softcap, sinks
        )
        outs.append(out.flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    out = _Unpad.apply(torch.cat(outs), rows_q)
    if not return_lse:
        return out, lses[0]
    lse = _Unpad.apply(torch.cat(lses), rows_q)
    if rows_q.missing is not None:
        alone = -torch.inf if sinks is None else sinks.to(high)
        lse = lse.index_put((rows_q.missing,), lse.new_zeros(()) + alone)
    return out, lse


class _Grouped(torch.autograd.Function):
    """:func:`_grouped` as one operation, differentiable in its first five arguments."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:7])
        ctx.options = arguments[7:]
        return _grouped_op(*arguments)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:5]
        grads = _grouped_backward_op(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options, needs)
        chosen = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*chosen, *(None,) * (len(ctx.needs_input_grad) - len(needs)))


def _grouped_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    return_lse: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, key_bias and sinks; one that is not needed has no elements."""
    window = None if left < 0 and right < 0 else (left, right)
    plan = plan_packed(cu_seqlens_q, cu_seqlens_k)
    rows_q, rows_k = plan.q.tokens, plan.k.tokens
    heads, high = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    padded_q, up = rows_q.gather(q), rows_q.gather_zeros(grad_out)
    padded_k, padded_v = rows_k.gather(k), rows_k.gather(v)
    up_lse = rows_q.gather_zeros(grad_lse) if return_lse else None
    bias = None
    if key_bias is not None:
        bias = rows_k.gather(expand_key_bias(key_bias, heads).mT)
    dq, dk, dv = (torch.zeros_like(x) for x in (padded_q, padded_k, padded_v))
    dbias = torch.zeros(len(padded_k), heads, dtype=high, device=q.device)
    dsinks = torch.zeros(heads, dtype=high, device=q.device)
    for group in plan.groups:
        at_q, at_k, size_q, size_k = (
            group.queries, group.keys, (group.n, group.lq), (group.n, group.lk)
        )  # fmt: skip
        grads = composed_attention_backward(
            up[at_q].unflatten(0, size_q),
            None if up_lse is None else up_lse[at_q].unflatten(0, size_q).transpose(1, 2),
            padded_q[at_q].unflatten(0, size_q),
            padded_k[at_k].unflatten(0, size_k),
            padded_v[at_k].unflatten(0, size_k),
            group.keep(causal, window),
            None if bias is None else bias[at_k].unflatten(0, size_k).mT[:, :, None, :],
            scale,
            softcap,
            sinks,
        )
        dq[at_q], dk[at_k], dv[at_k] = (x.flatten(0, 1) for x in grads[:3])
        dbias[at_k] = grads[3].mT.flatten(0, 1)
        dsinks += grads[4]
    if return_lse and rows_q.missing is not None:
        dsinks += grad_lse[rows_q.missing].sum(0)
    found = (rows_q.scatter(dq), rows_k.scatter(dk), rows_k.scatter(dv))
    return (
        *(x if need else q.new_empty(0) for x, need in zip(found, needs, strict=False)),
        _as_key_bias(rows_k.scatter(dbias), key_bias) if needs[3] else q.new_empty(0),
        dsinks.to(sinks.dtype) if needs[4] and sinks is not None else q.new_empty(0),
    )


def _as_key_bias(grad: Tensor, key_bias: Tensor | None) -> Tensor:
    """(total_k, Hq) summed over the query heads that share a row of ``key_bias``, as its rows."""
    assert key_bias is not None
    shared = grad.unflatten(1, (key_bias.shape[0], -1)).sum(2)
    return shared.mT.contiguous().to(key_bias.dtype)


def _grouped_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    high = torch.promote_types(q.dtype, torch.float32)
    rows = q.shape[0] if arguments[-1] else 0
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(rows, q.shape[1], dtype=high)


def _grouped_backward_fake(
    grad_out: Tensor, grad_lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *inputs, needs = arguments
    return tuple(
        x.new_empty(x.shape) if x is not None and need else grad_out.new_empty(0)
        for x, need in zip(inputs, needs, strict=False)
    )  # type: ignore[return-value]


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? sinks, Tensor cu_seqlens_q, "
    "Tensor? cu_seqlens_k, bool causal, int left, int right, float scale, float? softcap, "
    "bool return_lse"
)
_grouped_op = define(
    f"attention_packed_grouped({_ARGUMENTS}) -> (Tensor, Tensor)", _grouped, _grouped_fake
)
_grouped_backward_op = define(
    f"attention_packed_grouped_backward(Tensor grad_out, Tensor grad_lse, {_ARGUMENTS}, "
    "bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grouped_backward,
    _grouped_backward_fake,
)


def _pad(x: Tensor, rows: Rows) -> Tensor:
    return _Pad.apply(x, rows)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return rows.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.scatter(grad), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return rows.scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.gather_zeros(grad), None
