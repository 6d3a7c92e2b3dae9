"""lora_linear and quantized_linear in PyTorch's matrix products, the weight dequantised in pieces.

forward   s = x Aᵀ (M, r), kept;  y = bias + scaling · s Bᵀ + x Wᵀ in one pass over W
backward  ds = scaling · dy B,  dx = ds A + dy W,  dA = dsᵀ x,  dB = scaling · dyᵀ s,
          dW = dyᵀ x and dbias = Σ dy where they are wanted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .autocast import to_autocast_dtype
from .cpu import as_rows
from .lora_linear import Weight
from .low_rank_matmul import MATMULS, parts_of
from .quantized_tensor import QuantizedTensor

N_PARTS = 5


@dataclass(frozen=True)
class Frozen:
    """What describes a weight beside its tensors."""

    format: str
    shape: list[int]
    engine: str = "torch"  # a key of MATMULS


def forward_product(
    x: Tensor,
    parts: Sequence[Any],
    frozen: Frozen,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(y (M, N), s (M, r) or None) of x (M, K)."""
    s = right = None
    if a is not None and b is not None:
        s, right = torch.mm(x, a.to(x.dtype).t()), b.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    shape = (frozen.format, frozen.shape, False)
    return MATMULS[frozen.engine](x, *parts, *shape, s, right, scaling, bias), s


@dataclass
class Gradients:
    """Of one linear layer; None where it is not wanted."""

    x: Tensor | None = None
    weight: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    x: bool
    weight: bool
    a: bool
    b: bool
    bias: bool


def backward_product(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    parts: Sequence[Any],
    frozen: Frozen,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    needs: Needs,
) -> Gradients:
    """Gradients from dy (M, N): those of x and weight of dy's dtype, of the bias at least float32.

    x may be None where only its own gradient is wanted, and s where that of b is not.
    """
    result = Gradients()
    ds = low = None
    if a is not None and b is not None:
        if needs.x or needs.a:
            empty = dy.new_empty(dy.shape[0], a.shape[0])
            ds = torch.addmm(empty, dy, b.to(dy.dtype), beta=0, alpha=scaling)
            low = a.to(dy.dtype)
        if needs.a:
            assert ds is not None
            assert x is not None
            result.a = torch.mm(ds.t(), x).to(a.dtype)
        if needs.b:
            assert s is not None
            empty = dy.new_empty(b.shape)
            result.b = torch.addmm(empty, dy.t(), s, beta=0, alpha=scaling).to(b.dtype)
    if needs.x:
        result.x = MATMULS[frozen.engine](
            dy, *parts, frozen.format, frozen.shape, True, ds, low, 1.0, None
        )
    if needs.weight:
        assert x is not None
        result.weight = torch.mm(dy.t(), x)
    if needs.bias:
        result.bias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return result


def lora_linear_torch(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    return lora_linear_with("torch", x, weight, lora_a, lora_b, scaling=scaling, bias=bias)


def lora_linear_with(
    engine: str,
    x: Tensor,
    weight: Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """lora_linear, or without an adapter quantized_linear, with the products of ``engine``."""
    x, parts, frozen = prepare(engine, x, weight)
    lead = x.shape[:-1]
    out = _LoraLinear.apply(as_rows(x), lora_a, lora_b, bias, scaling, frozen, *parts)
    return out.view(*lead, out.shape[-1])


def prepare(engine: str, x: Tensor, *weights: Weight) -> tuple[Any, ...]:
    """(x, parts, frozen, parts, frozen, ...), in autocast's dtype where it is on."""
    x = to_autocast_dtype(x.device.type, x)[0]
    prepared: list[Any] = [x]
    for weight in weights:
        if isinstance(weight, Tensor):
            weight = to_autocast_dtype(x.device.type, weight)[0]
        parts, format, shape = parts_of(weight)
        prepared += [parts, Frozen(format, shape, engine)]
    return tuple(prepared)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        scaling: float,
        frozen: Frozen,
        *parts: Tensor | None,
    ) -> Tensor:
        y, s = forward_product(x, parts, frozen, a, b, scaling, bias)
        ctx.save_for_backward(x, s, a, b, *parts)
        ctx.options = (scaling, frozen, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, s, a, b, *parts = ctx.saved_tensors
        scaling, frozen, bias_dtype = ctx.options
        need = ctx.needs_input_grad
        needs = Needs(need[0], need[6], need[1], need[2], need[3])
        grads = backward_product(dy, x, s, parts, frozen, a, b, scaling, needs)
        dbias = None if grads.bias is None else grads.bias.to(bias_dtype)
        rest = (None,) * (N_PARTS - 1)
        return grads.x, grads.a, grads.b, dbias, None, None, grads.weight, *rest


def quantized_linear_torch(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None
) -> Tensor:
    return lora_linear_with("torch", x, weight, None, None, bias=bias)


dispatch.register("lora_linear", "torch", lora_linear_torch)
dispatch.register("quantized_linear", "torch", quantized_linear_torch)
