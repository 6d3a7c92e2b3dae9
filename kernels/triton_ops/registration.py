"""Registers Triton variants without importing Triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATUS = "not validated on a GPU"

_has_triton = importlib.util.find_spec("triton") is not None


def register(op: str, target: str, *, unsupported: Callable[..., str | None] | None = None) -> None:
    """Registers ``target``, "module:function" in this package, as the "triton" variant of ``op``.

    The module is imported at the first call. ``unsupported`` takes the operation's arguments and
    gives the reason why a case is not covered beyond what :func:`why_not` finds, or None.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return _load(target)(*args, **kwargs)

    def reason(*args: Any, **kwargs: Any) -> str | None:
        general = why_not([*args, *kwargs.values()])
        if general is not None or unsupported is None:
            return general
        return unsupported(*args, **kwargs)

    dispatch.register(op, "triton", run, unsupported=reason, status=STATUS)


def why_not(arguments: list[Any]) -> str | None:
    """Why Triton cannot take the tensors among ``arguments``, or None."""
    if not _has_triton:
        return "Triton cannot be imported"
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    for tensor in tensors:
        if tensor.device.type != "cuda" and not interpreting():
            return f"a tensor is on {tensor.device}, Triton runs on CUDA devices"
        if tensor.dtype.is_floating_point and tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype}; accepted: float32, float16 and bfloat16"
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_loaded: dict[str, Callable[..., Any]] = {}


def _load(target: str) -> Callable[..., Any]:
    if target not in _loaded:
        module, name = target.split(":")
        _loaded[target] = getattr(importlib.import_module(f".{module}", __package__), name)
    return _loaded[target]
