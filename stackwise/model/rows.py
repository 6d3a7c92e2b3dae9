"""Selecting token rows of a batch, with a backward pass that writes each row once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SelectRows(torch.autograd.Function):
    """x (N, ...), rows (R,) unique -> x[rows]; the gradient is copied, never accumulated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy(0, rows, grads[0]), None


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(B, L, ...) -> (R, ...): the tokens at the flattened B*L indices ``rows``, all different."""
    return _SelectRows.apply(x.flatten(0, 1), rows)
