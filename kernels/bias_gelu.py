"""GELU of a biased input: gelu(x + bias), exact (erf) or the tanh approximation of GPT-2.

With h = x + bias:
    "tanh"  0.5 h (1 + tanh(sqrt(2/π) (h + 0.044715 h³)))
    "none"  0.5 h (1 + erf(h / sqrt 2))
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .cpu import half_on_cpu
from .gelu_cpu import tanh_gelu


def bias_gelu_reference(x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
    h = x if bias is None else x + bias.to(x.dtype)
    return gelu_reference(h, approximate)


def gelu_reference(h: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


def bias_gelu(
    x: Tensor, bias: Tensor | None, approximate: str = "tanh", impl: str | None = None
) -> Tensor:
    """gelu(x + bias), in x's dtype.

    Args:
        x: (..., D).
        bias: (D,), or None where the linear layer has already added it (oneDNN does so for free).
        approximate: "tanh" or "none".
        impl: None, "reference", "torch", "triton" or "cuda".

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    checks.floating("x", x, "... D")
    checks.choice("approximate", approximate, ("tanh", "none"))
    if bias is not None:
        checks.floating("bias", bias, "D")
        checks.on_device("bias", bias, "x", x)
        checks.shape("bias", bias, x.shape[-1:], "D")
    return dispatch.select("bias_gelu", impl, x, bias, approximate)(x, bias, approximate)


def _bias_gelu_torch(x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
    if approximate == "tanh" and half_on_cpu(x):
        return tanh_gelu(x, bias)
    h = x if bias is None else x + bias.to(x.dtype)
    return F.gelu(h, approximate=approximate)


dispatch.register("bias_gelu", "reference", bias_gelu_reference)
dispatch.register("bias_gelu", "torch", _bias_gelu_torch)
