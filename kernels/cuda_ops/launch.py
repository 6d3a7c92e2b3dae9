"""What the launchers share: rows of a tensor, type codes, the call on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _cuda

# sw::Kind in csrc/norm_types.cuh.
TYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def rows_of(x: Tensor, width: int) -> tuple[Tensor, int]:
    """``x`` (..., width) and the stride of its rows, each row contiguous.

    The tensor itself or a view wherever the rows lie at one stride; copies only otherwise.
    """
    if x.is_contiguous():
        return x, width
    if x.dim() != 2:
        x = x.reshape(-1, width)
    if width > 1 and x.stride(1) != 1:
        return x.contiguous(), width
    return x, x.stride(0)


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def multiprocessors(x: Tensor) -> int:
    return _multiprocessors(x.get_device())


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def run(name: str, x: Tensor, arguments: tuple[Any, ...]) -> None:
    """Calls the library's function ``name`` on the device of ``x`` and its current stream.

    ``arguments``: the values of its :class:`_cuda.Record`, without the stream.
    """
    index = x.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            _call(name, index, arguments)
    else:
        _call(name, index, arguments)


def _call(name: str, index: int, arguments: tuple[Any, ...]) -> None:
    function, pack = _function(name)
    code = function(pack(*arguments, torch._C._cuda_getCurrentRawStream(index)))
    if code:
        _cuda.check(code)


@cache
def _function(name: str) -> tuple[Callable[[bytes], int], Callable[..., bytes]]:
    return getattr(_cuda.load(), name), _cuda.RECORDS[name].pack
