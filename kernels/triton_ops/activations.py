"""Activation functions and their derivatives, float32, for use inside kernels.

Tensors stand left of constants: the interpreter cannot multiply a constexpr by a tensor.

gelu, tanh form: 0.5 h (1 + tanh(u)) = h σ(2u), u = sqrt(2/π) (h + 0.044715 h³)
gelu, exact:     0.5 h (1 + erf(h / √2))
silu:            h σ(h)
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU_ERF = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


def code(name: str, approximate: str = "") -> int:
    """The ACTIVATION constant of "silu" or "gelu" with ``approximate`` "none" or "tanh"."""
    codes = {("silu", ""): SILU, ("gelu", "none"): GELU_ERF, ("gelu", "tanh"): GELU_TANH}
    return int(codes[name, approximate].value)


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """act(h)."""
    if ACTIVATION == SILU:
        return h * tl.sigmoid(h)
    elif ACTIVATION == GELU_TANH:
        return h * tl.sigmoid((h + h * h * h * _CUBIC) * _TWO_SQRT_TWO_OVER_PI)
    else:
        return 0.5 * h * (1.0 + tl.math.erf(h * _SQRT_HALF))


@triton.jit
def activate_with_slope(h, ACTIVATION: tl.constexpr):
    """(act(h), act'(h))."""
    if ACTIVATION == SILU:
        s, slope = _sigmoid_with_slope(h)
        return h * s, s + h * slope
    elif ACTIVATION == GELU_TANH:
        s, slope = _sigmoid_with_slope((h + h * h * h * _CUBIC) * _TWO_SQRT_TWO_OVER_PI)
        inner = (1.0 + h * h * (3.0 * _CUBIC)) * _TWO_SQRT_TWO_OVER_PI
        return h * s, s + h * slope * inner
    else:
        cdf = 0.5 * (1.0 + tl.math.erf(h * _SQRT_HALF))
        return h * cdf, cdf + h * tl.exp(-0.5 * h * h) * _INVERSE_SQRT_TWO_PI


@triton.jit
def _sigmoid_with_slope(v):
    """(σ(v), σ(v) (1 − σ(v))) without forming 1 − σ, which loses its digits where σ is near 1."""
    decay = tl.exp(-tl.abs(v))
    large = 1.0 / (1.0 + decay)
    small = decay * large
    return tl.where(v >= 0, large, small), small * large
