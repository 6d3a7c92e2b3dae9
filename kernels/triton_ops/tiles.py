"""How elementwise kernels cut (N, D) rows into tiles, and what a tile's addresses are.

Rows that lie one after another in memory are one long row: no element is lost to the odd width of D
and every full tile is read in 16-byte vectors. Rows apart from each other, as the halves of a fused
projection are, become tiles of a few rows.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div

# Bytes per tensor that a tile moves: with 128 threads two 16-byte vectors each, which keeps enough
# loads in flight and still makes thousands of programs of a training step's activations.
TILE_BYTES = 4096
NUM_WARPS = 4

# Bytes across a tile of rows that lie apart: one 16-byte vector per thread, or narrow rows.
ROW_BYTES = (256, 2048)


@dataclass(frozen=True)
class TilePlan:
    """Tiles of ``block_rows`` x ``block_columns`` over ``rows`` x ``columns``, one program each."""

    rows: int
    columns: int
    block_rows: int
    block_columns: int
    num_warps: int

    @property
    def column_blocks(self) -> int:
        return ceil_div(self.columns, self.block_columns)

    @property
    def programs(self) -> int:
        return ceil_div(self.rows, self.block_rows) * self.column_blocks

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_R": self.block_rows, "BLOCK_C": self.block_columns}


def plan_tiles(rows: int, columns: int, itemsize: int, contiguous: bool) -> TilePlan:
    """Tiles for elements of ``itemsize`` bytes; ``contiguous`` rows count as one."""
    elements = TILE_BYTES // itemsize
    if contiguous:
        return TilePlan(1, rows * columns, 1, elements, NUM_WARPS)
    block_columns = row_block(columns, itemsize)
    return TilePlan(rows, columns, elements // block_columns, block_columns, NUM_WARPS)


def row_block(columns: int, itemsize: int) -> int:
    """Columns per tile of rows that lie apart; few values, so that each is compiled and checked."""
    narrow, wide = (width // itemsize for width in ROW_BYTES)
    return narrow if columns <= narrow else wide


def contiguous_rows(*tensors: Tensor) -> bool:
    """Whether every (N, D) tensor lies in memory without gaps, row after row."""
    return all(t.is_contiguous() for t in tensors)


def tile_configurations(dtype: torch.dtype) -> list[dict[str, int]]:
    """The constants of every plan that tensors of ``dtype`` can get."""
    size = dtype.itemsize
    plans = [plan_tiles(1, 1, size, True), *(plan_tiles(1, n, size, False) for n in (1, 4096))]
    return [plan.constants for plan in plans]


@triton.jit
def tile_of(program, n_rows, n_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's tile: (first row, first column, rows left, columns left), 64-bit."""
    blocks = (n_columns - 1) // BLOCK_C + 1
    row = (program // blocks).to(tl.int64) * BLOCK_R
    column = (program % blocks).to(tl.int64) * BLOCK_C
    return row, column, n_rows - row, n_columns - column


@triton.jit
def is_full(tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether the tile ends before the edges; only then are loads vectors at any width of D."""
    return (tile[2] >= BLOCK_R) & (tile[3] >= BLOCK_C)


@triton.jit
def load_tile(
    pointer, stride, tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr
):
    """A tile (BLOCK_R, BLOCK_C) as float32; elements beyond the edges are 0."""
    p_tile = pointer + tile[0] * stride + tile[1] + _offsets(stride, BLOCK_R, BLOCK_C)
    if MASKED:
        return tl.load(p_tile, mask=_inside(tile, BLOCK_R, BLOCK_C), other=0.0).to(tl.float32)
    else:
        return tl.load(p_tile).to(tl.float32)


@triton.jit
def store_tile(
    pointer, stride, tile, value,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes what lies inside the edges, in the pointer's dtype."""
    p_tile = pointer + tile[0] * stride + tile[1] + _offsets(stride, BLOCK_R, BLOCK_C)
    value = value.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(p_tile, value, mask=_inside(tile, BLOCK_R, BLOCK_C))
    else:
        tl.store(p_tile, value)


@triton.jit
def _offsets(stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.arange(0, BLOCK_R)[:, None].to(tl.int64) * stride + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def _inside(tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    return (tl.arange(0, BLOCK_R)[:, None] < tile[2]) & (tl.arange(0, BLOCK_C)[None, :] < tile[3])
