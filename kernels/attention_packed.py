"""Packed attention in plain PyTorch: one batched attention per group of equal padded length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import Window, expand_key_bias
from .attention_composed import composed_attention, scaled_dot_product
from .attention_cpu_ops import check_totals
from .attention_plan import Rows, plan_packed


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
        return out
    lse = _Unpad.apply(torch.cat(lses), rows_q)
    if rows_q.missing is not None:
        alone = -torch.inf if sinks is None else sinks.to(high)
        lse = lse.index_put((rows_q.missing,), lse.new_zeros(()) + alone)
    return out, lse.mT


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
