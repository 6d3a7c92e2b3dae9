"""rms_norm and layer_norm, each with an optional residual added first, forward and backward.

The forward pass saves s = x + residual (x itself without one) and float32 statistics per row. The
backward pass reads dy and s once, writes dx and one row of weight and bias gradients per program,
and a second kernel adds those rows in a fixed order: the same bits every time, no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define, quick_apply, unobserved
from ..norm_ops import OPTIONS, cast, define_forward
from .launch import MULTIPROCESSORS, as_rows, on_device
from .machine_code import TRITON_TYPES, VECTOR_LOAD, VECTOR_STORE, Case
from .norm_kernels import _norm_backward_kernel, _norm_forward_kernel
from .norm_plan import NormPlan, backward_plan, forward_plan
from .reduction import column_sum


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
            if direct and x.numel() == 0:
                ctx.save_for_backward(x, weight)
                return torch.empty_like(x)
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
        s, weight, *stats = ctx.saved_tensors
        _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if not stats:
            dbias = cast(torch.zeros_like(weight), bias_dtype) if needs_bias else None
            return dy, None, torch.zeros_like(weight), dbias, None, None, None
        run: Any = _backward if unobserved(s, weight) else _backward_op
        needs = needs_weight or needs_bias
        ds, sums = run(dy, dsummed, s, weight, stats[0], *ctx.options, needs, needs_bias)
        if needs_bias:
            dweight, dbias = sums.unbind()
            dbias = cast(dbias, bias_dtype)
        elif needs_weight:
            (dweight,) = sums.unbind()
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
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    n_rows, width = x.shape
    plan = forward_plan(n_rows, width, _multiprocessors(x.device))
    with on_device(x):
        _norm_forward_kernel[(plan.programs,)](
            *(x, residual, weight.contiguous(), None if bias is None else bias.contiguous()),
            *(y, summed, stats, x.stride(0), 0 if residual is None else residual.stride(0)),
            *(n_rows, eps, weight_offset),
            WIDTH=width,
            BLOCK=plan.block,
            TILE_ROWS=plan.tile_rows,
            CENTERED=centered,
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None,
            num_warps=plan.num_warps,
        )


def _backward(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    stats: Tensor,
    weight_offset: float,
    centered: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(ds, the rows dweight and dbias, of those asked for, in the weight's dtype)."""
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    width = weight.shape[0]
    shape = (weight_grad + bias_grad, width)
    if s.numel() == 0:
        return ds, weight.new_zeros(shape)
    dy, s, n_rows = _rows(dy), _rows(s), stats.shape[-1]
    dsummed = None if dsummed is None else _rows(dsummed)
    plan = backward_plan(n_rows, width, s.element_size(), _multiprocessors(s.device), weight_grad)
    columns = shape[0] * width
    partial = torch.empty(plan.programs, columns, dtype=torch.float32, device=s.device)
    with on_device(s):
        _norm_backward_kernel[(plan.programs,)](
            *(dy, dsummed, s, weight.contiguous(), stats, ds, partial),
            *(dy.stride(0), 0 if dsummed is None else dsummed.stride(0), s.stride(0)),
            *(n_rows, weight_offset),
            WIDTH=width,
            BLOCK=plan.block,
            TILE_ROWS=plan.tile_rows,
            CENTERED=centered,
            HAS_DSUMMED=dsummed is not None,
            WEIGHT_GRAD=weight_grad,
            BIAS_GRAD=bias_grad,
            NUM_STAGES=plan.num_stages,
            num_warps=plan.num_warps,
        )
    return ds, column_sum(partial, weight.dtype).view(shape)


def _rows(x: Tensor) -> Tensor:
    """(N, D), copied where offsets inside a tile of up to 256 rows would not fit 32 bits."""
    x = as_rows(x)
    return x if x.stride(0) < 1 << 22 else x.contiguous()


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS[90]
    return _cuda_multiprocessors(
        torch.cuda.current_device() if device.index is None else device.index
    )


@cache
def _cuda_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _backward_fake(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    stats: Tensor,
    weight_offset: float,
    centered: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight_grad + bias_grad, len(weight))


_forward, _residual_forward, _forward_op, _residual_op = define_forward("triton", _launch_forward)
_backward_op = define(
    "triton_norm_backward(Tensor dy, Tensor? dsummed, Tensor s, Tensor weight, Tensor stats, "
    f"{OPTIONS}, bool weight_grad, bool bias_grad) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# A narrow head, GPT-2's width, the widest row of each number of warps.
_WIDTHS = (64, 768, 2048, 4096, 8192)
_ROWS = (64, 1 << 20)
_DTYPES = (torch.float32, torch.bfloat16)


def machine_code_cases(arch: int) -> Iterator[Case]:
    """Every tile and warp count of the plans, with all inputs and outputs, the heaviest variant.

    float16 differs from bfloat16 only in conversions; weights are float32, the wider choice.
    """
    count, seen = MULTIPROCESSORS[arch], set()
    for dtype, width, rows, centered in product(_DTYPES, _WIDTHS, _ROWS, (False, True)):
        kind = TRITON_TYPES[dtype]
        forward = forward_plan(rows, width, count)
        backward = backward_plan(rows, width, dtype.itemsize, count, True)
        for case in (
            _forward_case(arch, kind, width, forward, centered),
            _backward_case(arch, kind, width, backward, centered),
        ):
            # Wide rows have one plan for few rows and for many.
            if (case.name, case.num_warps) not in seen:
                seen.add((case.name, case.num_warps))
                yield case


def _forward_case(arch: int, kind: str, width: int, plan: NormPlan, centered: bool) -> Case:
    rows = ("p_x", "p_residual", "p_y", "p_summed")
    floats = ("p_weight", "p_bias", "p_stats")
    return Case(
        kernel=_norm_forward_kernel,
        arch=arch,
        signature=dict.fromkeys(rows, f"*{kind}")
        | dict.fromkeys(floats, "*fp32")
        | dict.fromkeys(("s_x", "s_residual", "rows"), "i32")
        | dict.fromkeys(("eps", "weight_offset"), "fp32"),
        constants=_tile_constants(width, plan, centered) | {"HAS_RESIDUAL": True}
        | {"HAS_BIAS": centered},
        num_warps=plan.num_warps,
        aligned=("s_x", "s_residual"),
        expects=(VECTOR_LOAD, VECTOR_STORE),
    )  # fmt: skip


def _backward_case(arch: int, kind: str, width: int, plan: NormPlan, centered: bool) -> Case:
    rows, strides = ("p_dy", "p_dsummed", "p_s", "p_dx"), ("s_dy", "s_dsummed", "s_s")
    return Case(
        kernel=_norm_backward_kernel,
        arch=arch,
        signature=dict.fromkeys(rows, f"*{kind}")
        | dict.fromkeys(("p_weight", "p_stats", "p_partial"), "*fp32")
        | dict.fromkeys((*strides, "rows"), "i32")
        | {"weight_offset": "fp32"},
        constants=_tile_constants(width, plan, centered)
        | {"HAS_DSUMMED": True, "WEIGHT_GRAD": True, "BIAS_GRAD": centered}
        | {"NUM_STAGES": plan.num_stages},
        num_warps=plan.num_warps,
        aligned=strides,
        expects=(r"LDGSTS\.E\S*\.128", VECTOR_STORE),
    )


def _tile_constants(width: int, plan: NormPlan, centered: bool) -> dict[str, Any]:
    return {
        "WIDTH": width,
        "BLOCK": plan.block,
        "TILE_ROWS": plan.tile_rows,
        "CENTERED": centered,
    }
