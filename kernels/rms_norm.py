"""RMSNorm over the last dimension: x · rsqrt(mean(x²) + eps) · (weight_offset + weight).

Zhang & Sennrich, 2019. Statistics are float32 for half-precision inputs; the output has x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .cpu import eager_on_cpu
from .norm_cpu import rms_norm_cpu


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> Any:
    summed = x if residual is None else x + residual
    high = summed.to(torch.promote_types(summed.dtype, torch.float32))
    normed = high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)
    out = (normed * (weight.to(high.dtype) + weight_offset)).to(summed.dtype)
    return out if residual is None else (out, summed)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    impl: str | None = None,
    *,
    weight_offset: float = 0.0,
) -> Any:
    """RMSNorm of x, or of x + residual.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        residual: (..., D), added to x first.
        impl: None, "reference", "torch", "triton" or "cuda".
        weight_offset: 1.0 for models that store weight - 1.

    Returns:
        (..., D); with residual the pair (normed, x + residual).

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    checks.norm(x, weight, None, residual)
    run = dispatch.select("rms_norm", impl, x, weight, eps, residual, weight_offset=weight_offset)
    return run(x, weight, eps, residual, weight_offset=weight_offset)


def _rms_norm_torch(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> Any:
    summed = x if residual is None else x + residual
    if eager_on_cpu(summed):
        out = rms_norm_cpu(summed, weight, eps, weight_offset)
    elif torch.compiler.is_compiling() or weight_offset or weight.dtype != summed.dtype:
        out = rms_norm_reference(summed, weight, eps, weight_offset=weight_offset)
    else:
        out = F.rms_norm(summed, summed.shape[-1:], weight, eps)
    return out if residual is None else (out, summed)


dispatch.register("rms_norm", "reference", rms_norm_reference)
dispatch.register("rms_norm", "torch", _rms_norm_torch)
