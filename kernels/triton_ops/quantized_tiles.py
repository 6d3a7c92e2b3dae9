"""Tiles of a quantised weight as float32, inside a kernel: value(code) · scale · global scale.

Codes and 8-bit scales are read as bytes and decoded with integer arithmetic, so that every
architecture takes every format (sm_80 has no e4m3) and the result is that of ``decode`` in
quantized_tensor.py, bit for bit.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS, table

# ELEMENT: how a code becomes a number. SCALE: how the scale of a block is stored.
E2M1, NF4, E4M3 = (tl.constexpr(i) for i in range(3))
FP32, E4M3_GLOBAL, E8M0, NESTED = (tl.constexpr(i) for i in range(4))
# BLOCK: elements along K per scale, or one of these.
PER_TENSOR, PER_ROW, PER_SQUARE = tl.constexpr(-1), tl.constexpr(0), tl.constexpr(128)

_BLOCKS = {"fp8_tensor": -1, "fp8_row": 0, "fp8_block": 128}
_ELEMENTS = {"e2m1": 0, "nf4": 1, "e4m3": 2}


@dataclass(frozen=True)
class Operand:
    """A quantised (N, K) weight as kernel arguments."""

    tensors: dict[str, Tensor]
    strides: dict[str, int]
    constants: dict[str, int]


def operand(
    format: str,
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    nested_scale: Tensor | None,
    offset: Tensor | None,
) -> Operand:
    """Arguments of :func:`decode_tile`; tensors that a format does not use point to the scale."""
    stored = scale if scale.element_size() == 4 else scale.view(torch.uint8)
    element = FORMATS[format].element
    tensors = {
        "data": data.view(torch.uint8),
        "scale": stored,
        "global_scale": stored if global_scale is None else global_scale,
        "nested_scale": stored if nested_scale is None else nested_scale,
        "offset": stored if offset is None else offset,
        "values": _values("nf4", data.device) if element == "nf4" else stored,
        "codes": stored if nested_scale is None else _values("dynamic", data.device),
    }
    strides = {"stride_data": data.stride(0), "stride_scale": scale.stride(0)}
    return Operand(tensors, strides, constants_of(format, nested_scale is not None))


def constants_of(format: str, nested: bool) -> dict[str, int]:
    """ELEMENT, SCALE and BLOCK of a format."""
    spec = FORMATS[format]
    scale = {torch.float8_e4m3fn: 1, torch.float8_e8m0fnu: 2}.get(spec.scale_dtype, 0)
    return {
        "ELEMENT": _ELEMENTS[spec.element],
        "SCALE": 3 if nested else scale,
        "BLOCK": _BLOCKS.get(format, spec.block),
    }


def pointer_types(format: str, nested: bool) -> dict[str, str]:
    """Triton types of an operand's tensors."""
    scale = "*fp32" if FORMATS[format].scale_dtype == torch.float32 and not nested else "*u8"
    types: dict[str, Any] = dict.fromkeys(
        ("scale", "global_scale", "nested_scale", "offset", "values", "codes"), scale
    )
    types["data"] = "*u8"
    if format == "nvfp4":
        types["global_scale"] = "*fp32"
    if format == "nf4":
        types["values"] = "*fp32"
    if nested:
        types |= dict.fromkeys(("nested_scale", "offset", "codes"), "*fp32")
    return types


@cache
def _values(kind: str, device: torch.device) -> Tensor:
    return table(kind, device)


@triton.jit
def decode_tile(
    data, scale, global_scale, nested_scale, offset, values, codes, stride_data, stride_scale,
    row, column, n_rows,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w[row : row + BLOCK_N, column : column + BLOCK_K], float32; 0 where a row is missing.

    ``column`` is a multiple of BLOCK_K, a power of two of at least 64 (at most 128 for per-square
    scales). Columns beyond K are whatever the padding holds.
    """
    o_n = row + tl.arange(0, BLOCK_N)
    m_n = (o_n < n_rows)[:, None]
    o_n = o_n.to(tl.int64)[:, None]
    if ELEMENT == E4M3:
        o_k = column + tl.arange(0, BLOCK_K)[None, :]
        bits = tl.load(data + o_n * stride_data + o_k, mask=m_n & (o_k < stride_data), other=0)
        w = _e4m3_value(bits)
    else:
        o_b = column // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        pairs = tl.load(data + o_n * stride_data + o_b, mask=m_n & (o_b < stride_data), other=0)
        low, high = pairs & 15, pairs >> 4
        if ELEMENT == E2M1:
            w = tl.interleave(_e2m1_value(low), _e2m1_value(high))
        else:
            w = tl.interleave(
                tl.load(values + low.to(tl.int32)), tl.load(values + high.to(tl.int32))
            )
    if BLOCK == PER_TENSOR:
        return tl.where(m_n, w * tl.load(scale), 0.0)
    elif BLOCK == PER_ROW:
        return w * tl.load(scale + o_n, mask=m_n, other=0.0)
    elif BLOCK == PER_SQUARE:
        p_scale = scale + o_n // BLOCK * stride_scale + column // BLOCK
        return w * tl.load(p_scale, mask=m_n, other=0.0)
    else:
        o_s = column // BLOCK + tl.arange(0, BLOCK_K // BLOCK)[None, :]
        s = _block_scale(
            scale, global_scale, nested_scale, offset, codes, stride_scale,
            o_n, o_s, m_n & (o_s < stride_scale), SCALE,
        )  # fmt: skip
        tiled = tl.reshape(w, (BLOCK_N, BLOCK_K // BLOCK, BLOCK)) * s[:, :, None]
        return tl.reshape(tiled, (BLOCK_N, BLOCK_K))


@triton.jit
def _block_scale(
    scale, global_scale, nested_scale, offset, codes, stride_scale, o_n, o_s, mask,
    SCALE: tl.constexpr,
):  # fmt: skip
    """float32 scales of the blocks (o_n, o_s); 0 outside of the mask."""
    index = o_n * stride_scale + o_s
    if SCALE == FP32:
        return tl.load(scale + index, mask=mask, other=0.0)
    elif SCALE == E4M3_GLOBAL:
        bits = tl.load(scale + index, mask=mask, other=0)
        return _e4m3_value(bits) * tl.load(global_scale)
    elif SCALE == E8M0:
        bits = tl.load(scale + index, mask=mask, other=0).to(tl.int32)
        # The code 0 is 2^-127, a subnormal of float32.
        value = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
        return tl.where(mask, value, 0.0)
    else:
        code = tl.load(codes + tl.load(scale + index, mask=mask, other=0).to(tl.int32))
        nested = tl.load(nested_scale + index // 256, mask=mask, other=0.0)
        return tl.where(mask, code * nested + tl.load(offset), 0.0)


@triton.jit
def _e2m1_value(code):
    """sign, 2 exponent bits, 1 mantissa bit -> float32."""
    code = code.to(tl.int32)
    magnitude = code & 7
    normal = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    bits = tl.where(magnitude < 2, magnitude * 0x3F000000, normal)
    return (bits | (code & 8) << 28).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_value(code):
    """sign, 4 exponent bits, 3 mantissa bits -> float32, through float16 with its bias 8 larger."""
    code = code.to(tl.int16)
    bits = (code & 0x80) << 8 | (code & 0x7F) << 7
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
