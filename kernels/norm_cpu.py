"""RMSNorm and LayerNorm for a CPU: passes over blocks of rows that stay in cache.

PyTorch's own LayerNorm adds up weight gradients in the input's dtype: in bf16 they are useless
after a few hundred rows. Here every sum is float32, block by block (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu import as_rows, row_blocks
from .library import quick_apply
from .workspace import scratch

_BLOCK = 1 << 18  # elements; fewer, larger sums than the elementwise operations want


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    return _apply_rms_norm(x, weight, eps, weight_offset)


def layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _apply_layer_norm(x, weight, bias, eps)


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = rsqrt(mean x² + eps);
    dx = r (g w - x r · mean(g w x r)),  dw = Σ_rows g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
        ctx.weight_dtype = weight.dtype
        if x.numel() == 0:
            ctx.save_for_backward(x, weight)
            return torch.empty_like(x)
        rows, high = as_rows(x), torch.promote_types(x.dtype, torch.float32)
        scale = weight.to(high) + weight_offset if weight_offset else weight.to(high)
        out, rstd = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=high)
        for at in row_blocks(rows, _BLOCK):
            block = _high("x", rows[at], high)
            r = torch.linalg.vector_norm(block, 2, -1, True, out=rstd[at])
            r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            _finish(out[at], torch.mul(block, r, out=_target("y", out[at], high)).mul_(scale))
        ctx.save_for_backward(rows, scale, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, scale, *rest = ctx.saved_tensors
        if not rest:
            return grad, torch.zeros_like(scale), None, None
        (rstd,) = rest
        width, high = rows.shape[1], rstd.dtype
        up, dx = grad.reshape(rows.shape), torch.empty_like(rows)
        dw = scale.new_zeros(width)
        for at in row_blocks(rows, _BLOCK):
            g, r = _high("g", up[at], high), rstd[at]
            normed = torch.mul(_high("x", rows[at], high), r, out=_take("normed", g))
            product = torch.mul(g, normed, out=_take("product", g))
            dw += product.sum(0)
            mean = torch.mv(product, scale, out=_take("mean", r[:, 0])).div_(-width)
            gw = torch.mul(g, scale, out=_target("gw", dx[at], high))
            _finish(dx[at], gw.addcmul_(normed, mean[:, None]).mul_(r))
        return dx.view(grad.shape), dw.to(ctx.weight_dtype), None, None


class _LayerNorm(torch.autograd.Function):
    """PyTorch's forward and its dx; the weight and bias gradients are summed here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        if x.numel() == 0:
            ctx.save_for_backward(x, weight)
            return torch.empty_like(x)
        high = torch.promote_types(x.dtype, torch.float32)
        scale, shift = weight.to(high), None if bias is None else bias.to(high)
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scale, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not rest:
            db = torch.zeros_like(scale).to(ctx.dtypes[1]) if needs[2] else None
            return grad, torch.zeros_like(scale), db, None
        (mean, rstd), width = rest, x.shape[-1]
        dx = None
        if needs[0]:
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, [width], mean, rstd, scale, None, [True, False, False]
            )
        dw = db = None
        if needs[1] or needs[2]:
            g, rows, m, r = (as_rows(t) for t in (grad, x, mean, rstd))
            dw, db = _layer_norm_sums(g, rows, m, r, scale)
        return (
            dx,
            dw.to(ctx.dtypes[0]) if needs[1] and dw is not None else None,
            db.to(ctx.dtypes[1]) if needs[2] and db is not None else None,
            None,
        )


_apply_rms_norm, _apply_layer_norm = quick_apply(_RmsNorm), quick_apply(_LayerNorm)


def _layer_norm_sums(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    dw, db = torch.zeros_like(like), torch.zeros_like(like)
    mean, rstd = mean.to(like.dtype), rstd.to(like.dtype)
    for at in row_blocks(x, _BLOCK):
        g, block = _high("g", grad[at], like.dtype), _high("x", x[at], like.dtype)
        normed = torch.sub(block, mean[at], out=_take("normed", g)).mul_(rstd[at])
        dw += normed.mul_(g).sum(0)
        db += g.sum(0)
    return dw, db


def _high(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, or a scratch copy of it in the wider dtype."""
    return x if x.dtype == dtype else scratch().take(name, tuple(x.shape), x, dtype).copy_(x)


def _take(name: str, like: Tensor) -> Tensor:
    return scratch().take(name, tuple(like.shape), like, like.dtype)


def _target(name: str, final: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to compute what ends up in ``final``: there, or in a wider scratch buffer."""
    return final if final.dtype == dtype else scratch().take(name, tuple(final.shape), final, dtype)


def _finish(final: Tensor, computed: Tensor) -> None:
    if final.dtype != computed.dtype:
        final.copy_(computed)
