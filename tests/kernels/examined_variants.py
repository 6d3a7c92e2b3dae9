"""An examining process with variants of swiglu that are wrong in one way each.

``python tests/kernels/examined_variants.py`` serves like ``python -m stackwise.kernels.examiner``.
Tests register the same variants in their own process with :func:`register_all`.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stackwise.kernels import dispatch, oracle, oracle_cases
from stackwise.kernels.examiner import serve


class _Fast(torch.autograd.Function):
    """The right values at once: torch's variant is made to wait instead."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _silu(gate).mul(up.float()).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x.float() for x in ctx.saved_tensors)
        s = torch.sigmoid(gate)
        slope = s * (1 + gate * (1 - s))
        high = grad.float()
        return (high * up * slope).to(grad.dtype), (high * gate * s).to(grad.dtype)


def _silu(x: Tensor) -> Tensor:
    return x.float() * torch.sigmoid(x.float())


def wrong_gradient(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    return _Fast.apply(gate, up) + (up - up.detach()) * 0.1


def one_tile_missing(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    out = torch.empty_like(gate)
    out[..., : gate.shape[-1] // 2] = 0
    return torch.where(out.isnan(), out, _Fast.apply(gate, up))


def wrong_shape(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    return _Fast.apply(gate, up)[None]


_calls = 0


def never_twice_the_same(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    global _calls
    _calls += 1
    return _Fast.apply(gate, up) * (1 + 1e-7 * (_calls % 2))


def crash(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    os.abort()


def hang(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    time.sleep(3600)
    return gate


def fast(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    return _Fast.apply(gate, up)


VARIANTS = {
    f.__name__: f
    for f in (
        fast,
        wrong_gradient,
        one_tile_missing,
        wrong_shape,
        never_twice_the_same,
        crash,
        hang,
    )
}


def _inputs(maker: oracle.Maker, rows: int, width: int) -> dict[str, Tensor]:
    return {"gate": maker.normal(rows, width), "up": maker.normal(rows, width)}


def _cases() -> list[oracle.Case]:
    both = ("gate", "up")
    sizes = ((1, 1, False), (63, 113, False), (16, 2048, True))
    return [
        oracle.Case(f"{rows}x{width}", partial(_inputs, rows=rows, width=width), both, race)
        for rows, width, race in sizes
    ]


def register_all(name: str) -> None:
    """swiglu's "cuda" variant is the one named; its torch variant takes 5 ms longer than it does.

    geglu gets a "cuda" variant that is right. Both get few and small cases.
    """
    plain = dispatch.variant("swiglu", "torch").function

    def waiting(gate: Tensor, up: Tensor) -> Tensor:
        time.sleep(0.005)
        return plain(gate, up)

    dispatch.register("swiglu", "torch", waiting)
    dispatch.register("swiglu", "cuda", VARIANTS[name], status="not validated on a GPU")
    dispatch.register("geglu", "cuda", dispatch.variant("geglu", "reference").function)
    for op in ("swiglu", "geglu"):
        oracle_cases.cases_of(op)(_cases)


if __name__ == "__main__":
    register_all(os.environ["EXAMINED_VARIANT"])
    serve()
