"""What automatic mixed precision does to an operation that PyTorch's own list does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_autocast_dtype(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as it does for a matrix product.

    float64 tensors and None pass unchanged.
    """
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.dtype not in (dtype, torch.float64) else t
        for t in tensors
    )
