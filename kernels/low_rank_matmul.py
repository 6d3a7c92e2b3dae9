"""x · W plus a low-rank term, W dequantised some rows or columns at a time into reused scratch.

    forward    out (M, N) = bias + alpha · left rightᵀ + x Wᵀ        left (M, r), right (N, r)
    transposed out (M, K) = alpha · left right + dy W                left (M, r), right (r, K)

Every output element is one matrix product over all of its terms, so cutting the weight into pieces
changes no sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .library import define
from .quantized_tensor import QuantizedTensor, decode
from .workspace import scratch

PARTS = ("data", "scale", "global_scale", "nested_scale", "offset")
Decode = Callable[[QuantizedTensor, Tensor, slice, slice], None]
Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Dequantised bytes in flight. A GPU's piece stays in its L2 cache; a CPU has no cache to hit, so
# larger pieces only mean fewer calls.
SCRATCH_BYTES = {"cuda": 24 << 20, "cpu": 64 << 20}
_ALIGN = 128  # columns: whole blocks of every format


def parts_of(weight: Tensor | QuantizedTensor) -> tuple[Parts, str, list[int]]:
    """A weight as tensors, format ("" for a Tensor) and shape."""
    if isinstance(weight, QuantizedTensor):
        tensors = tuple(getattr(weight, name) for name in PARTS)
        return tensors, weight.format, list(weight.shape)
    return (weight, None, None, None, None), "", list(weight.shape)


def scratch_bytes(shape: tuple[int, int], dtype: torch.dtype, device: str) -> int:
    """Bytes of scratch that a product with a quantised weight of this (N, K) holds at most."""
    n, k = shape
    size = torch.finfo(dtype).bits // 8
    limit = SCRATCH_BYTES.get(device, SCRATCH_BYTES["cuda"])
    rows = min(n, max(1, limit // max(1, k * size)))
    columns = min(k, _column_step(n, size, limit))
    return max(rows * k, n * columns) * size


def _column_step(n: int, size: int, limit: int) -> int:
    return max(_ALIGN, limit // max(1, n * size) // _ALIGN * _ALIGN)


def in_pieces(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    nested_scale: Tensor | None,
    offset: Tensor | None,
    format: str,
    shape: list[int],
    transposed: bool,
    left: Tensor | None,
    right: Tensor | None,
    alpha: float,
    bias: Tensor | None,
    decode: Decode = decode,
) -> Tensor:
    """The product with the weight dequantised by ``decode`` in pieces of the scratch's size."""
    n, k = shape
    width = k if transposed else n
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    # (inner, width) views: the columns of both are the columns of the output.
    right = right if right is None or transposed else right.t()
    if not format:
        _product(out, x, data if transposed else data.t(), left, right, alpha, bias)
        return out
    assert scale is not None
    weight = QuantizedTensor(
        format, (n, k), x.dtype, data, scale, global_scale, nested_scale, offset
    )
    limit = SCRATCH_BYTES.get(x.device.type, SCRATCH_BYTES["cuda"])
    size = x.element_size()
    step = _column_step(n, size, limit) if transposed else max(1, limit // max(1, k * size))
    step = min(step, width)
    elements = step * (n if transposed else k)
    buffer = _scratch(elements, x)
    for start in range(0, width, step):
        piece = slice(start, min(start + step, width))
        count = piece.stop - piece.start
        if transposed:
            dense = buffer[: n * count].view(n, count)
            decode(weight, dense, slice(0, n), piece)
        else:
            rows = buffer[: count * k].view(count, k)
            decode(weight, rows, piece, slice(0, k))
            dense = rows.t()
        _product(
            *(out[:, piece], x, dense, left, None if right is None else right[:, piece]),
            *(alpha, None if bias is None else bias[piece]),
        )
    return out


def _scratch(elements: int, like: Tensor) -> Tensor:
    """A CPU thread keeps its buffer between calls; a GPU's caching allocator does that itself."""
    if like.device.type == "cpu":
        return scratch().take("dequantized", (elements,), like, like.dtype)
    return torch.empty(elements, dtype=like.dtype, device=like.device)


def _product(
    out: Tensor,
    x: Tensor,
    dense: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    alpha: float,
    bias: Tensor | None,
) -> None:
    """out = bias + alpha · left right + x dense; the terms before the last start the sum."""
    if left is not None and right is not None:
        start = out if bias is None else bias
        torch.addmm(start, left, right, beta=0 if bias is None else 1, alpha=alpha, out=out)
        torch.addmm(out, x, dense, out=out)
    elif bias is not None:
        torch.addmm(bias, x, dense, out=out)
    else:
        torch.mm(x, dense, out=out)


def fake(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    nested_scale: Tensor | None,
    offset: Tensor | None,
    format: str,
    shape: list[int],
    transposed: bool,
    left: Tensor | None,
    right: Tensor | None,
    alpha: float,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], shape[1] if transposed else shape[0])


SCHEMA = (
    "{name}(Tensor x, Tensor data, Tensor? scale, Tensor? global_scale, Tensor? nested_scale, "
    "Tensor? offset, str format, SymInt[] shape, bool transposed, Tensor? left, Tensor? right, "
    "float alpha, Tensor? bias) -> Tensor"
)

# The product by the engine that runs it; Triton's joins when it loads.
MATMULS = {"torch": define(SCHEMA.format(name="low_rank_matmul"), in_pieces, fake)}
