"""Large temporary buffers kept between calls on a CPU.

A fresh 100 MB buffer costs 25 ms of page faults, a quarter of the matrix product that fills it. So
each weight keeps the buffers that its products need; they are freed with the weight. A GPU's
caching allocator already does this, there every buffer is fresh.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_spaces: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Workspace:
    """Named buffers; the content of a taken one is arbitrary."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


@contextmanager
def borrow(owner: Tensor) -> Iterator[Workspace]:
    """The workspace of ``owner``, out of reach of other threads until given back."""
    space = _spaces.pop(owner, None) or Workspace()
    try:
        yield space
    finally:
        if owner.device.type == "cpu":
            _spaces[owner] = space


def scratch() -> Workspace:
    """This thread's workspace for small tiles; nothing in it outlives the call that took it."""
    space: Workspace | None = getattr(_threads, "space", None)
    if space is None:
        space = _threads.space = Workspace()
    return space


_threads = threading.local()
