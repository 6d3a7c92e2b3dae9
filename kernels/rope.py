"""Rotary position embedding of the first R of D dimensions (Su et al., RoFormer, 2021).

    y = x · cos + turn(x) · sin
    half-split:   turn(x) = (-x[R/2:], x[:R/2])              pairs (i, i + R/2), GPT-NeoX and LLaMA
    interleaved:  turn(x)[2i] = -x[2i+1], turn(x)[2i+1] = x[2i]   pairs (2i, 2i+1), GPT-J, DeepSeek

Tables hold one column per rotated dimension, laid out like the pairs. The products are taken in the
wider of the input's and the table's dtype, the output has the input's. Tables get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .cpu import eager_on_cpu
from .workspace import scratch


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[..., None, :], sin[..., None, :]
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        pairs = turned.unflatten(-1, (width // 2, 2))
        turn = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    else:
        turn = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    return torch.cat([(turned * cos + turn * sin).to(x.dtype), rest], dim=-1)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions' angles.

    Args:
        q: (B, L, Hq, D), or packed (total, Hq, D).
        k: (B, L, Hk, D), or packed (total, Hk, D).
        cos, sin: (L, R) or (B, L, R), packed (total, R); R even, at most D; the dimensions after R
            pass unchanged.
        interleaved: pairs (2i, 2i + 1) instead of (i, i + R/2).
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        The rotated (q, k), same shapes and dtypes.

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    _check(q, k, cos, sin)
    run = dispatch.select("rope", impl, q, k, cos, sin, interleaved=interleaved)
    return run(q, k, cos, sin, interleaved=interleaved)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    layout = "total H D" if q.dim() == 3 else "B L H D"
    checks.floating("q", q, layout)
    checks.floating("k", k, layout)
    checks.same("k", k, "q", q)
    checks.shape("k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), layout)
    table = "B L R" if cos.dim() == 3 else "L R"
    checks.floating("cos", cos, table)
    checks.floating("sin", sin, table)
    checks.same("sin", sin, "cos", cos)
    checks.on_device("cos", cos, "q", q)
    if cos.dim() >= q.dim():
        checks.fail("cos", f"{cos.dim()} dimensions", "(total, R) for packed tensors")
    width = cos.shape[-1]
    if width % 2 or width > q.shape[-1]:
        checks.fail("cos", f"{width} columns", f"an even number up to D = {q.shape[-1]}")
    lead = (q.shape[0], q.shape[1]) if cos.dim() == 3 else (q.shape[-3],)
    checks.shape("cos", cos, (*lead, width), table)
    checks.shape("sin", sin, cos.shape, table)


def _rope_torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    if not eager_on_cpu(q):
        return rope_reference(q, k, cos, sin, interleaved=interleaved)
    tables = _pairs(cos[..., None, :], interleaved), _pairs(sin[..., None, :], interleaved)
    return _Rope.apply(q, *tables, interleaved), _Rope.apply(k, *tables, interleaved)


class _Rope(torch.autograd.Function):
    """y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 for the pairs (x1, x2); nothing of x is kept.

    Backward is the transposed rotation: dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: tuple[Tensor, Tensor],
        sin: tuple[Tensor, Tensor],
        interleaved: bool,
    ) -> Tensor:
        ctx.options = (cos, sin, interleaved)
        return _turn(x, cos, (-sin[0], sin[1]), interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin, interleaved = ctx.options
        return _turn(grad, cos, (sin[1], -sin[0]), interleaved), None, None, None


def _turn(
    x: Tensor, cos: tuple[Tensor, Tensor], sin: tuple[Tensor, Tensor], interleaved: bool
) -> Tensor:
    """(x1 c1 + x2 s1, x2 c2 + x1 s2), in the wider dtype, then x's; the rest of x unchanged."""
    width = 2 * cos[0].shape[-1]
    high = torch.promote_types(x.dtype, cos[0].dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    source, target = x[..., :width], out[..., :width]
    if high != x.dtype:
        source = scratch().take("rope in", tuple(source.shape), x, high).copy_(source)
        target = scratch().take("rope out", tuple(source.shape), x, high)
    (x1, x2), (y1, y2) = _pairs(source, interleaved), _pairs(target, interleaved)
    torch.mul(x1, cos[0], out=y1).addcmul_(x2, sin[0])
    torch.mul(x2, cos[1], out=y2).addcmul_(x1, sin[1])
    if high != x.dtype:
        out[..., :width] = target
    out[..., width:] = x[..., width:]
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second members of the pairs, as views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


dispatch.register("rope", "reference", rope_reference)
dispatch.register("rope", "torch", _rope_torch)
