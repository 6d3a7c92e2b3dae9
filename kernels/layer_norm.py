"""LayerNorm over the last dimension: (x - mean) / sqrt(var + eps) · weight + bias.

Statistics are float32 for half-precision inputs; the output has x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .cpu import eager_on_cpu
from .norm_cpu import layer_norm_cpu


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    summed = x if residual is None else x + residual
    high = summed.to(torch.promote_types(summed.dtype, torch.float32))
    mean = high.mean(-1, keepdim=True)
    variance = (high - mean).square().mean(-1, keepdim=True)
    out = (high - mean) * torch.rsqrt(variance + eps) * weight.to(high.dtype)
    if bias is not None:
        out = out + bias.to(high.dtype)
    out = out.to(summed.dtype)
    return out if residual is None else (out, summed)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Any:
    """LayerNorm of x, or of x + residual.

    Args:
        x: (..., D).
        weight: (D,).
        bias: (D,) or None.
        eps: added to the variance.
        residual: (..., D), added to x first.
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (..., D); with residual the pair (normed, x + residual).

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    checks.norm(x, weight, bias, residual)
    run = dispatch.select("layer_norm", impl, x, weight, bias, eps, residual)
    return run(x, weight, bias, eps, residual)


def _layer_norm_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    summed = x if residual is None else x + residual
    if eager_on_cpu(summed):
        out = layer_norm_cpu(summed, weight, bias, eps)
    else:
        out = F.layer_norm(summed, summed.shape[-1:], weight, bias, eps)
    return out if residual is None else (out, summed)


dispatch.register("layer_norm", "reference", layer_norm_reference)
dispatch.register("layer_norm", "torch", _layer_norm_torch)
