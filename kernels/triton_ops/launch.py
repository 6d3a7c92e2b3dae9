"""What the launchers share: rows of a tensor, architecture of a device, the device guard."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

# Streaming multiprocessors of the largest part of each architecture, for sizing grids.
MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}
ARCHITECTURES = tuple(MULTIPROCESSORS)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """``x`` (..., D) as (N, D) with unit stride along D.

    A view wherever one exists, so halves of a fused projection and slices of a batch are read in
    place; copies only when the last dimension is strided or the leading ones do not collapse.
    """
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def architecture(device: torch.device) -> int:
    """The newest of ARCHITECTURES that ``device`` is not older than; 90 for the interpreter."""
    return _architecture(device.index or 0) if device.type == "cuda" else 90


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    fitting = [arch for arch in ARCHITECTURES if arch <= 10 * major + minor]
    return max(fitting, default=ARCHITECTURES[0])


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: makes it that of ``x``."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
