"""The quantised formats again, one number at a time and sharing no code with the package.

Representable values come from the bits of the OCP formats in exact fractions; the few float32
steps that a format prescribes (the scale, the quotient) go through numpy's float32 scalars.
"""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import numpy as np

f32 = np.float32

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> Fraction:
    """Magnitude of an unsigned code of a format with subnormals."""
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = divmod(code, 2**mantissa_bits)
    if exponent == 0:
        return Fraction(mantissa, 2**mantissa_bits) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(mantissa, 2**mantissa_bits)) * Fraction(2) ** (exponent - bias)


E2M1 = [minifloat(code, 2, 1) for code in range(8)]
E4M3 = [minifloat(code, 4, 3) for code in range(127)]  # 127 is NaN


def nearest_even(x: float, values: list[Fraction]) -> int:
    """Code of the value nearest to |x|; a tie takes the even code; saturates."""
    magnitude = Fraction(abs(float(x)))
    above = bisect.bisect_left(values, magnitude)
    neighbours = range(max(0, above - 1), min(above + 1, len(values)))
    return min(neighbours, key=lambda code: (abs(values[code] - magnitude), code % 2))


def element(x: float, kind: str) -> tuple[int, Fraction]:
    """(code with the sign in its highest bit, value) of a scaled weight."""
    if kind == "nf4":
        code = min(range(16), key=lambda c: (abs(Fraction(NF4[c]) - Fraction(float(x))), c))
        return code, Fraction(NF4[code])
    values, sign_bit = (E2M1, 8) if kind == "e2m1" else (E4M3, 128)
    code = nearest_even(x, values)
    negative = math.copysign(1.0, float(x)) < 0
    return code | (sign_bit if negative else 0), -values[code] if negative else values[code]


def power_of_two(amax: float, kind: str, rounding: str) -> float:
    """e8m0 scale of a block."""
    if amax == 0:
        return 2.0**-127
    emax, largest, mantissa = (2, 6, 1) if kind == "e2m1" else (8, 448, 3)
    if rounding == "ceil":
        exponent = -127
        while f32(amax) / f32(largest) > f32(2.0**exponent):
            exponent += 1
        return 2.0**exponent
    exponent = math.frexp(amax)[1] - 1
    if rounding == "even":
        steps = Fraction(amax) / Fraction(2) ** exponent * 2**mantissa
        if math.floor(steps + Fraction(1, 2)) == 2 ** (mantissa + 1):
            exponent += 1
    return 2.0 ** max(-127, exponent - emax)


def scales(weight: np.ndarray, format: str, rounding: str) -> np.ndarray:
    """float32 scale of every element of weight (N, K)."""
    n, k = weight.shape
    result = np.zeros((n, k), dtype=f32)
    height, width = {
        "nvfp4": (1, 16), "mxfp4": (1, 32), "nf4": (1, 64), "mxfp8": (1, 32),
        "fp8_tensor": (n, k), "fp8_row": (1, k), "fp8_block": (128, 128),
    }[format]  # fmt: skip
    whole = f32(np.abs(weight).max()) / f32(2688.0)
    for i in range(0, n, height):
        for j in range(0, k, width):
            block = (slice(i, i + height), slice(j, j + width))
            amax = f32(np.abs(weight[block]).max())
            if format == "nvfp4":
                code = nearest_even(amax / (f32(6.0) * whole), E4M3)
                result[block] = f32(float(E4M3[code])) * whole
            elif format.startswith("mx"):
                kind = "e2m1" if format == "mxfp4" else "e4m3"
                result[block] = f32(power_of_two(float(amax), kind, rounding))
            elif format == "nf4":
                result[block] = amax if amax else f32(1.0)
            else:
                result[block] = amax / f32(448.0) if amax else f32(1.0)
    return result


def quantized(weight: np.ndarray, format: str, rounding: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes, dequantised float32) of weight (N, K), float32."""
    kind = "nf4" if format == "nf4" else "e2m1" if format.endswith("fp4") else "e4m3"
    factors = scales(weight, format, rounding)
    codes = np.zeros(weight.shape, dtype=np.uint8)
    values = np.zeros(weight.shape, dtype=f32)
    for index in np.ndindex(*weight.shape):
        factor = factors[index]
        code, value = element(weight[index] / factor if factor > 0 else 0.0, kind)
        codes[index], values[index] = code, f32(float(value)) * factor
    return codes, values
