"""Gated units, act(gate) · up: SwiGLU and GEGLU, each direction in one pass over memory.

    forward   out = act(g) · u
    backward  dg = dout · u · act'(g),   du = dout · act(g)

The backward pass recomputes the activation from the saved inputs. All arithmetic is float32, each
result is rounded once. Rows that are apart (halves of a fused projection) are read in place.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from .activations import GELU_ERF, GELU_TANH, SILU, activate, activate_with_slope, code
from .launch import as_rows, on_device
from .machine_code import TRITON_TYPES, VECTOR_LOAD, VECTOR_STORE, Case
from .tiles import (
    NUM_WARPS,
    contiguous_rows,
    is_full,
    load_tile,
    plan_tiles,
    store_tile,
    tile_configurations,
    tile_of,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both (..., D)."""
    return _Gated.apply(gate, up, code("silu"))


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) · up, both (..., D)."""
    return _Gated.apply(gate, up, code("gelu", approximate))


@triton.jit
def _gated_forward_kernel(
    gate, up, out, stride_gate, stride_up, stride_out, n_rows, n_columns,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(gate) · up over (n_rows, n_columns), one tile per program."""
    tile = tile_of(tl.program_id(0), n_rows, n_columns, BLOCK_R, BLOCK_C)
    if is_full(tile, BLOCK_R, BLOCK_C):
        _forward_tile(
            gate, up, out, stride_gate, stride_up, stride_out, tile,
            ACTIVATION, BLOCK_R, BLOCK_C, False,
        )  # fmt: skip
    else:
        _forward_tile(
            gate, up, out, stride_gate, stride_up, stride_out, tile,
            ACTIVATION, BLOCK_R, BLOCK_C, True,
        )  # fmt: skip


@triton.jit
def _forward_tile(
    gate, up, out, stride_gate, stride_up, stride_out, tile,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = load_tile(gate, stride_gate, tile, BLOCK_R, BLOCK_C, MASKED)
    u = load_tile(up, stride_up, tile, BLOCK_R, BLOCK_C, MASKED)
    store_tile(out, stride_out, tile, activate(g, ACTIVATION) * u, BLOCK_R, BLOCK_C, MASKED)


@triton.jit
def _gated_backward_kernel(
    dout, gate, up, dgate, dup, stride_dout, stride_gate, stride_up, stride_dgate, stride_dup,
    n_rows, n_columns,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dgate = dout · up · act'(gate), dup = dout · act(gate), one tile per program."""
    tile = tile_of(tl.program_id(0), n_rows, n_columns, BLOCK_R, BLOCK_C)
    if is_full(tile, BLOCK_R, BLOCK_C):
        _backward_tile(
            dout, gate, up, dgate, dup,
            stride_dout, stride_gate, stride_up, stride_dgate, stride_dup, tile,
            ACTIVATION, BLOCK_R, BLOCK_C, False,
        )  # fmt: skip
    else:
        _backward_tile(
            dout, gate, up, dgate, dup,
            stride_dout, stride_gate, stride_up, stride_dgate, stride_dup, tile,
            ACTIVATION, BLOCK_R, BLOCK_C, True,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    dout, gate, up, dgate, dup,
    stride_dout, stride_gate, stride_up, stride_dgate, stride_dup, tile,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = load_tile(gate, stride_gate, tile, BLOCK_R, BLOCK_C, MASKED)
    u = load_tile(up, stride_up, tile, BLOCK_R, BLOCK_C, MASKED)
    dy = load_tile(dout, stride_dout, tile, BLOCK_R, BLOCK_C, MASKED)
    value, slope = activate_with_slope(g, ACTIVATION)
    store_tile(dgate, stride_dgate, tile, dy * u * slope, BLOCK_R, BLOCK_C, MASKED)
    store_tile(dup, stride_dup, tile, dy * value, BLOCK_R, BLOCK_C, MASKED)


def _forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    g, u = as_rows(gate), as_rows(up)
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    plan = plan_tiles(g.shape[0], g.shape[1], g.element_size(), contiguous_rows(g, u))
    if g.numel():
        with on_device(g):
            _gated_forward_kernel[(plan.programs,)](
                *(g, u, out, g.stride(0), u.stride(0), out.stride(0)),
                n_rows=plan.rows,
                n_columns=plan.columns,
                ACTIVATION=activation,
                **plan.constants,
                num_warps=plan.num_warps,
            )
    return out.view(gate.shape)


def _backward(dout: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    dy, g, u = as_rows(dout), as_rows(gate), as_rows(up)
    dg, du = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(2))
    plan = plan_tiles(g.shape[0], g.shape[1], g.element_size(), contiguous_rows(dy, g, u))
    if g.numel():
        with on_device(g):
            _gated_backward_kernel[(plan.programs,)](
                *(dy, g, u, dg, du),
                *(t.stride(0) for t in (dy, g, u, dg, du)),
                n_rows=plan.rows,
                n_columns=plan.columns,
                ACTIVATION=activation,
                **plan.constants,
                num_warps=plan.num_warps,
            )
    return dg.view(gate.shape), du.view(gate.shape)


def _forward_fake(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(
    dout: Tensor, gate: Tensor, up: Tensor, activation: int
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_forward_op = define(
    "triton_gated_forward(Tensor gate, Tensor up, int activation) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "triton_gated_backward(Tensor dout, Tensor gate, Tensor up, int activation)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward_op(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*_backward_op(dout, *ctx.saved_tensors, ctx.activation), None)


def machine_code_cases(arch: int) -> Iterator[Case]:
    """Both kernels, each activation and dtype, gapless and wide rows."""
    kernels = {
        _gated_forward_kernel: ("gate", "up", "out"),
        _gated_backward_kernel: ("dout", "gate", "up", "dgate", "dup"),
    }
    for dtype, kind in TRITON_TYPES.items():
        for tiles in tile_configurations(dtype):
            for activation in (SILU, GELU_ERF, GELU_TANH):
                for kernel, pointers in kernels.items():
                    strides = tuple(f"stride_{name}" for name in pointers)
                    yield Case(
                        kernel=kernel,
                        arch=arch,
                        signature=dict.fromkeys(pointers, f"*{kind}")
                        | dict.fromkeys((*strides, "n_rows", "n_columns"), "i32"),
                        constants={"ACTIVATION": activation.value, **tiles},
                        num_warps=NUM_WARPS,
                        aligned=strides,
                        expects=(VECTOR_LOAD, VECTOR_STORE),
                    )
