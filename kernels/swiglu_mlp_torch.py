"""swiglu_mlp in PyTorch's matrix products: h is computed again in backward, in place where it can.

dh = dy W_d + ds_d A_d,  du = dh · silu(g),  dg = dh · u · silu'(g)
dx = dg W_g + ds_g A_g + du W_u + ds_u A_u
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .cpu import as_rows
from .lora_linear import Weight
from .lora_linear_torch import N_PARTS, Frozen, Needs, backward_product, forward_product, prepare
from .swiglu_mlp import NAMES, Adapters


def swiglu_mlp_torch(
    x: Tensor,
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    *,
    lora: Adapters | None = None,
    scaling: float = 1.0,
) -> Tensor:
    return swiglu_mlp_with("torch", x, w_gate, w_up, w_down, lora=lora, scaling=scaling)


def swiglu_mlp_with(
    engine: str,
    x: Tensor,
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    *,
    lora: Adapters | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """swiglu_mlp with the products of ``engine``."""
    x, gate, gate_kind, up, up_kind, down, down_kind = prepare(engine, x, w_gate, w_up, w_down)
    adapters = [tensor for name in NAMES for tensor in (lora or {}).get(name, (None, None))]
    kinds = (gate_kind, up_kind, down_kind)
    out = _SwigluMlp.apply(as_rows(x), scaling, kinds, *adapters, *gate, *up, *down)
    return out.view(*x.shape[:-1], out.shape[-1])


class _SwigluMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scaling: float,
        kinds: tuple[Frozen, Frozen, Frozen],
        *tensors: Tensor | None,
    ) -> Tensor:
        (a_g, b_g), (a_u, b_u), (a_d, b_d), gate, up, down = _grouped(tensors)
        g, s_g = forward_product(x, gate, kinds[0], a_g, b_g, scaling, None)
        u, s_u = forward_product(x, up, kinds[1], a_u, b_u, scaling, None)
        hidden = F.silu(g).mul_(u)
        y, _ = forward_product(hidden, down, kinds[2], a_d, b_d, scaling, None)
        ctx.save_for_backward(x, g, u, s_g, s_u, *tensors)
        ctx.options = (scaling, kinds)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, g, u, s_g, s_u, *tensors = ctx.saved_tensors
        scaling, kinds = ctx.options
        needs_x, _, _, *needs = ctx.needs_input_grad
        (a_g, b_g), (a_u, b_u), (a_d, b_d), gate, up, down = _grouped(tensors)
        pairs, parts = needs[: 2 * len(NAMES)], needs[2 * len(NAMES) :: N_PARTS]
        before = needs_x or any(pairs[:4]) or any(parts[:2])

        silu = F.silu(g)
        hidden = s_d = None
        if pairs[4] or pairs[5] or parts[2]:
            hidden = silu * u
            s_d = None if a_d is None else torch.mm(hidden, a_d.to(hidden.dtype).t())
        wants = Needs(before, parts[2], pairs[4], pairs[5], False)
        of_down = backward_product(dy, hidden, s_d, down, kinds[2], a_d, b_d, scaling, wants)
        del hidden
        dx = None
        made: list[Any] = []
        if before:
            dh = of_down.x
            assert dh is not None
            du = silu.mul_(dh)
            dg = dh.mul_(u)
            torch.ops.aten.silu_backward.grad_input(dg, g, grad_input=dg)
            for d, s, part, kind, a, b, i in (
                (dg, s_g, gate, kinds[0], a_g, b_g, 0),
                (du, s_u, up, kinds[1], a_u, b_u, 1),
            ):
                wants = Needs(needs_x, parts[i], pairs[2 * i], pairs[2 * i + 1], False)
                made.append(backward_product(d, x, s, part, kind, a, b, scaling, wants))
            dx = None if not needs_x else made[0].x.add_(made[1].x)
        of_gate, of_up = made if before else (None, None)
        adapters = [
            value
            for grads in (of_gate, of_up, of_down)
            for value in ((None, None) if grads is None else (grads.a, grads.b))
        ]
        weights: list[Any] = []
        for grads in (of_gate, of_up, of_down):
            weights += [None if grads is None else grads.weight] + [None] * (N_PARTS - 1)
        return dx, None, None, *adapters, *weights


def _grouped(tensors: Any) -> tuple[Any, ...]:
    """Three (A, B) pairs, then the parts of three weights."""
    pairs = [tuple(tensors[i : i + 2]) for i in range(0, 6, 2)]
    parts = [tuple(tensors[i : i + N_PARTS]) for i in range(6, 6 + 3 * N_PARTS, N_PARTS)]
    return *pairs, *parts


dispatch.register("swiglu_mlp", "torch", swiglu_mlp_torch)
