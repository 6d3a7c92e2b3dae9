"""How the norm kernels are launched: tiles, warps and programs from the problem's size alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from .launch import ceil_div, power_of_two

# A wider row does not fit the registers of one block beside its weight gradient.
MAX_WIDTH = 8192
_MIN_BLOCK = 16


@dataclass(frozen=True)
class NormPlan:
    """One launch. A tile is ``tile_rows`` whole rows in ``block`` columns, a power of two.

    ``programs`` is the grid; with fewer programs than tiles each walks over several, loading
    ``num_stages`` - 1 tiles ahead.
    """

    block: int
    tile_rows: int
    programs: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=4096)
def forward_plan(rows: int, width: int, multiprocessors: int) -> NormPlan:
    """One tile per program: 32 elements per thread, 8 or 16 where rows are few."""
    block = _block(width)
    tile_rows = max(4096 // block, 1)
    if ceil_div(rows, tile_rows) >= 2 * multiprocessors:
        return NormPlan(block, tile_rows, ceil_div(rows, tile_rows), max(4, block // 1024), 1)
    tile_rows = max(1024 // block, 1)
    return NormPlan(block, tile_rows, ceil_div(rows, tile_rows), max(4, block // 512), 1)


@lru_cache(maxsize=4096)
def backward_plan(
    rows: int, width: int, itemsize: int, multiprocessors: int, weight_grad: bool
) -> NormPlan:
    """With weight gradients: as many programs as run at once, so that few partial sums are left.

    8 or 16 elements per thread, 4 or more where the rows are few: at most 128 registers, so that 16
    warps share a multiprocessor. The tiles they load ahead, 16 KB of x and dy per 8 warps, keep its
    memory queue full meanwhile.
    """
    block = _block(width)
    num_warps = max(8, block // 512)
    tile_rows = max(4096 // block, 1) if block > 1024 else 2048 // block
    num_stages = 3 if block <= 1024 and itemsize == 2 else 2
    if ceil_div(rows, tile_rows) < multiprocessors:
        tile_rows, num_warps, num_stages = max(1024 // block, 1), max(4, block // 512), 2
    tiles = ceil_div(rows, tile_rows)
    if not weight_grad:
        return NormPlan(block, tile_rows, tiles, num_warps, 1)
    resident = multiprocessors * (16 // num_warps)
    # The same number of tiles for every program, give or take one.
    programs = ceil_div(tiles, max(ceil_div(tiles, resident), 1))
    return NormPlan(block, tile_rows, programs, num_warps, num_stages)


def _block(width: int) -> int:
    return max(power_of_two(width), _MIN_BLOCK)


def too_wide(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernels do not cover ``x`` (..., D), or None."""
    if x.shape[-1] <= MAX_WIDTH:
        return None
    return f"{x.shape[-1]} columns; accepted: up to {MAX_WIDTH}, a row that one block holds"
