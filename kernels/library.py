"""Registration of operations that torch.compile, checkpointing and fake tensors see as one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = frozenset((Tensor, Parameter))

_library = torch.library.Library("stackwise", "FRAGMENT")


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines ``stackwise::<schema>`` for every device and returns the callable overload.

    ``implementation`` neither changes its inputs nor returns one; ``fake`` returns empty tensors of
    the right shapes. Gradients belong to the ``autograd.Function`` that calls the operation.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stackwise::{name}", fake, lib=_library)
    return getattr(torch.ops.stackwise, name).default


def unobserved(*tensors: Tensor) -> bool:
    """Whether nothing looks for operations by name: no compiler, no dispatch mode, no subclass.

    The implementation of an operation may then be called directly, at a quarter of the host time.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return _PLAIN.issuperset(map(type, tensors))


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` with less host time where no functorch transform is active.

    ``Function.apply`` looks through its arguments for what a finished transform left behind, and
    for defaults: as long as the rest of the call together.
    """
    plain = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        return plain(*arguments)

    return apply
