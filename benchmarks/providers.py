"""Who is measured: our variants as dispatch offers them, torch.compile, and peers that import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cases import Provider, Tensors
from stackwise.kernels import dispatch

NEEDS_CUDA = "runs on CUDA devices"


def stackwise_variants(
    op: str, function: Callable[..., Any], tensors: Tensors, options: dict[str, Any]
) -> Iterator[Provider]:
    """``stackwise-<variant>`` for every registered variant of ``op`` but its definition."""
    for variant in dispatch.available()[op]:
        if variant == "reference":
            continue
        name = f"stackwise-{variant}"
        try:
            dispatch.select(op, variant, **tensors, **options)
        except ValueError as reason:
            yield Provider(name, None, skipped=str(reason).partition("; variants of")[0])
        else:
            yield Provider(name, bind(function, impl=variant, **options))


def compiled(function: Callable[..., Any]) -> Provider:
    """``torch.compile`` of the eager form, from its first call on."""

    @functools.cache
    def build() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return Provider("torch.compile", lambda **tensors: build()(**tensors), compiles=True)


def peer(
    name: str,
    module: str,
    build: Callable[[Any], Callable[..., Any]],
    device: torch.device,
    *,
    overwrites: bool = False,
    compiles: bool = True,
) -> Provider:
    """A CUDA library: ``build`` makes the function from the imported ``module``."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return skip(name, f"{package} is not installed")
    if device.type != "cuda":
        return skip(name, NEEDS_CUDA)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function = build(importlib.import_module(module))
    except Exception as error:  # a peer broken on this machine is skipped, whatever it raises
        return skip(name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Provider(name, function, peer=True, overwrites=overwrites, compiles=compiles)


def skip(name: str, reason: str) -> Provider:
    """A peer that this machine or this case does not have."""
    return Provider(name, None, skipped=reason, peer=True)


def bind(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """``function`` of the tensors only."""
    return lambda **tensors: function(**tensors, **fixed)
