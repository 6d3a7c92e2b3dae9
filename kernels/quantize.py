"""Quantised weights: packed bits with their scales (formats and sources: formats.py).

    quantise    codes = round(w / s),  s = scale · global_scale, one scale per block
    dequantise  w ≈ value(code) · s in float32, then rounded to the wanted dtype

Blocks run along the last dimension, K, which is padded with zeros to a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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

ROUNDINGS = ("nearest", "stochastic")
SCALE_ROUNDINGS = ("floor", "even", "ceil")
TENSORS = ("data", "scale", "global_scale", "nested_scale", "offset")
_CHUNK = 1 << 20  # elements in flight: conversion needs little beyond its result


class QuantizedTensor:
    """A quantised (..., N, K) weight; made by :func:`quantize`, never changed in place.

    Attributes:
        format: a key of ``formats.FORMATS``.
        shape: (..., N, K) of the weight.
        dtype: of the weight that was quantised; what ``dequantize()`` returns.
        data: uint8 (..., N, ceil(K / 2)) after padding to whole blocks for the 4-bit formats, two
            codes per byte, the even column in the low nibble; float8_e4m3fn (..., N, K) otherwise.
        scale: nvfp4 float8_e4m3fn, mxfp4 and mxfp8 float8_e8m0fnu, nf4 float32 or uint8 (double):
            (..., N, blocks); fp8_row float32 (..., N, 1); fp8_block float32
            (..., ceil(N / 128), ceil(K / 128)); fp8_tensor float32 (..., 1, 1).
        global_scale: nvfp4 float32 (..., 1, 1); None otherwise.
        nested_scale, offset: of double-quantised nf4: float32 (ceil(scales / 256),) and ().
    """

    def __init__(
        self,
        format: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        data: Tensor,
        scale: Tensor,
        global_scale: Tensor | None = None,
        nested_scale: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        self.format = format
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.data = data
        self.scale = scale
        self.global_scale = global_scale
        self.nested_scale = nested_scale
        self.offset = offset

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.format}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, {self.bits_per_weight:.3f} bits per weight)"
        )

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        return False

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed data and all scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.numel())

    @property
    def double_quantized(self) -> bool:
        return self.nested_scale is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by attribute name, those that are None left out."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: value for name, value in named.items() if value is not None}

    def metadata(self) -> dict[str, Any]:
        """What :meth:`from_tensors` needs beside the tensors, as JSON types."""
        name = str(self.dtype).removeprefix("torch.")
        return {"format": self.format, "shape": list(self.shape), "dtype": name}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> QuantizedTensor:
        """The inverse of :meth:`tensors` and :meth:`metadata`.

        Raises ValueError for an unknown format, missing or surplus tensors, wrong shapes or dtypes,
        or scales that are not finite.
        """
        name, shape = metadata.get("format"), tuple(metadata.get("shape", ()))
        checks.choice("format", name, tuple(FORMATS))
        dtype = getattr(torch, str(metadata.get("dtype")), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            checks.fail("dtype", metadata.get("dtype"), "the name of a floating-point dtype")
        if len(shape) < 2 or any(not isinstance(n, int) or n < 0 for n in shape):
            checks.fail("shape", shape, "(..., N, K)")
        expected = expected_tensors(str(name), shape, "nested_scale" in tensors)
        if set(tensors) != set(expected):
            checks.fail("tensors", sorted(tensors), sorted(expected))
        for key, (wanted_shape, wanted_dtype) in expected.items():
            got = tensors[key]
            if tuple(got.shape) != wanted_shape or got.dtype != wanted_dtype:
                checks.fail(key, checks.describe(got), f"{wanted_dtype} {wanted_shape}")
            if key != "data" and got.dtype != torch.uint8 and not got.float().isfinite().all():
                checks.fail(key, "a scale that is not finite", "finite scales")
        return cls(str(name), shape, dtype, **tensors)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedTensor:
        """The same codes on another device; ``dtype`` only changes what dequantize() returns."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return QuantizedTensor(self.format, tuple(self.shape), dtype or self.dtype, **moved)

    def scales(self) -> Tensor:
        """float32, shaped like ``scale``: each block's, with global and nested scales applied."""
        rows = slice(0, _matrix(self.scale).shape[0])
        return _row_scales(self, rows).reshape(self.scale.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(..., N, K) in ``dtype`` (default: that of the weight): value · scale in float32 (float64
        for float64), rounded once."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            checks.fail("dtype", dtype, "a floating-point dtype")
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        if out.numel() == 0:
            return out
        high = torch.float64 if dtype == torch.float64 else torch.float32
        data, target, spec = _matrix(self.data), _matrix(out), FORMATS[self.format]
        for rows in _row_chunks(target):
            values = unpack_codes(data[rows], spec.element) if spec.four_bit else data[rows]
            wide = values.to(high)
            target[rows] = (wide * _factors(self, rows, wide.shape[1]))[:, : self.shape[-1]]
        return out


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
    amax = weight.abs().amax(dim=(-2, -1), keepdim=True).float() if weight.numel() else None
    if amax is not None and not amax.isfinite().all():
        checks.fail("weight", "a value that is not finite", "finite values in the range of float32")
    expected = expected_tensors(format, tuple(weight.shape), False)
    made = {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in expected.items()
    }
    if format == "nvfp4":
        made["global_scale"].copy_(_global_scale(amax, E2M1_MAX * E4M3_MAX))
    elif format == "fp8_tensor":
        made["scale"].copy_(_global_scale(amax, E4M3_MAX))
    result = QuantizedTensor(format, tuple(weight.shape), weight.dtype, **made)
    scale_rounding = scale_rounding or ("ceil" if format == "mxfp8" else "even")
    _encode(result, weight, rounding == "stochastic", generator, scale_rounding)
    return _nest_scales(result) if double_quantization else result


def expected_tensors(
    format: str, shape: tuple[int, ...], double: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every tensor of a quantised weight of this shape."""
    spec, (*lead, n, k) = FORMATS[format], shape
    if spec.four_bit:
        blocks = -(-k // spec.block)
        data = ((*lead, n, blocks * spec.block // 2), torch.uint8)
        scale = (*lead, n, blocks)
    else:
        data = ((*lead, n, k), torch.float8_e4m3fn)
        scale = {
            "fp8_tensor": (*lead, 1, 1),
            "fp8_row": (*lead, n, 1),
            "fp8_block": (*lead, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)),
            "mxfp8": (*lead, n, -(-k // 32)),
        }[format]
    result = {"data": data, "scale": (scale, torch.uint8 if double else spec.scale_dtype)}
    if format == "nvfp4":
        result["global_scale"] = ((*lead, 1, 1), torch.float32)
    if double:
        count = torch.Size(scale).numel()
        result["nested_scale"] = ((-(-count // NESTED_BLOCK),), torch.float32)
        result["offset"] = ((), torch.float32)
    return result


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes (N, K), K even, to bytes (N, K / 2): the even column in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_codes(data: Tensor, element: str) -> Tensor:
    """Bytes (N, K / 2) to float32 values (N, K)."""
    values = table(element, data.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return pairs[data.int()].reshape(data.shape[0], -1)


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
    spec, source, data = FORMATS[result.format], _matrix(weight), _matrix(result.data)
    scale = _matrix(result.scale)
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
        factors = _factors(result, rows, wide.shape[1])
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
    factor = _per_row(result.global_scale, result.shape[-2], rows)
    return round_e4m3(amax / (E2M1_MAX * factor))


def _factors(result: QuantizedTensor, rows: slice, width: int) -> Tensor:
    """float32 scale of each element of these rows of the weight: (rows, width), or (rows, 1)."""
    n, block = result.shape[-2], FORMATS[result.format].block
    if result.format == "fp8_tensor":
        return _per_row(result.scale, n, rows)
    if result.format == "fp8_block":
        row = torch.arange(rows.start, rows.stop, device=result.device)
        row = row // n * result.scale.shape[-2] + row % n // FP8_BLOCK
        scales = _matrix(result.scale)[row]
    else:
        scales = _row_scales(result, rows)
    if block:
        scales = scales[..., None].expand(*scales.shape, block).reshape(len(scales), -1)
    return scales[:, :width]


def _row_scales(result: QuantizedTensor, rows: slice) -> Tensor:
    """Rows of ``scale`` (rows, blocks) in float32, with global and nested scales applied."""
    raw = _matrix(result.scale)
    scale = raw[rows]
    if result.nested_scale is not None and result.offset is not None:
        first = rows.start * raw.shape[1]
        group = torch.arange(first, first + scale.numel(), device=raw.device) // NESTED_BLOCK
        values = table("dynamic", raw.device)[scale.int()]
        return values * result.nested_scale[group].view_as(values) + result.offset
    if result.global_scale is not None:
        return scale.float() * _per_row(result.global_scale, result.shape[-2], rows)
    return scale.float()


def _nest_scales(result: QuantizedTensor) -> QuantizedTensor:
    """Quantises nf4's float32 scales: minus their mean, to the 8-bit dynamic code per 256."""
    flat = result.scale.reshape(-1)
    offset = flat.mean() if flat.numel() else flat.new_zeros(())
    groups = _padded((flat - offset)[None], NESTED_BLOCK).view(-1, NESTED_BLOCK)
    nested = _nonzero(groups.abs().amax(-1))
    codes = nearest(groups / nested[:, None], table("dynamic", flat.device)).reshape(-1)
    scale = codes[: flat.numel()].reshape(result.scale.shape).clone()
    return QuantizedTensor(
        result.format, tuple(result.shape), result.dtype, result.data, scale, None, nested, offset
    )


def _global_scale(amax: Tensor | None, largest: float) -> Tensor | float:
    """amax / largest; 1 for a matrix of zeros and for an empty one."""
    return 1.0 if amax is None else _nonzero(amax / largest)


def _nonzero(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, 1.0)


def _block_scales(wide: Tensor) -> Tensor:
    """Up to 128 rows (n, K a multiple of 128): the float32 scale of each 128 columns."""
    amax = wide.view(len(wide), -1, FP8_BLOCK).abs().amax(dim=(0, 2))
    return _nonzero(amax / E4M3_MAX)


def _per_row(per_matrix: Tensor, n: int, rows: slice) -> Tensor:
    """(..., 1, 1) factors of matrices as (rows, 1) factors of their rows."""
    index = torch.arange(rows.start, rows.stop, device=per_matrix.device) // n
    return per_matrix.reshape(-1)[index][:, None]


def _padded(wide: Tensor, block: int) -> Tensor:
    missing = -wide.shape[-1] % block
    return torch.nn.functional.pad(wide, (0, missing)) if missing else wide


def _matrix(x: Tensor) -> Tensor:
    """(..., N, K) as (rows, K), without a copy."""
    return x.reshape(-1, x.shape[-1])


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
