"""Registration of operations that torch.compile, checkpointing and fake tensors see as one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
