"""tanh-GELU in half precision for a CPU, where tanh costs several times a sigmoid.

0.5 (1 + tanh u) = σ(2u), so y = h σ(h t) with t = a + b h², a = 2 sqrt(2/π), b = 0.044715 a, and
dy/dh = σ + (1 - σ) y (a + 3 b h²). Forward computes both while h is in cache and keeps the
derivative in place of h, so that backward is one product. Arithmetic is float32 in blocks; for a
float32 input 1 - σ would not be exact enough, and PyTorch's own kernel is as fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .cpu import as_rows, row_blocks
from .workspace import scratch

_A = 2.0 * math.sqrt(2.0 / math.pi)
_B = 0.044715 * _A


def tanh_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x + bias), tanh form; x (..., D) bfloat16 or float16, bias (D,) or None."""
    wanted = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if wanted:
        return _TanhGelu.apply(x, bias)
    return _forward(x, bias, False)[0]


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        out, slope = _forward(x, bias, True)
        ctx.save_for_backward(slope)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (slope,) = ctx.saved_tensors
        dx = grad * slope
        dbias = None
        if ctx.needs_input_grad[1]:
            high = torch.promote_types(ctx.bias_dtype, torch.float32)
            dbias = as_rows(dx).sum(0, dtype=high).to(ctx.bias_dtype)
        return dx, dbias


def _forward(x: Tensor, bias: Tensor | None, with_slope: bool) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)
    out = torch.empty_like(rows)
    slope = torch.empty_like(rows) if with_slope else rows.new_empty(0)
    a, minus_2a, one = (rows.new_tensor(c, dtype=torch.float32) for c in (_A, -2 * _A, 1.0))
    for at in row_blocks(rows):
        h, t, s = (scratch().take(n, tuple(rows[at].shape), x, torch.float32) for n in "hts")
        h.copy_(rows[at])
        if bias is not None:
            h.add_(bias)
        torch.addcmul(a, h, h, value=_B, out=t)
        torch.mul(t, h, out=s).sigmoid_()
        out[at] = h.mul_(s)
        if with_slope:
            torch.add(minus_2a, t, alpha=3.0, out=t).mul_(h)
            slope[at] = torch.lerp(t, one, s, out=t)
    return out.view(x.shape), slope.view(x.shape) if with_slope else slope
