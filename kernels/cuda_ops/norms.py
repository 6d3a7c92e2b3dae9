"""rms_norm and layer_norm, each with an optional residual added first, forward and backward.

The kernels are csrc/norm_forward.cuh and csrc/norm_backward.cuh, with their formulas; the launch
plan is csrc/norm_plan.h. x and residual of different dtypes are converted to their common one
first; so are a weight and a bias that are neither float32 nor of that dtype, to float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define, quick_apply, unobserved
from ..norm_ops import OPTIONS, cast, define_forward
from . import launch
from .launch import TYPE_CODES, pointer, rows_of


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> Any:
    """x (..., D) · rsqrt(mean(x²) + eps) · (weight_offset + weight); see ``kernels.rms_norm``."""
    return _apply(x, residual, weight, None, eps, weight_offset, False)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    """(x - mean) · rsqrt(var + eps) · weight + bias over (..., D); see ``kernels.layer_norm``."""
    return _apply(x, residual, weight, bias, eps, 0.0, True)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        centered: bool,
    ) -> Any:
        direct = unobserved(x, weight)
        ctx.options = (weight_offset, centered)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        if residual is None:
            run = _forward if direct else _forward_op
            y, stats = run(x, weight, bias, eps, weight_offset, centered)
            ctx.save_for_backward(x, weight, stats)
            return y
        ctx.set_materialize_grads(False)
        ctx.dtypes += (residual.dtype,)
        run = _residual_forward if direct else _residual_op
        y, summed, stats = run(x, residual, weight, bias, eps, weight_offset, centered)
        ctx.save_for_backward(summed, weight, stats)
        return y, summed

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsummed: Tensor | None = None) -> tuple[Any, ...]:
        run = _gradients_once if torch.is_grad_enabled() else _gradients
        return run(ctx, dy, dsummed)


def _gradients(ctx: Any, dy: Tensor | None, dsummed: Tensor | None) -> tuple[Any, ...]:
    """What :class:`_Norm` returns from backward, for its seven arguments."""
    x_dtype, bias_dtype, *residual_dtype = ctx.dtypes
    dweight = dbias = None
    ds = dsummed
    if dy is not None:
        s, weight, stats = ctx.saved_tensors
        _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        run = _backward if unobserved(s, weight) else _backward_op
        weight_offset, centered = ctx.options
        ds, dweight, dbias = run(
            *(dy, dsummed, s, weight, stats, weight_offset, centered),
            needs_weight or needs_bias,
            bias_dtype if needs_bias else None,
        )
        dweight = dweight if needs_weight else None
        dbias = dbias if needs_bias else None
    if ds is None:
        return (None,) * 7
    dresidual = cast(ds, *residual_dtype) if residual_dtype else None
    return cast(ds, x_dtype), dresidual, dweight, dbias, None, None, None


_apply = quick_apply(_Norm)
_gradients_once = once_differentiable(_gradients)


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    summed: Tensor | None,
    stats: Tensor,
    eps: float,
    weight_offset: float,
    centered: bool,
) -> None:
    if x.numel() == 0:
        return
    dtype, width = y.dtype, weight.shape[0]
    x, x_stride = rows_of(cast(x, dtype), width)
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = rows_of(cast(residual, dtype), width)
    weight, bias = _parameters(weight, bias, dtype)
    types = TYPE_CODES[dtype] | TYPE_CODES[weight.dtype] << 4
    launch.run(
        "sw_norm_forward",
        x,
        (
            *(x.data_ptr(), pointer(residual), weight.data_ptr(), pointer(bias)),
            *(y.data_ptr(), pointer(summed), stats.data_ptr()),
            *(x_stride, residual_stride, stats.shape[-1], width),
            *(eps, weight_offset, types, centered),
        ),
    )


def _parameters(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Contiguous, and both float32 or both ``dtype``."""
    if bias is not None:
        if bias.dtype != weight.dtype or bias.dtype != dtype:
            weight, bias = weight.float(), bias.float()
        return weight.contiguous(), bias.contiguous()
    return (weight if weight.dtype == dtype else weight.float()).contiguous(), None


def _backward(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    stats: Tensor,
    weight_offset: float,
    centered: bool,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ds, dweight, dbias), each parameter's gradient empty where not asked for.

    A bias gradient is asked for with its dtype, and only together with the weight's.
    """
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    width = weight.shape[0]
    bias_width = 0 if bias_dtype is None else width
    dweight = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    dbias = weight.new_empty(0)
    if bias_dtype is not None:
        dbias = torch.empty_like(weight, dtype=bias_dtype)
    if s.numel() == 0:
        return ds, dweight.zero_(), dbias.zero_()
    count = launch.multiprocessors(s)
    partial = None
    if weight_grad:
        partial = stats.new_empty(count * (width + bias_width))
    types = TYPE_CODES[s.dtype] | TYPE_CODES[weight.dtype] << 4 | TYPE_CODES[dbias.dtype] << 8
    dy, dy_stride = rows_of(cast(dy, s.dtype), width)
    dsummed_stride = 0
    if dsummed is not None:
        dsummed, dsummed_stride = rows_of(cast(dsummed, s.dtype), width)
    s, s_stride = rows_of(s, width)
    weight = weight.contiguous()
    launch.run(
        "sw_norm_backward",
        s,
        (
            *(dy.data_ptr(), pointer(dsummed), s.data_ptr(), weight.data_ptr(), stats.data_ptr()),
            *(ds.data_ptr(), pointer(partial), dweight.data_ptr(), dbias.data_ptr()),
            *(dy_stride, dsummed_stride, s_stride, stats.shape[-1], width),
            *(weight_offset, types, centered, count),
        ),
    )
    return ds, dweight, dbias


def _backward_fake(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    stats: Tensor,
    weight_offset: float,
    centered: bool,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(len(weight) if weight_grad else 0)
    dbias = weight.new_empty(0 if bias_dtype is None else len(weight), dtype=bias_dtype)
    return s.new_empty(s.shape), dweight, dbias


_forward, _residual_forward, _forward_op, _residual_op = define_forward("cuda", _launch_forward)
_backward_op = define(
    "cuda_norm_backward(Tensor dy, Tensor? dsummed, Tensor s, Tensor weight, Tensor stats, "
    f"{OPTIONS}, bool weight_grad, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
