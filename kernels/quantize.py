"""Quantised weights: packed bits with their scales (formats and sources: formats.py).

    codes = round(w / s),  s = scale · global_scale, one scale per block

Blocks run along the last dimension, K, which is padded with zeros to a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks
from .formats import (
    E2M1_MAX,
    E4M3_MAX,
    FORMATS,
    FP8_BLOCK,
    NESTED_BLOCK,
    nearest,
    power_of_two_scale,
    round_e2m1,
    round_e4m3,
    round_nf4,
    table,
)
from .quantized_tensor import QuantizedTensor, element_scales, expected_tensors, matrix, per_row

ROUNDINGS = ("nearest", "stochastic")
SCALE_ROUNDINGS = ("floor", "even", "ceil")
_CHUNK = 1 << 20  # elements in flight: conversion needs little beyond its result


def quantize(
    weight: Tensor,
    format: str = "nvfp4",
    *,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    double_quantization: bool = False,
    scale_rounding: str | None = None,
) -> QuantizedTensor:
    """Quantises a weight; the result has no gradient.

    Args:
        weight: (..., N, K), floating point; leading dimensions (experts) are quantised one by one.
        format: "nvfp4", "mxfp4", "nf4", "fp8_tensor", "fp8_row", "fp8_block" or "mxfp8".
        rounding: "nearest" (ties to even) or "stochastic" (unbiased for values in range).
        generator: source of the randomness of "stochastic".
        double_quantization: 8-bit scales, for nf4 only.
        scale_rounding: of the power-of-two scales of mxfp4 (default "even") and mxfp8 (default
            "ceil"): "floor" (the OCP rule), "even" or "ceil".

    Raises:
        ValueError: an argument is wrong, or the weight holds a value that is not finite.
    """
    checks.floating("weight", weight, "... N K")
    checks.choice("format", format, tuple(FORMATS))
    checks.choice("rounding", rounding, ROUNDINGS)
    if double_quantization and format != "nf4":
        checks.fail("double_quantization", f"True for {format}", "True for nf4 only")
    if scale_rounding is not None:
        checks.choice("scale_rounding", scale_rounding, SCALE_ROUNDINGS)
        if format not in ("mxfp4", "mxfp8"):
            checks.fail("scale_rounding", f"{scale_rounding!r} for {format}", "mxfp4 or mxfp8 only")
    weight = weight.detach()
    amax = _largest_magnitude(weight) if weight.numel() else None
    if amax is not None and not amax.isfinite().all():
        checks.fail("weight", "a value that is not finite", "finite values in the range of float32")
    expected = expected_tensors(format, tuple(weight.shape), False)
    made = {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in expected.items()
    }
    if format == "nvfp4":
        _set_global_scale(made["global_scale"], amax, E2M1_MAX * E4M3_MAX)
    elif format == "fp8_tensor":
        _set_global_scale(made["scale"], amax, E4M3_MAX)
    result = QuantizedTensor(format, tuple(weight.shape), weight.dtype, **made)
    scale_rounding = scale_rounding or ("ceil" if format == "mxfp8" else "even")
    _encode(result, weight, rounding == "stochastic", generator, scale_rounding)
    return _nest_scales(result) if double_quantization else result


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes (N, K), K even, to bytes (N, K / 2): the even column in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _encode(
    result: QuantizedTensor,
    weight: Tensor,
    stochastic: bool,
    generator: torch.Generator | None,
    scale_rounding: str,
) -> None:
    """Fills data and scale of ``result``, some rows at a time."""
    if weight.numel() == 0:
        result.scale.view(torch.uint8).zero_()
        return
    spec, source, data = FORMATS[result.format], matrix(weight), matrix(result.data)
    scale = matrix(result.scale)
    n = weight.shape[-2]
    for rows in _row_chunks(source, n if result.format == "fp8_block" else 0):
        wide = _padded(source[rows].float(), max(1, spec.block))
        if result.format == "fp8_block":
            first = rows.start // n * result.scale.shape[-2] + rows.start % n // FP8_BLOCK
            scale[first] = _block_scales(wide)
        elif result.format == "fp8_row":
            scale[rows] = _nonzero(wide.abs().amax(-1, keepdim=True) / E4M3_MAX)
        elif spec.block:
            amax = wide.view(len(wide), -1, spec.block).abs().amax(-1)
            scale[rows] = _block_scale(result, amax, rows, scale_rounding)
        factors = element_scales(result, rows, 0, wide.shape[1])
        wide = torch.where(factors > 0, wide / factors, 0.0)
        noise = None
        if stochastic:
            noise = torch.rand(wide.shape, generator=generator, device=wide.device)
        if spec.four_bit:
            codes = round_e2m1(wide, noise) if spec.element == "e2m1" else round_nf4(wide, noise)
            data[rows] = pack_codes(codes)
        else:
            data[rows] = round_e4m3(wide, noise)[:, : data.shape[1]]


def _block_scale(result: QuantizedTensor, amax: Tensor, rows: slice, scale_rounding: str) -> Tensor:
    if result.format == "nf4":
        return _nonzero(amax)
    if result.format != "nvfp4":
        return power_of_two_scale(amax, FORMATS[result.format].element, scale_rounding)
    assert result.global_scale is not None
    factor = per_row(result.global_scale, result.shape[-2], rows)
    return round_e4m3(amax / (E2M1_MAX * factor))


def _nest_scales(result: QuantizedTensor) -> QuantizedTensor:
    """Quantises nf4's float32 scales: minus their mean, to the 8-bit dynamic code per 256."""
    flat = result.scale.reshape(-1)
    offset = flat.mean()[None] if flat.numel() else flat.new_zeros(1)
    groups = _padded((flat - offset)[None], NESTED_BLOCK).view(-1, NESTED_BLOCK)
    nested = _nonzero(groups.abs().amax(-1))
    codes = nearest(groups / nested[:, None], table("dynamic", flat.device)).reshape(-1)
    scale = codes[: flat.numel()].reshape(result.scale.shape).clone()
    return QuantizedTensor(
        result.format, tuple(result.shape), result.dtype, result.data, scale, None, nested, offset
    )


