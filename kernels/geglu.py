"""GEGLU: gelu(gate) · up, exact or tanh-approximated GELU (Shazeer, GLU Variants, 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .bias_gelu import gelu_reference
from .cpu import half_on_cpu
from .gelu_cpu import tanh_gelu


def geglu_reference(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    return gelu_reference(gate, approximate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str = "none", impl: str | None = None) -> Tensor:
    """gelu(gate) · up.

    Args:
        gate, up: (..., D), one shape and dtype.
        approximate: "none" (erf) or "tanh".
        impl: None, "reference", "torch", "triton" or "cuda".

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    checks.gated("gate", gate, "up", up)
    checks.choice("approximate", approximate, ("none", "tanh"))
    return dispatch.select("geglu", impl, gate, up, approximate)(gate, up, approximate)


def _geglu_torch(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh" and half_on_cpu(gate):
        return tanh_gelu(gate, None) * up
    return F.gelu(gate, approximate=approximate) * up


dispatch.register("geglu", "reference", geglu_reference)
dispatch.register("geglu", "torch", _geglu_torch)
