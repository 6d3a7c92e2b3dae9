"""Registers Triton variants without importing Triton."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATUS = "not validated on a GPU"

_package = sys.modules[__package__]
_has_triton = importlib.util.find_spec("triton") is not None


def register(op: str, target: str, *, unsupported: Callable[..., str | None] | None = None) -> None:
    """Registers ``target``, "module:function" in this package, as the "triton" variant of ``op``.

    The module is imported at the first call, as an attribute of this package: that torch.compile
    can follow, an import by name it cannot. ``unsupported`` takes the operation's arguments and
    gives the reason why a case is not covered beyond what :func:`why_not` finds, or None.
    """
    module, name = target.split(":")

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(_package, module), name)(*args, **kwargs)

    def reason(*args: Any, **kwargs: Any) -> str | None:
        general = why_not((*args, *kwargs.values()) if kwargs else args)
        if general is not None or unsupported is None:
            return general
        return unsupported(*args, **kwargs)

    source = f"triton_ops.{module}"
    dispatch.register(op, "triton", run, unsupported=reason, status=STATUS, source=source)


def why_not(arguments: Iterable[Any]) -> str | None:
    """Why Triton cannot take the tensors among ``arguments``, or None."""
    if not _has_triton:
        return "Triton cannot be imported"
    on_cpu = None
    for x in arguments:
        if not isinstance(x, Tensor):
            continue
        if not x.is_cuda:
            on_cpu = interpreting() if on_cpu is None else on_cpu
            if not on_cpu:
                return f"a tensor is on {x.device}, Triton runs on CUDA devices"
        if x.dtype not in DTYPES and x.dtype.is_floating_point:
            return f"dtype {x.dtype}; accepted: float32, float16 and bfloat16"
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