def _largest_magnitude(weight: Tensor) -> Tensor:
    """float32 (..., 1, 1) of each matrix, without a copy of it; NaN and infinity come through."""
    top, bottom = (f(weight, dim=(-2, -1), keepdim=True) for f in (torch.amax, torch.amin))
    return torch.maximum(top, -bottom).float()


def _set_global_scale(scale: Tensor, amax: Tensor | None, largest: float) -> None:
    """amax / largest; 1 for a matrix of zeros and for an empty one."""
    if amax is None:
        scale.fill_(1.0)
    else:
        scale.copy_(_nonzero(amax / largest))


def _nonzero(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, 1.0)


def _block_scales(wide: Tensor) -> Tensor:
    """Up to 128 rows (n, K a multiple of 128): the float32 scale of each 128 columns."""
    amax = wide.view(len(wide), -1, FP8_BLOCK).abs().amax(dim=(0, 2))
    return _nonzero(amax / E4M3_MAX)


def _padded(wide: Tensor, block: int) -> Tensor:
    missing = -wide.shape[-1] % block
    return torch.nn.functional.pad(wide, (0, missing)) if missing else wide


def _row_chunks(x: Tensor, matrix_rows: int = 0) -> Iterator[slice]:
    """Slices of rows of about _CHUNK elements; of FP8_BLOCK rows within one matrix of that many."""
    total, width = x.shape
    if matrix_rows:
        for first in range(0, total, matrix_rows):
            for start in range(first, first + matrix_rows, FP8_BLOCK):
                yield slice(start, min(start + FP8_BLOCK, first + matrix_rows))
        return
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
