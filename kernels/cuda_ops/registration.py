"""Registers CUDA C++ variants, whether the library is there or not."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _cuda, dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)  # compute capability of the oldest code in the library

_package = sys.modules[__package__]
_missing: str | None = _cuda.status()["reason"]
STATUS = "not validated on a GPU" if _missing is None else "not built with this installation"


def register(op: str, target: str) -> None:
    """Registers ``target``, "module:function" in this package, as the "cuda" variant of ``op``.

    The module is imported at the first call, as an attribute of this package: that torch.compile
    can follow, an import by name it cannot.
    """
    module, name = target.split(":")

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(_package, module), name)(*args, **kwargs)

    source = f"cuda_ops.{module}"
    dispatch.register(op, "cuda", run, unsupported=why_not, status=STATUS, source=source)


def why_not(*args: Any, **kwargs: Any) -> str | None:
    """Why the library cannot take the tensors among the arguments, or None."""
    if _missing is not None:
        return _missing
    for x in (*args, *kwargs.values()) if kwargs else args:
        if not isinstance(x, Tensor):
            continue
        if not x.is_cuda:
            return f"a tensor is on {x.device}, the library runs on CUDA devices"
        if x.dtype not in DTYPES and x.dtype.is_floating_point:
            return f"dtype {x.dtype}; accepted: float32, float16 and bfloat16"
        if not torch.compiler.is_compiling() and _capability(x.get_device()) < OLDEST:
            return f"{x.device} is older than compute capability 8.0"
    return None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
