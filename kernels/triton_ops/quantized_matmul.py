"""Products with a quantised weight W (N, K): fused for few rows, through scratch for many.

    forward     out (M, N) = bias + alpha · left rightᵀ + x Wᵀ     left (M, r), right (N, r)
    transposed  out (M, K) = alpha · left right + dy W             left (M, r), right (r, K)

Few rows: a program decodes its tiles of W in registers and multiplies, so W is read once, packed.
The decoded tile is the left operand of the forward product (outᵀ = W xᵀ), which Hopper takes from
registers. Many rows: decoding once into scratch that stays in the L2 cache and cuBLAS is faster,
since every row block would decode W again.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS
from ..library import define
from ..lora_linear_torch import lora_linear_with
from ..low_rank_matmul import MATMULS, SCHEMA, fake, in_pieces
from ..swiglu_mlp_torch import swiglu_mlp_with
from .launch import ceil_div, on_device
from .machine_code import REGISTER_A, TRITON_TYPES, Case
from .quantized_tiles import Operand, constants_of, decode_tile, operand, pointer_types

# Up to this many rows, of half precision, the weight is decoded inside the product.
FUSED_ROWS = 256

# Columns of the adapter's rank that one step of the sum takes: the least that a product may have.
RANK_STEP = tl.constexpr(16)


def lora_linear(x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, **options: Any) -> Tensor:
    """x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias; see ``kernels.lora_linear``."""
    return lora_linear_with("triton", x, weight, lora_a, lora_b, **options)


def quantized_linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias; see ``kernels.quantized_linear``."""
    return lora_linear_with("triton", x, weight, None, None, bias=bias)


def swiglu_mlp(x: Tensor, w_gate: Any, w_up: Any, w_down: Any, **options: Any) -> Tensor:
    """down(silu(gate(x)) · up(x)); see ``kernels.swiglu_mlp``."""
    return swiglu_mlp_with("triton", x, w_gate, w_up, w_down, **options)


