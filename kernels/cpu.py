"""What the CPU variants share: when they apply, and blocks of rows that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 17  # elements: small enough for the caches, large enough to hide the call overhead


def eager_on_cpu(x: Tensor) -> bool:
    """Whether hand-written CPU passes run; a compiler fuses the plain formula better itself."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def half_on_cpu(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and eager_on_cpu(x)


def as_rows(x: Tensor) -> Tensor:
    """(..., D) to (N, D)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def row_blocks(x: Tensor, block: int = BLOCK) -> Iterator[slice]:
    """Slices of the rows of x (N, D), each of about ``block`` elements."""
    rows, width = x.shape
    step = max(1, block // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
