"""How linear_cross_entropy cuts rows and classes, and how many bytes it needs beside its results.

R selected rows, V classes, H width. Everything here is a function of shapes, element sizes and the
architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .launch import MULTIPROCESSORS, ceil_div, power_of_two

# Logits in memory at once, as a part of all of them.
PART = 16

# Rows of a chunk. A chunk's products read the whole weight, which they hide from about 300 rows on
# (flops per byte of the newest parts); a few hundred more fill the GPU with output tiles.
MIN_CHUNK, MAX_CHUNK = 512, 1024

# Logits that are always worth a chunk: with few classes more rows are needed to fill the GPU.
MIN_CHUNK_BYTES = 32 << 20

ROW_STEP, CLASS_STEP = 128, 128  # tiles of the matrix product, lengths of aligned rows
# Of one program's tile: 32 elements per thread to reduce, 16 where the results, a softcap's slope
# and a bias gradient's share stand in registers beside them.
TILE_ELEMENTS, WALK_ELEMENTS = 4096, 2048
MAX_BLOCK, WALK_BLOCK = 4096, 1024
NUM_WARPS = 4
RESIDENT = 4  # programs per multiprocessor that walk at the same time


@dataclass(frozen=True)
class Plan:
    """Two passes over the logits, in pieces.

    The first takes ``chunk_rows`` rows of all classes at a time, the second, which makes the
    weight's gradient, ``tile_classes`` classes of all rows. The gradients of the logits of the
    first ``stored_rows`` rows wait between the two in the weight's gradient, which is written last.
    ``wide_product``: the gradient of a tile goes through float32, since a library may split the sum
    of a product with few output tiles and add up the parts in half precision.
    """

    rows: int
    classes: int
    width: int
    chunk_rows: int
    tile_classes: int
    stored_rows: int
    wide_product: bool
    arch: int

    @property
    def chunks(self) -> int:
        return ceil_div(self.rows, self.chunk_rows)

    @property
    def chunk_stride(self) -> int:
        """Elements from row to row of a chunk."""
        return CLASS_STEP * ceil_div(self.classes, CLASS_STEP)

    @property
    def tile_stride(self) -> int:
        return CLASS_STEP * ceil_div(self.tile_classes, CLASS_STEP)

    @property
    def tiles(self) -> list[slice]:
        """The classes of each tile."""
        starts = range(0, self.classes, self.tile_classes)
        return [slice(at, min(at + self.tile_classes, self.classes)) for at in starts]

    @property
    def chunk_elements(self) -> int:
        return min(self.chunk_rows, self.rows) * self.chunk_stride

    @property
    def tile_elements(self) -> int:
        return self.rows * self.tile_stride

    @property
    def segment(self) -> int:
        """Classes that one program of the statistics kernel reads."""
        return min(max(power_of_two(self.classes), 64), MAX_BLOCK)

    @property
    def segments(self) -> int:
        return ceil_div(self.classes, self.segment)

    @property
    def products(self) -> float:
        """Matrix products of R·V·H that a training step costs, 3 being the least."""
        return 3.0 if self.chunks == 1 else 4.0 - self.stored_rows / self.rows


@lru_cache(maxsize=4096)
def plan_passes(
    rows: int, classes: int, width: int, itemsize: int, weight_itemsize: int, arch: int
) -> Plan:
    """``itemsize``: bytes of an element of the logits, ``weight_itemsize`` of the weight's
    gradient where the same call computes it, else 0."""
    fill = max(1, MIN_CHUNK_BYTES // (classes * itemsize))
    most = max(min(max(rows // PART, MIN_CHUNK), MAX_CHUNK), fill)
    chunks = max(1, ceil_div(rows, most))
    chunk_rows = rows if chunks == 1 else _up(ceil_div(rows, chunks), ROW_STEP)
    tile_classes, stored = classes, 0
    if chunks > 1:
        # Half a chunk: beside a tile the second pass may hold a copy of the selected input.
        fitting = chunk_rows * _up(classes, CLASS_STEP) // (2 * rows) // CLASS_STEP * CLASS_STEP
        tiles = ceil_div(classes, max(fitting, CLASS_STEP))
        tile_classes = min(_up(ceil_div(classes, tiles), CLASS_STEP), classes)
        stored = min(rows, width * weight_itemsize // itemsize)
    output_tiles = ceil_div(tile_classes, 128) * ceil_div(width, 128)
    wide = itemsize < 4 and output_tiles < 2 * MULTIPROCESSORS[arch]
    return Plan(rows, classes, width, max(chunk_rows, 1), tile_classes, stored, wide, arch)


@dataclass(frozen=True)
class Walk:
    """Tiles of the gradient kernel; a program walks down ``walk`` rows of ``block_columns``."""

    block_rows: int
    block_columns: int
    walk: int
    ranges: int
    programs: int


def plan_walk(rows: int, columns: int, bias_grad: bool, arch: int) -> Walk:
    """One tile per program; with a bias gradient, enough rows per program to fill the GPU once."""
    block_columns = min(max(power_of_two(columns), 64), WALK_BLOCK)
    block_rows = WALK_ELEMENTS // block_columns
    blocks = ceil_div(columns, block_columns)
    walk = block_rows
    if bias_grad:
        most = max(1, MULTIPROCESSORS[arch] * RESIDENT // blocks)
        walk *= ceil_div(ceil_div(rows, block_rows), most)
    ranges = ceil_div(rows, walk)
    return Walk(block_rows, block_columns, walk, ranges, ranges * blocks)


def plan_losses(plan: Plan) -> tuple[int, int]:
    """Rows per program of the statistics kernel and of the losses kernel."""
    return TILE_ELEMENTS // plan.segment, max(1, 256 // power_of_two(plan.segments))


Needs = tuple[bool, bool, bool]  # gradients of input, weight and bias


def temporary_bytes(
    plan: Plan, itemsize: int, needs: Needs, *, selected: bool = False, in_forward: bool = True
) -> int:
    """The most bytes that forward or backward hold beside arguments and returned gradients.

    Everything has elements of ``itemsize``; ``selected``: there are ``rows``; ``in_forward``: one
    call makes all gradients. Under autocast the casts of input and weight come on top, as in eager.
    """
    first = row_pass_bytes(plan, itemsize, needs, selected, in_forward)
    second = class_pass_bytes(plan, itemsize, needs, selected, in_forward)
    return max(sum(first.values()), sum(second.values()))


def row_pass_bytes(
    plan: Plan, itemsize: int, needs: Needs, selected: bool, in_forward: bool = True
) -> dict[str, int]:
    """Buffers of the first pass: those of its whole, then the largest of its three steps'."""
    chunk = min(plan.chunk_rows, plan.rows)
    need_b = needs[2] and in_forward
    ranges = plan_walk(chunk, plan.classes, True, plan.arch).ranges
    part = 4 * (selected or itemsize < 4) + itemsize * (selected and itemsize < 4)
    steps = (
        4 * 3 * chunk * plan.segments,
        4 * need_b * (ranges + 1) * plan.classes,
        needs[0] * part * chunk * plan.width,
    )
    return _row_bytes(plan.rows, selected) | {
        "logits": itemsize * plan.chunk_elements,
        "input": itemsize * selected * chunk * plan.width,
        "db": 4 * need_b * plan.classes,
        "statistics of segments, partial sums of db or dx": max(steps),
    }


