"""A linear layer over a frozen, quantised or plain weight with a low-rank adapter (LoRA).

    y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias

M rows of x, K inputs, N outputs, r rank: x (..., K), W (N, K), A (r, K), B (N, r). A quantised W is
taken as its dequantised values rounded to x's dtype, and has no gradient. (Hu et al., "LoRA", 2021;
Dettmers et al., "QLoRA", 2023.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .quantized_tensor import QuantizedTensor

Weight = Tensor | QuantizedTensor


def lora_linear_reference(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    out = F.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    low = F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))
    return out + scaling * low


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias (formula: top of this file).

    Differentiable in x, lora_a, lora_b, bias, and in a weight that is a Tensor. Neither a
    dequantised weight nor anything else of size N x K is kept for backward.

    Args:
        x: (..., K).
        weight: (N, K), a Tensor of x's dtype or a QuantizedTensor.
        lora_a: (r, K), any floating dtype; computes in x's.
        lora_b: (N, r), likewise.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: (N,).
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (..., N) of x's dtype; under autocast of its dtype.

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    check_linear(x, "weight", weight, bias)
    check_lora("lora_a", lora_a, "lora_b", lora_b, x, tuple(weight.shape))
    tensors = (x, weight, lora_a, lora_b)
    run = dispatch.select("lora_linear", impl, *tensors, scaling=scaling, bias=bias)
    return run(*tensors, scaling=scaling, bias=bias)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight's values in ``dtype``; a Tensor as it is."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight


def check_linear(x: Tensor, name: str, weight: Weight, bias: Tensor | None) -> None:
    """x (..., K), weight (N, K) and bias (N,) fit."""
    checks.floating("x", x, "... K")
    if not isinstance(weight, Tensor | QuantizedTensor) or weight.dim() != 2:
        checks.fail(name, checks.describe(weight), "a Tensor or a QuantizedTensor (N, K)")
    if weight.shape[1] != x.shape[-1]:
        checks.fail(name, f"shape {tuple(weight.shape)}", f"(N, K) with K = {x.shape[-1]}, as in x")
    if weight.device != x.device:
        checks.fail(name, f"a weight on {weight.device}", f"the device of x: {x.device}")
    if isinstance(weight, Tensor) and not torch.is_autocast_enabled(x.device.type):
        checks.same(name, weight, "x", x)
    if bias is not None:
        checks.floating("bias", bias, "N")
        checks.shape("bias", bias, weight.shape[:1], "N")
        checks.on_device("bias", bias, "x", x)


def check_lora(
    a_name: str, a: Tensor, b_name: str, b: Tensor, x: Tensor, shape: tuple[int, ...]
) -> None:
    """a (r, K) and b (N, r) fit a weight of this (N, K)."""
    checks.floating(a_name, a, "r K")
    checks.floating(b_name, b, "N r")
    checks.shape(a_name, a, (a.shape[0], shape[1]), "r K")
    checks.shape(b_name, b, (shape[0], a.shape[0]), "N r")
    checks.on_device(a_name, a, "x", x)
    checks.on_device(b_name, b, "x", x)


dispatch.register("lora_linear", "reference", lora_linear_reference)
