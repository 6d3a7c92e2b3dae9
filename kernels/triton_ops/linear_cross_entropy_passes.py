"""The two passes of linear_cross_entropy over pieces of the logits: products and kernel launches.

See linear_cross_entropy.py for the scheme and linear_cross_entropy_plan.py for the sizes. g are the
gradients of the logits; R rows, V classes, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import ceil_div, on_device, power_of_two
from .linear_cross_entropy_kernels import (
    _logits_gradient_kernel,
    _row_losses_kernel,
    _segment_statistics_kernel,
)
from .linear_cross_entropy_plan import NUM_WARPS, Plan, plan_losses, plan_walk
from .reduction import column_sum


@dataclass
class Task:
    """What both passes need."""

    weight: Tensor  # (V, H) in the compute dtype
    bias: Tensor | None  # (V,)
    target: Tensor  # (R,)
    factor: Tensor  # (R,) float32: what the gradient of each row's loss is multiplied by
    stats: Tensor  # (2, R) float32: largest logit, Σ exp of the differences to it
    label_smoothing: float
    z_loss: float
    softcap: float | None
    plan: Plan
    scratch: Tensor  # the memory of a chunk or a tile of logits, in the compute dtype

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.label_smoothing, self.z_loss, self.softcap or 0.0

    @property
    def switches(self) -> dict[str, Any]:
        return {"HAS_BIAS": self.bias is not None, "HAS_SOFTCAP": self.softcap is not None}

    def allocate(self, elements: int) -> None:
        """Scratch memory of this size, after the present one is given back."""
        self.scratch = self.scratch.new_empty(0)
        self.scratch = self.scratch.new_empty(elements)

    def buffer(self, rows: int, columns: int, stride: int) -> Tensor:
        """The scratch memory as (rows, columns)."""
        return self.scratch.as_strided((rows, columns), (stride, 1))


def row_losses(task: Task, x: Tensor, at: slice, weights: Tensor, losses: Tensor) -> Tensor:
    """Writes losses and statistics of the rows ``at``, whose input is x; returns their logits."""
    plan = task.plan
    rows, classes, segments = len(x), plan.classes, plan.segments
    logits = task.buffer(rows, classes, plan.chunk_stride)
    torch.mm(x, task.weight.t(), out=logits)
    partial = torch.empty(3, rows, segments, dtype=torch.float32, device=x.device)
    block_rows, rows_each = plan_losses(plan)
    with on_device(x):
        _segment_statistics_kernel[(ceil_div(rows, block_rows) * segments,)](
            *(logits, task.bias, partial, logits.stride(0), rows, classes, task.softcap or 0.0),
            **task.switches,
            BLOCK_R=block_rows,
            BLOCK_C=plan.segment,
            num_warps=NUM_WARPS,
        )
        _row_losses_kernel[(ceil_div(rows, rows_each),)](
            *(logits, task.bias, partial, task.target[at], weights[at], losses[at]),
            *(task.stats[0, at], task.stats[1, at], logits.stride(0), rows, classes, segments),
            *task.numbers,
            **task.switches,
            BLOCK_R=rows_each,
            BLOCK_S=power_of_two(segments),
            num_warps=1,
        )
    return logits


def to_gradient(task: Task, logits: Tensor, at: slice, first: int, db: Tensor | None) -> None:
    """Logits of the rows ``at`` and the classes from ``first`` on become g, db gets their sum too.

    db: of these classes, float32.
    """
    rows, columns = logits.shape
    walk = plan_walk(rows, columns, db is not None, task.plan.arch)
    partial = None
    if db is not None:
        partial = torch.empty(walk.ranges, columns, dtype=torch.float32, device=logits.device)
    bias = None if task.bias is None else task.bias[first:]
    with on_device(logits):
        _logits_gradient_kernel[(walk.programs,)](
            *(logits, bias, task.target[at], task.factor[at], task.stats[0, at]),
            *(task.stats[1, at], partial, logits.stride(0), rows, columns, first),
            *(task.plan.classes, walk.walk, *task.numbers),
            **task.switches,
            BIAS_GRAD=db is not None,
            BLOCK_R=walk.block_rows,
            BLOCK_C=walk.block_columns,
            num_warps=NUM_WARPS,
        )
    if db is not None and partial is not None:
        db += column_sum(partial, torch.float32)


def put_rows(dx: Tensor, g: Tensor, weight: Tensor, at: slice, rows: Tensor | None) -> None:
    """dx = g W at the rows ``at``, or at ``rows[at]``; summed in float32, dx (N, H)."""
    if rows is None and dx.dtype == torch.float32:
        _multiply(g, weight, dx[at])
        return
    part = torch.empty(g.shape[0], weight.shape[1], dtype=torch.float32, device=g.device)
    _multiply(g, weight, part)
    if rows is None:
        dx[at] = part
    else:
        dx.index_copy_(0, rows[at], part.to(dx.dtype))


def store(task: Task, g: Tensor, at: slice, dw: Tensor) -> None:
    """Copies the g of a chunk's rows ``at``, as far as there is room, to where dw will be."""
    stop = min(at.stop, task.plan.stored_rows)
    if stop > at.start:
        for classes in task.plan.tiles:
            _copy(_slot(task, dw[classes])[at.start : stop], g[: stop - at.start, classes])


def class_gradients(
    task: Task, x: Tensor, dw: Tensor | None, db: Tensor | None, stored: bool
) -> None:
    """The second pass: dw (V, H) = gᵀ x and db (V,) = Σ g, tile by tile; x (R, H).

    ``stored``: the first pass left g, of the first rows in dw's memory or of a single chunk in the
    scratch memory, and has added up db.
    """
    plan, rows = task.plan, len(x)
    stride = plan.chunk_stride if plan.chunks == 1 else plan.tile_stride
    for at in plan.tiles:
        g = task.buffer(rows, at.stop - at.start, stride)
        done = 0
        if stored and plan.chunks == 1:
            done = rows
        elif stored and dw is not None:
            done = plan.stored_rows
            _copy(g[:done], _slot(task, dw[at]))
        if done < rows:
            torch.mm(x[done:], task.weight[at].t(), out=g[done:])
            part = None if db is None else db[at]
            to_gradient(task, g[done:], slice(done, rows), at.start, part)
        if dw is not None:
            _put_tile(task, g, x, dw[at])


def _slot(task: Task, dw: Tensor) -> Tensor:
    """(stored rows, classes): the memory of a tile of dw (classes, H), to hold the g of it."""
    rows, classes = task.plan.stored_rows, len(dw)
    return dw.view(-1).view(task.scratch.dtype)[: rows * classes].view(rows, classes)


def _copy(out: Tensor, x: Tensor) -> None:
    """out = x, 8 bytes at a time where that divides a row: PyTorch copies rows that lie apart
    element by element, which for half precision is far from the bandwidth."""
    if x.shape[1] * x.element_size() % 8 == 0:
        out, x = out.view(torch.int64), x.view(torch.int64)
    out.copy_(x)


def _put_tile(task: Task, g: Tensor, x: Tensor, dw: Tensor) -> None:
    """dw = gᵀ x of one tile of classes, summed in float32."""
    if dw.dtype == torch.float32 or (dw.dtype == g.dtype and not task.plan.wide_product):
        _multiply(g.t(), x, dw)
        return
    wide = torch.empty(dw.shape, dtype=torch.float32, device=dw.device)
    _multiply(g.t(), x, wide)
    dw.copy_(wide)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, of their dtype or float32; a float32 result is nowhere rounded on the way."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