def class_pass_bytes(
    plan: Plan, itemsize: int, needs: Needs, selected: bool, in_forward: bool = True
) -> dict[str, int]:
    """Buffers of the second pass, likewise; none where it has nothing to do."""
    if not (needs[1] or (needs[2] and not in_forward)):
        return {}
    ranges = plan_walk(plan.rows, plan.tile_classes, True, plan.arch).ranges
    steps = (
        4 * (needs[2] and not in_forward) * (ranges + 1) * plan.tile_classes,
        4 * (plan.wide_product and needs[1]) * plan.tile_classes * plan.width,
    )
    return _row_bytes(plan.rows, selected) | {
        "logits": itemsize * (plan.chunk_elements if plan.chunks == 1 else plan.tile_elements),
        "input": itemsize * selected * plan.rows * plan.width,
        "db": 4 * needs[2] * plan.classes,
        "partial sums of db or dW": max(steps),
    }


def _row_bytes(rows: int, selected: bool) -> dict[str, int]:
    """Target, whether it counts, weight and factor of the loss, loss, two statistics."""
    return {"rows": rows * (8 * selected + 1 + 4 + 4 + 4 + 8)}


def old_torch(input: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernels do not cover ``input`` with this PyTorch, or None."""
    if input.device.type != "cuda" or hasattr(torch.ops.aten.mm, "dtype_out"):
        return None
    return f"torch {torch.__version__} has no product with a float32 result; accepted: 2.8 or newer"


def _up(n: int, step: int) -> int:
    return step * ceil_div(n, step)
