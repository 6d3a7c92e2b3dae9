"""What the norms in Triton and in CUDA C++ share: buffers and operations of the forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import define

OPTIONS = "float weight_offset, bool centered"
_PARAMETERS = f"Tensor weight, Tensor? bias, float eps, {OPTIONS}"


class Forward(NamedTuple):
    """Implementations without and with a residual, and their ``torch.library`` operations."""

    plain: Callable[..., tuple[Tensor, Tensor]]
    residual: Callable[..., tuple[Tensor, Tensor, Tensor]]
    plain_op: Callable[..., Any]
    residual_op: Callable[..., Any]


def define_forward(prefix: str, launch: Callable[..., None]) -> Forward:
    """``<prefix>_norm_forward`` and ``<prefix>_norm_residual_forward``, which allocate.

    ``launch(x, residual, weight, bias, y, summed, stats, eps, weight_offset, centered)`` fills y,
    summed (None without a residual) and stats.
    """

    def plain(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        centered: bool,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        stats = new_stats(x, centered)
        launch(x, None, weight, bias, y, None, stats, eps, weight_offset, centered)
        return y, stats

    def residual_forward(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        centered: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        y, summed = (
            torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
            for _ in range(2)
        )
        stats = new_stats(x, centered)
        launch(x, residual, weight, bias, y, summed, stats, eps, weight_offset, centered)
        return y, summed, stats

    schema = f"{prefix}_norm_forward(Tensor x, {_PARAMETERS}) -> (Tensor, Tensor)"
    residual_schema = (
        f"{prefix}_norm_residual_forward(Tensor x, Tensor residual, {_PARAMETERS})"
        " -> (Tensor, Tensor, Tensor)"
    )
    return Forward(
        plain,
        residual_forward,
        define(schema, plain, _plain_fake),
        define(residual_schema, residual_forward, _residual_fake),
    )


def new_stats(x: Tensor, centered: bool) -> Tensor:
    """rstd, and for a centered norm the mean, of every row: (N) or (2, N) float32."""
    rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    shape = (2, rows) if centered else (rows,)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _plain_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, weight_offset: float, centered: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), new_stats(x, centered)


def _residual_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y, summed = (x.new_empty(x.shape, dtype=dtype) for _ in range(2))
    return y, summed, new_stats(x, centered)
