"""SwiGLU: silu(gate) · up with silu(g) = g / (1 + exp(-g)) (Shazeer, GLU Variants, 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .cpu import eager_on_cpu


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def swiglu(gate: Tensor, up: Tensor, impl: str | None = None) -> Tensor:
    """silu(gate) · up.

    Args:
        gate, up: (..., D), one shape and dtype.
        impl: None, "reference", "torch", "triton" or "cuda".

    Raises:
        ValueError: shapes, dtypes or devices differ, or ``impl`` does not exist.
    """
    checks.gated("gate", gate, "up", up)
    return dispatch.select("swiglu", impl, gate, up)(gate, up)


class _Swiglu(torch.autograd.Function):
    """Keeps gate and up only, and works in place where autograd would allocate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(grad)
        dgate = grad * up
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, dup


def _swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    if eager_on_cpu(gate) and torch.is_grad_enabled():
        return _Swiglu.apply(gate, up)
    return F.silu(gate) * up


dispatch.register("swiglu", "reference", swiglu_reference)
dispatch.register("swiglu", "torch", _swiglu_torch)
