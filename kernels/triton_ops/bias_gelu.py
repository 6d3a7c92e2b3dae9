"""gelu(x + bias), exact or tanh, each direction in one pass over memory.

    forward   h = x + b,  out = gelu(h)
    backward  dx = dout · gelu'(h),   db = Σ_rows dx, in float32 before dx is rounded

The backward pass recomputes h. Each of its programs walks a range of rows of a few columns and
keeps their part of db in registers: one partial row per range, summed in a fixed order.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from .activations import GELU_ERF, GELU_TANH, activate, activate_with_slope, code
from .launch import architecture, as_rows, ceil_div, on_device
from .machine_code import TRITON_TYPES, VECTOR_LOAD, VECTOR_STORE, Case
from .reduction import column_sum, rows_per_program
from .tiles import contiguous_rows, is_full, load_tile, row_block, store_tile, tile_of


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias): x (..., D), bias (D,) of any supported dtype or None."""
    return _BiasGelu.apply(x, bias, code("gelu", approximate))


@dataclass(frozen=True)
class Plan:
    """Tiles of ``block_rows`` x ``block_columns``; a program walks ``walk`` rows of one block."""

    rows: int
    columns: int
    block_rows: int
    block_columns: int
    walk: int
    num_warps: int = 4

    @property
    def ranges(self) -> int:
        return ceil_div(self.rows, self.walk)

    @property
    def column_blocks(self) -> int:
        return ceil_div(self.columns, self.block_columns)


