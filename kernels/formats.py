"""The quantised number formats: their values, block sizes, scales, and how values round to them.

| format | element | one scale for | scale |
|---|---|---|---|
| nvfp4 | e2m1 | 16 along K | e4m3, times one float32 (amax / 2688) per matrix |
| mxfp4 | e2m1 | 32 along K | e8m0: a power of two |
| nf4 | 16 quantiles of a normal | 64 along K | float32, or 8-bit per 256 with float32 (double) |
| fp8_tensor, fp8_row, fp8_block | e4m3 | a matrix, a row, 128 x 128 | float32 |
| mxfp8 | e4m3 | 32 along K | e8m0 |

e2m1, e4m3 and e8m0 with blocks of 32: OCP Microscaling Formats 1.0. nvfp4: NVIDIA, "Pretraining
Large Language Models with NVFP4" (2025). nf4 and double quantisation: Dettmers et al., "QLoRA"
(2023), with the 8-bit dynamic code of Dettmers et al., "8-bit Optimizers" (2021).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0

# The 16 values of QLoRA's NF4 in float32: 0, 8 positive and 7 negative normal quantiles over ±1.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

FP8_BLOCK = 128
NESTED_BLOCK = 256  # scales of nf4 that share one scale in double quantisation


@dataclass(frozen=True)
class Format:
    """``element``: "e2m1", "nf4" or "e4m3"; ``block``: elements along K per scale, or 0."""

    name: str
    element: str
    block: int
    scale_dtype: torch.dtype

    @property
    def four_bit(self) -> bool:
        return self.element != "e4m3"


FORMATS = {
    format.name: format
    for format in (
        Format("nvfp4", "e2m1", 16, torch.float8_e4m3fn),
        Format("mxfp4", "e2m1", 32, torch.float8_e8m0fnu),
        Format("nf4", "nf4", 64, torch.float32),
        Format("fp8_tensor", "e4m3", 0, torch.float32),
        Format("fp8_row", "e4m3", 0, torch.float32),
        Format("fp8_block", "e4m3", FP8_BLOCK, torch.float32),
        Format("mxfp8", "e4m3", 32, torch.float8_e8m0fnu),
    )
}


def round_e2m1(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """4-bit codes (uint8: sign · 8 + magnitude index) of the e2m1 values nearest to float32 ``x``.

    Ties go to the even code; values beyond ±6 become ±6. With ``noise``, uniform in [0, 1) and of
    x's shape, rounds up with the probability that makes the result unbiased within ±6.
    """
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    if noise is None:
        for index, (low, high) in enumerate(itertools.pairwise(E2M1_VALUES)):
            middle = (low + high) / 2
            code += magnitude > middle if index % 2 == 0 else magnitude >= middle
    else:
        # The distance between neighbours is 0.5 below 2, then 1, then 2.
        step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
        magnitude = torch.floor(magnitude / step + noise) * step
        for value in E2M1_VALUES[1:]:
            code += magnitude >= value
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def round_nf4(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """4-bit codes of the NF4 values nearest to float32 ``x`` in [-1, 1]; noise as in e2m1."""
    values = table("nf4", x.device)
    if noise is None:
        return nearest(x, values)
    low = (torch.bucketize(x, values, right=True) - 1).clamp_(0, len(values) - 2)
    bottom, top = values[low], values[low + 1]
    return (low + (noise * (top - bottom) < x - bottom)).to(torch.uint8)


def round_e4m3(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """float32 ``x`` as float8_e4m3fn, nearest-even or by noise as in e2m1, at most ±448."""
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    if noise is not None:
        # One unit in the last place: 3 bits below the leading one, 2^-9 for subnormals.
        exponent = torch.frexp(x)[1].clamp_(min=-5) - 4
        x = torch.ldexp(torch.floor(torch.ldexp(x, -exponent) + noise), exponent)
    return x.to(torch.float8_e4m3fn)


def power_of_two_scale(amax: Tensor, element: str, rounding: str) -> Tensor:
    """e8m0 scales (float8_e8m0fnu) for blocks with these largest magnitudes (float32).

    "floor": 2^(floor(log2 amax) - emax), the OCP rule, which clips values above the element's
    largest; "even": the same after rounding amax to the element's mantissa; "ceil": the smallest
    power of two that clips nothing.
    """
    largest, mantissa = (E2M1_MAX, 1) if element == "e2m1" else (E4M3_MAX, 3)
    emax = 2 if element == "e2m1" else 8
    if rounding == "ceil":
        fraction, exponent = torch.frexp(amax / largest)
        exponent = exponent - (fraction == 0.5).to(exponent.dtype)
    else:
        if rounding == "even":
            # Half of the last mantissa bit carries into the exponent where it rounds up.
            amax = (amax.view(torch.int32) + (1 << (22 - mantissa))).view(torch.float32)
        exponent = torch.frexp(amax)[1] - 1 - emax
    exponent = exponent.masked_fill(amax == 0, -127).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


@cache
def _dynamic_code() -> tuple[float, ...]:
    """The 256 values of the signed 8-bit dynamic tree: 7 decades, 2^i linear steps in the i-th."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += means.tolist() + (-means).tolist()
    return tuple(sorted(values))


def table(kind: str, device: torch.device) -> Tensor:
    """float32 values by code: "e2m1" (16), "nf4" (16) or "dynamic" (256)."""
    if kind == "e2m1":
        values = E2M1_VALUES + tuple(-value for value in E2M1_VALUES)
    else:
        values = NF4_VALUES if kind == "nf4" else _dynamic_code()
    return torch.tensor(values, dtype=torch.float32, device=device)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index (uint8) of the entry of sorted ``values`` nearest to each of ``x``; ties go down."""
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2).to(torch.uint8)
