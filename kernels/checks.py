"""Argument checks shared by every operation: a ValueError that says what came and what is accepted.

Each operation checks once, at its public door; the variants behind it trust their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


def fail(argument: str, got: object, accepted: object) -> NoReturn:
    raise ValueError(f"{argument}: got {got}; accepted: {accepted}")


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
    return repr(x)


def floating(name: str, x: Tensor, layout: str) -> None:
    """``x`` is a floating-point tensor whose number of dimensions is that of ``layout``.

    ``layout`` names the dimensions, "B L H D"; a leading "..." accepts any number before it.
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        fail(name, describe(x), f"a floating-point tensor ({_commas(layout)})")
    names = layout.split()
    wrong = x.dim() < len(names) - 1 if names[0] == "..." else x.dim() != len(names)
    if wrong:
        fail(name, describe(x), f"a tensor ({_commas(layout)})")


def shape(name: str, x: Tensor, expected: Sequence[int], layout: str) -> None:
    if tuple(x.shape) != tuple(expected):
        fail(name, f"shape {tuple(x.shape)}", f"({_commas(layout)}) = {tuple(expected)}")


def same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` has the dtype and the device of ``other``."""
    if x.dtype != other.dtype or x.device != other.device:
        fail(
            name,
            f"{x.dtype} on {x.device}",
            f"the dtype and device of {other_name}: {other.dtype} on {other.device}",
        )


def on_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        fail(name, f"a tensor on {x.device}", f"the device of {other_name}: {other.device}")


def integers(name: str, x: Tensor, layout: str, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in dtypes or x.dim() != len(layout.split()):
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(name, describe(x), f"a {kinds} tensor ({_commas(layout)})")


def boolean(name: str, x: Tensor, layout: str) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.bool or x.dim() != len(layout.split()):
        fail(name, describe(x), f"a bool tensor ({_commas(layout)})")


def choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        fail(name, repr(value), ", ".join(repr(a) for a in accepted))


def positive(name: str, value: float | None) -> None:
    """None, or a number above zero."""
    if value is not None and not value > 0:
        fail(name, repr(value), "a number above 0")


def gated(gate_name: str, gate: Tensor, up_name: str, up: Tensor) -> None:
    """The two inputs of a gated unit: floating point, one shape, dtype and device."""
    layout = "... D"
    floating(gate_name, gate, layout)
    floating(up_name, up, layout)
    same(up_name, up, gate_name, gate)
    shape(up_name, up, gate.shape, layout)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """The arguments of a normalisation over the last dimension of ``x``."""
    if _norm_is_right(x, weight, bias, residual):
        return
    floating("x", x, "... D")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            floating(name, parameter, "D")
            shape(name, parameter, x.shape[-1:], "D")
            on_device(name, parameter, "x", x)
    if residual is not None:
        floating("residual", residual, "... D")
        shape("residual", residual, x.shape, "... D")
        on_device("residual", residual, "x", x)


def _norm_is_right(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """The checks of :func:`norm` at a third of their cost; a norm on a GPU waits for its host."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)) or x.dim() == 0:
        return False
    width, device = x.shape[-1], x.device
    for parameter in (weight,) if bias is None else (weight, bias):
        if (
            not isinstance(parameter, Tensor)
            or not parameter.is_floating_point()
            or parameter.dim() != 1
            or parameter.shape[0] != width
            or parameter.device != device
        ):
            return False
    return x.is_floating_point() and (
        residual is None
        or (
            isinstance(residual, Tensor)
            and residual.is_floating_point()
            and residual.shape == x.shape
            and residual.device == device
        )
    )


def _commas(layout: str) -> str:
    return ", ".join(layout.split())
