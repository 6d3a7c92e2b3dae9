"""Triton attention: its operations, gradients, and launches. Formulas: kernels/attention.py.

    forward   one program per tile of queries, keys walked with a running maximum
    backward  Δ and lse for the kernels, then dk, dv per tile of keys and dq per tile of queries

Gradients are the same bits every time: ``deterministic`` costs nothing here. Inputs are read in
place at any strides over batch, length and heads. B batch, L length, H heads, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import Window, softmax_scale, window_limits
from ..autocast import to_autocast_dtype
from ..library import define
from .attention_launch import MAX_DISTANCE
from .attention_launchers import launch_backward, launch_forward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """See ``kernels.attention``. Tokens after the last boundary get 0 and no gradient."""
    q, k, v = to_autocast_dtype(q.device.type, q, k, v)
    out, lse = split_attention(
        *(q, None, k, None, v),
        causal=causal,
        scale=softmax_scale(q, scale),
        key_bias=key_bias,
        window=window,
        softcap=softcap,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return (out, lse * math.log(2)) if return_lse else out


def split_attention(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
    window: Window | None,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention with scores scale · (q · k + q_rope · k_rope), where k_rope (B, Lk, 1 or Hkv, Dr)
    is not repeated for the heads that share it. Returns out and lse in base 2, lse · log2(e): the
    backward pass reads it as it is, without the rounding of another logarithm."""
    left, right = (min(limit, MAX_DISTANCE) for limit in window_limits(causal, window))
    bias = None if key_bias is None else key_bias.float()
    options = (scale, softcap or 0.0, left, right)
    return _Attention.apply(
        q, q_rope, k, k_rope, v, bias, sinks, cu_seqlens_q, cu_seqlens_k, *options
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward_op(*arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:9], out, lse)
        ctx.options = arguments[9:]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * 13
        dout = torch.zeros_like(out) if dout is None else dout
        needed = (needs[0] or needs[1], needs[2] or needs[3], *needs[4:7])
        gradients = _backward_op(dout, dlse, *inputs, out, lse, *ctx.options, *needed)
        kept = (g if need else None for g, need in zip(gradients, needs, strict=False))
        return (*kept, *(None,) * 6)


def _fake_forward(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lead = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return out, q.new_empty(lead, dtype=torch.float32)


def _forward(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    inputs = (q, q_rope, k, k_rope, v, key_bias, sinks, cu_seqlens_q, cu_seqlens_k)
    out, lse = _fake_forward(*inputs, scale, softcap, left, right)
    if out.numel():
        launch_forward(*inputs, scale, softcap, left, right, out, lse)
    return out, lse


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    q_grad: bool,
    k_grad: bool,
    v_grad: bool,
    bias_grad: bool,
    sinks_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, q_rope, k, k_rope, v, key_bias and sinks; without elements where not asked
    for, or not there."""
    wanted = (q_grad, q_grad, k_grad, k_grad, v_grad, bias_grad, sinks_grad)
    tensors = (q, q_rope, k, k_rope, v, key_bias, sinks)
    return tuple(
        q.new_empty(0) if x is None or not want else x.new_empty(x.shape)
        for x, want in zip(tensors, wanted, strict=True)
    )


def _backward(dout: Tensor, dlse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, out, lse, scale, softcap, left, right = arguments[:-5]
    gradients = _fake_backward(dout, dlse, *arguments)
    launch_backward(
        dout, dlse, *inputs, scale, softcap, left, right, out, lse, arguments[-5:], gradients
    )
    return gradients


_INPUTS = (
    "Tensor q, Tensor? q_rope, Tensor k, Tensor? k_rope, Tensor v, Tensor? key_bias, "
    "Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = "float scale, float softcap, int left, int right"
_WANTED = "bool q_grad, bool k_grad, bool v_grad, bool bias_grad, bool sinks_grad"
_forward_op = define(
    f"triton_attention_forward({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", _forward, _fake_forward
)
_backward_op = define(
    f"triton_attention_backward(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, "
    f"{_OPTIONS}, {_WANTED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
