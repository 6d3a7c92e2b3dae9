"""A linear layer over a quantised weight: y = x Wᵀ + bias, W as its values in x's dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .lora_linear import check_linear, dense
from .quantized_tensor import QuantizedTensor


def quantized_linear_reference(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None
) -> Tensor:
    return F.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def quantized_linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """``F.linear(x, weight.dequantize(x.dtype), bias)`` without keeping the dequantised weight.

    Differentiable in x and bias; :func:`lora_linear` adds an adapter.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (..., N) of x's dtype; under autocast of its dtype.

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    if not isinstance(weight, QuantizedTensor):
        checks.fail("weight", checks.describe(weight), "a QuantizedTensor (N, K)")
    check_linear(x, "weight", weight, bias)
    return dispatch.select("quantized_linear", impl, x, weight, bias)(x, weight, bias)


dispatch.register("quantized_linear", "reference", quantized_linear_reference)
