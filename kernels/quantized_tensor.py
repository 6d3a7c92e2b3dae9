"""A quantised weight: packed codes with their scales, and how they become numbers again.

    w ≈ value(code) · scale · global_scale, in float32, rounded once to the wanted dtype

Blocks run along the last dimension, K, which is padded with zeros to a whole number of blocks
(formats and sources: formats.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import checks
from .formats import FORMATS, FP8_BLOCK, NESTED_BLOCK, table

TENSORS = ("data", "scale", "global_scale", "nested_scale", "offset")
_CHUNK = 1 << 18  # elements in flight per thread: few enough for the caches of a core


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
        nested_scale, offset: of double-quantised nf4: float32 (ceil(scales / 256),) and (1,).
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

    def stored(self) -> dict[str, Tensor]:
        """:meth:`tensors` as dtypes that every file format and sharder takes: 8-bit floats as
        uint8 of the same bits. :meth:`from_stored` is the inverse."""
        return {
            name: tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            for name, tensor in self.tensors().items()
        }

    @classmethod
    def from_stored(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> QuantizedTensor:
        """From what :meth:`stored` gave; checks as :meth:`from_tensors` does."""
        name = metadata.get("format")
        checks.choice("format", name, tuple(FORMATS))
        typed = dict(tensors)
        eight_bit = {"data": torch.uint8 if FORMATS[str(name)].four_bit else torch.float8_e4m3fn}
        if FORMATS[str(name)].scale_dtype.itemsize == 1:
            eight_bit["scale"] = FORMATS[str(name)].scale_dtype
        for key, dtype in eight_bit.items():
            if key in typed and typed[key].dtype == torch.uint8:
                typed[key] = typed[key].view(dtype)
        return cls.from_tensors(typed, metadata)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        copy: bool = False,
    ) -> QuantizedTensor:
        """The same codes on another device; ``dtype`` only changes what dequantize() returns.

        With ``copy`` the tensors are new even where nothing changes.
        """
        device = self.device if device is None else device
        moved = {name: tensor.to(device, copy=copy) for name, tensor in self.tensors().items()}
        return QuantizedTensor(self.format, tuple(self.shape), dtype or self.dtype, **moved)

    def scales(self) -> Tensor:
        """float32, shaped like ``scale``: each block's, with global and nested scales applied."""
        rows = slice(0, matrix(self.scale).shape[0])
        return row_scales(self, rows).reshape(self.scale.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(..., N, K) in ``dtype`` (default: that of the weight): value · scale in float32 (float64
        for float64), rounded once."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            checks.fail("dtype", dtype, "a floating-point dtype")
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        decode(self, matrix(out), slice(0, out.shape[:-1].numel()), slice(0, out.shape[-1]))
        return out


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
        result["offset"] = ((1,), torch.float32)
    return result


def decode(weight: QuantizedTensor, out: Tensor, rows: slice, columns: slice) -> None:
    """Writes w[rows, columns] of the weight as a matrix (..., N, K) -> (rows, K) into ``out``.

    ``columns`` starts at a multiple of 128. float64 output takes the product in float64.
    """
    if out.numel() == 0:
        return
    spec, data = FORMATS[weight.format], matrix(weight.data)
    high = torch.float64 if out.dtype == torch.float64 else torch.float32
    per_byte = 2 if spec.four_bit else 1
    width = columns.stop - columns.start
    blocked = max(1, spec.block) if spec.four_bit else 1
    stored = slice(columns.start // per_byte, -(-columns.stop // blocked) * blocked // per_byte)
    step = max(1, _CHUNK * torch.get_num_threads() // max(1, width))
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        values = unpack_codes(data[part, stored].view(torch.uint8), spec.element).to(high)
        values.mul_(element_scales(weight, part, columns.start, values.shape[1]))
        out[part.start - rows.start : part.stop - rows.start] = values[:, :width]


def unpack_codes(data: Tensor, element: str) -> Tensor:
    """Bytes (N, width) to float32 values: two of each byte for the 4-bit elements, one for e4m3."""
    make = _byte_table.__wrapped__ if torch.compiler.is_compiling() else _byte_table
    values = make(element, data.device).index_select(0, data.reshape(-1).int())
    return values.view(torch.float32).view(len(data), -1)


@cache
def _byte_table(element: str, device: torch.device) -> Tensor:
    """What each byte stands for; a pair of values as one int64, so that a lookup fetches both."""
    if element == "e4m3":
        codes = torch.arange(256, dtype=torch.uint8, device=device)
        return codes.view(torch.float8_e4m3fn).float()
    values = table(element, device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return pairs.view(torch.int64).view(-1)


def element_scales(weight: QuantizedTensor, rows: slice, start: int, width: int) -> Tensor:
    """float32 scale of the elements [rows, start : start + width]; (rows, width) or (rows, 1)."""
    n, block = weight.shape[-2], FORMATS[weight.format].block
    if weight.format == "fp8_tensor":
        return per_row(weight.scale, n, rows)
    if weight.format == "fp8_block":
        row = torch.arange(rows.start, rows.stop, device=weight.device)
        row = row // n * weight.scale.shape[-2] + row % n // FP8_BLOCK
        scales = matrix(weight.scale)[row]
    else:
        scales = row_scales(weight, rows)
    if block:
        scales = scales[:, start // block : -(-(start + width) // block)]
        scales = scales[..., None].expand(*scales.shape, block).reshape(len(scales), -1)
        scales = scales[:, :width]
    return scales


def row_scales(weight: QuantizedTensor, rows: slice) -> Tensor:
    """Rows of ``scale`` (rows, blocks) in float32, with global and nested scales applied."""
    raw = matrix(weight.scale)
    scale = raw[rows]
    if weight.nested_scale is not None and weight.offset is not None:
        first = rows.start * raw.shape[1]
        group = torch.arange(first, first + scale.numel(), device=raw.device) // NESTED_BLOCK
        values = table("dynamic", raw.device)[scale.int()]
        return values * weight.nested_scale[group].view_as(values) + weight.offset
    if weight.global_scale is not None:
        return scale.float() * per_row(weight.global_scale, weight.shape[-2], rows)
    return scale.float()


def per_row(per_matrix: Tensor, n: int, rows: slice) -> Tensor:
    """(..., 1, 1) factors of matrices as (rows, 1) factors of their rows."""
    index = torch.arange(rows.start, rows.stop, device=per_matrix.device) // n
    return per_matrix.reshape(-1)[index][:, None]


def matrix(x: Tensor) -> Tensor:
    """(..., N, K) as (rows, K), without a copy."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
