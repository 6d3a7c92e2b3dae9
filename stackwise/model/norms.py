"""RMSNorm and LayerNorm as drop-in subclasses of PyTorch's own; state dicts are unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stackwise import kernels


class StackwiseRMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019).

    Drop-in for ``torch.nn.RMSNorm`` with a one-dimensional ``normalized_shape``; ValueError for
    another. ``forward(x, residual)`` normalises x + residual and returns (normed, x + residual).
    """

    def __init__(self, normalized_shape: int, eps: float | None = 1e-6, **kwargs: Any) -> None:
        super().__init__(normalized_shape, eps, **kwargs)
        _check_one_dimension(self.normalized_shape)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight = self.weight
        if weight is None:
            weight = x.new_ones(self.normalized_shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return kernels.rms_norm(x, weight, eps, residual=residual)


class StackwiseLayerNorm(nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al., 2016).

    Drop-in for ``torch.nn.LayerNorm`` with a one-dimensional ``normalized_shape``; ValueError for
    another. ``forward(x, residual)`` normalises x + residual and returns (normed, x + residual).
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(normalized_shape, eps, **kwargs)
        _check_one_dimension(self.normalized_shape)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight = self.weight
        if weight is None:
            weight = x.new_ones(self.normalized_shape)
        return kernels.layer_norm(x, weight, self.bias, self.eps, residual=residual)


def build_norm(kind: str, width: int, eps: float) -> StackwiseRMSNorm | StackwiseLayerNorm:
    """The norm that ``ModelConfig.norm`` names."""
    return StackwiseRMSNorm(width, eps) if kind == "rms_norm" else StackwiseLayerNorm(width, eps)


def _check_one_dimension(shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise ValueError(f"normalized_shape: got {tuple(shape)}; accepted: one dimension")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer computes in for input ``x``: autocast's where it is on.

    Casting once ahead of several layers spares each of them its own cast.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