@triton.jit
def _product_kernel(
    x, data, scale, global_scale, nested_scale, offset, values, codes, left, right, bias, out,
    stride_x, stride_data, stride_scale, stride_left, stride_right,
    m, n, k, rank, n_bias, alpha,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """outᵀ (N, M) = bias + alpha · right leftᵀ + W xᵀ; a tile (BLOCK_N, BLOCK_M) per program.

    Without an adapter ``rank`` is 0, without a bias ``n_bias`` is 0 instead of n.
    """
    tiles_n = (n - 1) // BLOCK_N + 1
    i_n = tl.program_id(0) % tiles_n * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)[:, None]
    o_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    m_n, m_m = o_n < n, o_m < m
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for i_r in range(0, rank, RANK_STEP):
        o_r = i_r + tl.arange(0, RANK_STEP)
        p_left = left + o_m * stride_left + o_r[:, None]
        p_right = right + o_n.to(tl.int64) * stride_right + o_r[None, :]
        low = tl.load(p_left, mask=m_m & (o_r[:, None] < rank), other=0.0)
        high = tl.load(p_right, mask=m_n & (o_r[None, :] < rank), other=0.0)
        acc = tl.dot(high, low, acc)
    acc *= alpha
    for i_k in range(0, k, BLOCK_K):
        w = decode_tile(
            data, scale, global_scale, nested_scale, offset, values, codes,
            stride_data, stride_scale, i_n, i_k, n, ELEMENT, SCALE, BLOCK, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        o_k = i_k + tl.arange(0, BLOCK_K)[:, None]
        rows = tl.load(x + o_m.to(tl.int64) * stride_x + o_k, mask=m_m & (o_k < k), other=0.0)
        acc = tl.dot(w.to(x.dtype.element_ty), rows, acc)
    acc += tl.load(bias + o_n, mask=o_n < n_bias, other=0.0).to(tl.float32)
    value = acc.to(out.dtype.element_ty)
    tl.store(out + o_m.to(tl.int64) * n + o_n, value, mask=m_m & m_n)


@triton.jit
def _transposed_kernel(
    x, data, scale, global_scale, nested_scale, offset, values, codes, left, right, out,
    stride_x, stride_data, stride_scale, stride_left, stride_right, m, n, k, rank, alpha,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, K) = alpha · left right + x W, x (M, N); a tile (BLOCK_M, BLOCK_K) per program."""
    tiles_k = (k - 1) // BLOCK_K + 1
    i_k = tl.program_id(0) % tiles_k * BLOCK_K
    o_k = i_k + tl.arange(0, BLOCK_K)[None, :]
    o_m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_k, m_m = o_k < k, o_m < m
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for i_r in range(0, rank, RANK_STEP):
        o_r = i_r + tl.arange(0, RANK_STEP)
        p_left = left + o_m.to(tl.int64) * stride_left + o_r[None, :]
        p_right = right + o_r[:, None].to(tl.int64) * stride_right + o_k
        low = tl.load(p_left, mask=m_m & (o_r[None, :] < rank), other=0.0)
        high = tl.load(p_right, mask=m_k & (o_r[:, None] < rank), other=0.0)
        acc = tl.dot(low, high, acc)
    acc *= alpha
    for i_n in range(0, n, BLOCK_N):
        w = decode_tile(
            data, scale, global_scale, nested_scale, offset, values, codes,
            stride_data, stride_scale, i_n, i_k, n, ELEMENT, SCALE, BLOCK, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        o_n = i_n + tl.arange(0, BLOCK_N)[None, :]
        rows = tl.load(x + o_m.to(tl.int64) * stride_x + o_n, mask=m_m & (o_n < n), other=0.0)
        acc = tl.dot(rows, w.to(x.dtype.element_ty), acc)
    value = acc.to(out.dtype.element_ty)
    tl.store(out + o_m.to(tl.int64) * k + o_k, value, mask=m_m & m_k)


@triton.jit
def _decode_kernel(
    data, scale, global_scale, nested_scale, offset, values, codes, out,
    stride_data, stride_scale, stride_out, row_start, column_start, n_rows, row_stop, column_stop,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = w[row_start : row_stop, column_start : column_stop], a tile per program."""
    tiles_k = (column_stop - column_start - 1) // BLOCK_K + 1
    row = row_start + tl.program_id(0) // tiles_k * BLOCK_N
    column = column_start + tl.program_id(0) % tiles_k * BLOCK_K
    w = decode_tile(
        data, scale, global_scale, nested_scale, offset, values, codes,
        stride_data, stride_scale, row, column, n_rows, ELEMENT, SCALE, BLOCK, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    o_n = row + tl.arange(0, BLOCK_N)[:, None]
    o_k = column + tl.arange(0, BLOCK_K)[None, :]
    p_out = out + (o_n - row_start).to(tl.int64) * stride_out + (o_k - column_start)
    tl.store(p_out, w.to(out.dtype.element_ty), mask=(o_n < row_stop) & (o_k < column_stop))


@dataclass(frozen=True)
class MatmulPlan:
    """Tile sizes of one launch."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


def matmul_plan(m: int, transposed: bool) -> MatmulPlan:
    """Tiles for M rows: 16 or 64 of them, by 64 of the output's other dimension."""
    if transposed:
        return MatmulPlan(64, 64, 64, num_warps=4, num_stages=3)
    return MatmulPlan(16 if m <= 16 else 64, 64, 128, num_warps=4, num_stages=3)


def _low_rank_matmul(
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
    parts = (data, scale, global_scale, nested_scale, offset)
    arguments = (transposed, left, right, alpha, bias)
    whole = not format or scale is None or x.dtype == torch.float32
    if whole or x.shape[0] > FUSED_ROWS:
        return in_pieces(x, *parts, format, shape, *arguments, decode=_decode)
    n, k = shape
    out = torch.empty(x.shape[0], k if transposed else n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    assert scale is not None
    packed = operand(format, data, scale, global_scale, nested_scale, offset)
    _launch_fused(x.contiguous(), packed, (n, k), transposed, left, right, alpha, bias, out)
    return out


def _launch_fused(
    x: Tensor,
    packed: Operand,
    shape: tuple[int, int],
    transposed: bool,
    left: Tensor | None,
    right: Tensor | None,
    alpha: float,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    (m, width), (n, k) = out.shape, shape
    rank = 0 if left is None else left.shape[1]
    plan = matmul_plan(m, transposed)
    left = x if left is None else left.contiguous()
    right = x if right is None else right.contiguous()
    across = plan.block_k if transposed else plan.block_n
    kernel = _transposed_kernel if transposed else _product_kernel
    own: dict[str, Any] = {}
    if not transposed:
        own = {"bias": x if bias is None else bias.contiguous(), "n_bias": 0 if bias is None else n}
    with on_device(x):
        kernel[(ceil_div(m, plan.block_m) * ceil_div(width, across),)](
            x=x,
            left=left,
            right=right,
            out=out,
            stride_x=x.stride(0),
            stride_left=left.stride(0),
            stride_right=right.stride(0),
            m=m,
            n=n,
            k=k,
            rank=rank,
            alpha=alpha,
            **packed.tensors,
            **packed.strides,
            **packed.constants,
            **plan.constants,
            **own,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )


DECODE_TILE = (32, 128)


def _decode(weight: Any, out: Tensor, rows: slice, columns: slice) -> None:
    """``decode`` of quantized_tensor.py as one kernel."""
    if out.numel() == 0:
        return
    parts = (weight.data, weight.scale, weight.global_scale, weight.nested_scale, weight.offset)
    packed = operand(weight.format, *parts)
    block_n, block_k = DECODE_TILE
    height, width = rows.stop - rows.start, columns.stop - columns.start
    with on_device(out):
        _decode_kernel[(ceil_div(height, block_n) * ceil_div(width, block_k),)](
            out=out,
            stride_out=out.stride(0),
            row_start=rows.start,
            column_start=columns.start,
            n_rows=weight.shape[0],
            row_stop=rows.stop,
            column_stop=columns.stop,
            **packed.tensors,
            **packed.strides,
            **packed.constants,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
        )


MATMULS["triton"] = define(SCHEMA.format(name="triton_low_rank_matmul"), _low_rank_matmul, fake)


def machine_code_cases(arch: int) -> Iterator[Case]:
    """Every format: decoding in every dtype, both products at every tile size in half precision."""
    for format in FORMATS:
        for nested in (False, True) if format == "nf4" else (False,):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                yield _decode_case(arch, dtype, format, nested)
            for dtype in (torch.bfloat16, torch.float16):
                yield from _product_cases(arch, dtype, format, nested)


def _decode_case(arch: int, dtype: torch.dtype, format: str, nested: bool) -> Case:
    bounds = ("row_start", "column_start", "n_rows", "row_stop", "column_stop", "stride_out")
    packed = pointer_types(format, nested) | {"stride_data": "i32", "stride_scale": "i32"}
    return Case(
        kernel=_decode_kernel,
        arch=arch,
        signature=packed | {"out": f"*{TRITON_TYPES[dtype]}"} | dict.fromkeys(bounds, "i32"),
        constants=constants_of(format, nested)
        | {"BLOCK_N": DECODE_TILE[0], "BLOCK_K": DECODE_TILE[1]},
        num_warps=4,
        aligned=("stride_data", "stride_out", "column_start"),
    )


def _product_cases(arch: int, dtype: torch.dtype, format: str, nested: bool) -> Iterator[Case]:
    element = TRITON_TYPES[dtype]
    packed = pointer_types(format, nested) | {"stride_data": "i32", "stride_scale": "i32"}
    sizes = ("stride_x", "stride_left", "stride_right", "m", "n", "k", "rank")
    signature = packed | dict.fromkeys(sizes, "i32") | {"alpha": "fp32"}
    signature |= dict.fromkeys(("x", "left", "right", "out"), f"*{element}")
    for transposed in (False, True):
        own = {} if transposed else {"bias": f"*{element}", "n_bias": "i32"}
        hopper = ("HGMMA",) if transposed else ("HGMMA", REGISTER_A)
        for plan in sorted({matmul_plan(m, transposed) for m in (1, FUSED_ROWS)}, key=str):
            yield Case(
                kernel=_transposed_kernel if transposed else _product_kernel,
                arch=arch,
                signature=signature | own,
                constants=constants_of(format, nested) | plan.constants,
                num_warps=plan.num_warps,
                num_stages=plan.num_stages,
                aligned=("stride_x", "stride_data", "n", "k"),
                expects=hopper if arch == 90 else (),
            )