def plan_forward(rows: int, columns: int, itemsize: int, flat: bool) -> Plan:
    """One tile per program: 16 bytes per thread across, four rows to share the bias."""
    if flat:
        return Plan(1, rows * columns, 1, 4096 // itemsize, 1)
    block_columns = row_block(columns, itemsize)
    block_rows = 8192 // itemsize // block_columns
    return Plan(rows, columns, block_rows, block_columns, block_rows)


def plan_backward(rows: int, columns: int, itemsize: int, flat: bool, arch: int) -> Plan:
    """As the forward pass with half the rows, for registers; programs fill the GPU once."""
    if flat:
        return plan_forward(rows, columns, itemsize, True)
    block_columns = row_block(columns, itemsize)
    block_rows = 4096 // itemsize // block_columns
    walk = rows_per_program(rows, ceil_div(columns, block_columns), block_rows, arch)
    return Plan(rows, columns, block_rows, block_columns, walk)


@triton.jit
def _bias_gelu_forward_kernel(
    x, bias, out, stride_x, stride_out, n_rows, n_columns,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = gelu(x + bias) over (n_rows, n_columns), one tile per program."""
    tile = tile_of(tl.program_id(0), n_rows, n_columns, BLOCK_R, BLOCK_C)
    b = _load_bias(bias, tile, HAS_BIAS, BLOCK_C)
    if is_full(tile, BLOCK_R, BLOCK_C):
        h = load_tile(x, stride_x, tile, BLOCK_R, BLOCK_C, False) + b
        store_tile(out, stride_out, tile, activate(h, ACTIVATION), BLOCK_R, BLOCK_C, False)
    else:
        h = load_tile(x, stride_x, tile, BLOCK_R, BLOCK_C, True) + b
        store_tile(out, stride_out, tile, activate(h, ACTIVATION), BLOCK_R, BLOCK_C, True)


@triton.jit
def _bias_gelu_backward_kernel(
    dout, x, bias, dx, partial, stride_dout, stride_x, stride_dx, n_rows, n_columns, walk,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dout · gelu'(x + bias), and partial[range] = Σ dx over the range's rows.

    partial (ranges, n_columns) float32; a program walks ``walk`` rows of BLOCK_C columns.
    """
    blocks = (n_columns - 1) // BLOCK_C + 1
    i_range = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C
    first = i_range * walk
    b = _load_bias(bias, (first, column, n_rows, n_columns - column), HAS_BIAS, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, walk, BLOCK_R):
        row = first + start
        tile = (row, column, n_rows - row, n_columns - column)
        if is_full(tile, BLOCK_R, BLOCK_C):
            total += _backward_tile(
                dout, x, dx, stride_dout, stride_x, stride_dx, b, tile,
                ACTIVATION, BLOCK_R, BLOCK_C, False,
            )  # fmt: skip
        else:
            total += _backward_tile(
                dout, x, dx, stride_dout, stride_x, stride_dx, b, tile,
                ACTIVATION, BLOCK_R, BLOCK_C, True,
            )  # fmt: skip
    if HAS_BIAS:
        o_column = tl.arange(0, BLOCK_C)
        p_partial = partial + i_range * n_columns + column + o_column
        tl.store(p_partial, tl.sum(total, axis=0), mask=o_column < n_columns - column)


@triton.jit
def _backward_tile(
    dout, x, dx, stride_dout, stride_x, stride_dx, b, tile,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes a tile of dx and returns it; dout is 0 beyond the edges, so dx is too."""
    h = load_tile(x, stride_x, tile, BLOCK_R, BLOCK_C, MASKED) + b
    dy = load_tile(dout, stride_dout, tile, BLOCK_R, BLOCK_C, MASKED)
    _, slope = activate_with_slope(h, ACTIVATION)
    dh = dy * slope
    store_tile(dx, stride_dx, tile, dh, BLOCK_R, BLOCK_C, MASKED)
    return dh


@triton.jit
def _load_bias(bias, tile, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):
    if HAS_BIAS:
        o_column = tl.arange(0, BLOCK_C)
        b = tl.load(bias + tile[1] + o_column, mask=o_column < tile[3], other=0.0)
        return b.to(tl.float32)[None, :]
    else:
        return tl.zeros((1, BLOCK_C), tl.float32)


def _forward(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    rows = as_rows(x)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    flat = bias is None and contiguous_rows(rows)
    plan = plan_forward(rows.shape[0], rows.shape[1], rows.element_size(), flat)
    if rows.numel():
        with on_device(rows):
            _bias_gelu_forward_kernel[(plan.ranges * plan.column_blocks,)](
                *(rows, bias if bias is None else bias.contiguous(), out),
                *(rows.stride(0), out.stride(0), plan.rows, plan.columns),
                HAS_BIAS=bias is not None,
                ACTIVATION=activation,
                BLOCK_R=plan.block_rows,
                BLOCK_C=plan.block_columns,
                num_warps=plan.num_warps,
            )
    return out.view(x.shape)


def _backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    dy, rows = as_rows(dout), as_rows(x)
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if not rows.numel():
        return dx.view(x.shape), x.new_zeros(0) if bias is None else torch.zeros_like(bias)
    flat = bias is None and contiguous_rows(dy, rows)
    n_rows, n_columns = rows.shape
    arch = architecture(x.device)
    plan = plan_backward(n_rows, n_columns, rows.element_size(), flat, arch)
    partial = None
    if bias is not None:
        partial = torch.empty(plan.ranges, plan.columns, dtype=torch.float32, device=x.device)
    with on_device(rows):
        _bias_gelu_backward_kernel[(plan.ranges * plan.column_blocks,)](
            *(dy, rows, bias if bias is None else bias.contiguous(), dx, partial),
            *(dy.stride(0), rows.stride(0), dx.stride(0), plan.rows, plan.columns, plan.walk),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            BLOCK_R=plan.block_rows,
            BLOCK_C=plan.block_columns,
            num_warps=plan.num_warps,
        )
    if bias is None or partial is None:
        return dx.view(x.shape), x.new_zeros(0)
    return dx.view(x.shape), column_sum(partial, bias.dtype)


def _forward_fake(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), dbias


_forward_op = define(
    "triton_bias_gelu_forward(Tensor x, Tensor? bias, int activation) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "triton_bias_gelu_backward(Tensor dout, Tensor x, Tensor? bias, int activation)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return _forward_op(x, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        dx, dbias = _backward_op(dout, x, bias, ctx.activation)
        return dx, None if bias is None else dbias, None


def machine_code_cases(arch: int) -> Iterator[Case]:
    """Both directions; with a bias, of x's dtype or float32, and without; gapless or rows apart."""
    for dtype, kind in TRITON_TYPES.items():
        for activation in (GELU_ERF.value, GELU_TANH.value):
            yield from _cases(arch, dtype.itemsize, kind, None, activation, 4096, True)
            for columns in (1, 4096):
                for bias in dict.fromkeys((kind, "fp32", None)):
                    yield from _cases(arch, dtype.itemsize, kind, bias, activation, columns, False)


def _cases(
    arch: int, itemsize: int, kind: str, bias: str | None, activation: int, columns: int, flat: bool
) -> Iterator[Case]:
    shape = (4096, columns, itemsize, flat)
    directions = (
        (_bias_gelu_forward_kernel, ("x", "out"), (), plan_forward(*shape)),
        (
            _bias_gelu_backward_kernel,
            ("dout", "x", "dx"),
            ("partial",),
            plan_backward(*shape, arch),
        ),
    )
    types = {"bias": f"*{bias}", "partial": "*fp32"} if bias else {}
    for kernel, pointers, extra, plan in directions:
        strides = tuple(f"stride_{name}" for name in pointers)
        yield Case(
            kernel=kernel,
            arch=arch,
            signature=dict.fromkeys(pointers, f"*{kind}")
            | types
            | dict.fromkeys((*strides, "n_rows", "n_columns", "walk"), "i32"),
            constants={
                "HAS_BIAS": bias is not None,
                "ACTIVATION": activation,
                "BLOCK_R": plan.block_rows,
                "BLOCK_C": plan.block_columns,
            }
            | ({} if bias else {name: None for name in ("bias", *extra)}),
            num_warps=plan.num_warps,
            aligned=(*strides, "n_columns"),
            expects=(VECTOR_LOAD, VECTOR_STORE),
        )
