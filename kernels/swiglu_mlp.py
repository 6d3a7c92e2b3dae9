"""The gated feed-forward of LLaMA with frozen, quantised or trainable weights and adapters.

    g = x W_gᵀ + scaling · (x A_gᵀ) B_gᵀ,  u likewise,  h = silu(g) · u
    y = h W_dᵀ + scaling · (h A_dᵀ) B_dᵀ

x (..., K), gate and up (F, K), down (K_out, F). (Shazeer, "GLU Variants Improve Transformer",
2020.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .lora_linear import Weight, check_linear, check_lora, dense, lora_linear_reference
from .swiglu import swiglu_reference

NAMES = ("gate", "up", "down")
Adapters = Mapping[str, tuple[Tensor, Tensor]]


def swiglu_mlp_reference(
    x: Tensor,
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    *,
    lora: Adapters | None = None,
    scaling: float = 1.0,
) -> Tensor:
    def linear(x: Tensor, weight: Weight, name: str) -> Tensor:
        pair = (lora or {}).get(name)
        if pair is None:
            return F.linear(x, dense(weight, x.dtype))
        return lora_linear_reference(x, weight, *pair, scaling=scaling)

    hidden = swiglu_reference(linear(x, w_gate, "gate"), linear(x, w_up, "up"))
    return linear(hidden, w_down, "down")


def swiglu_mlp(
    x: Tensor,
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    *,
    lora: Adapters | None = None,
    scaling: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """down(silu(gate(x)) · up(x)) (formula: top of this file).

    Backward keeps x, g and u, and computes h again. Differentiable in x, the adapters, and weights
    that are Tensors.

    Args:
        x: (..., K).
        w_gate, w_up: (F, K), each a Tensor of x's dtype or a QuantizedTensor.
        w_down: (K_out, F), likewise.
        lora: adapters (A (r, inputs), B (outputs, r)) by name: any of "gate", "up" and "down".
        scaling: factor of every adapter.
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (..., K_out) of x's dtype; under autocast of its dtype.

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    check_linear(x, "w_gate", w_gate, None)
    check_linear(x, "w_up", w_up, None)
    shape = tuple(w_gate.shape)
    if tuple(w_up.shape) != shape:
        checks.fail("w_up", f"shape {tuple(w_up.shape)}", f"that of w_gate: {shape}")
    check_linear(x.new_empty(0, shape[0]), "w_down", w_down, None)
    for name in lora or {}:
        checks.choice("lora", name, NAMES)
    for name, weight in zip(NAMES, (w_gate, w_up, w_down), strict=True):
        pair = (lora or {}).get(name)
        if pair is not None:
            label = f"lora[{name!r}]"
            check_lora(f"{label}[0]", pair[0], f"{label}[1]", pair[1], x, tuple(weight.shape))
    weights = (w_gate, w_up, w_down)
    run = dispatch.select("swiglu_mlp", impl, x, *weights, lora=lora, scaling=scaling)
    return run(x, *weights, lora=lora, scaling=scaling)


dispatch.register("swiglu_mlp", "reference", swiglu_mlp_reference)
