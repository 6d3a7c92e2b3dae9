"""Sums over rows for parameter gradients, the same bits every time.

A backward kernel gives each program a range of rows and writes one float32 row of partial sums per
program; :func:`column_sum` adds those in a fixed order. No atomics.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MULTIPROCESSORS, ceil_div, on_device
from .machine_code import TRITON_TYPES, Case

# A column block of 128 bytes, one full memory line per row.
BLOCK_P, BLOCK_C, NUM_WARPS = 64, 32, 4

# Programs per multiprocessor that a row-walking kernel aims at: enough to hide latency, few enough
# that the partial sums stay a few percent of the traffic.
PROGRAMS_PER_MULTIPROCESSOR = 4


def rows_per_program(rows: int, column_blocks: int, block_rows: int, arch: int) -> int:
    """Rows that each program walks so that the GPU is filled once, a multiple of ``block_rows``."""
    ranges = max(1, MULTIPROCESSORS[arch] * PROGRAMS_PER_MULTIPROCESSOR // column_blocks)
    return block_rows * ceil_div(ceil_div(rows, block_rows), ranges)


def column_sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over rows of ``partial`` (P, D) float32, contiguous, as (D,) in ``dtype``."""
    n_partials, n_columns = partial.shape
    out = torch.empty(n_columns, dtype=dtype, device=partial.device)
    if n_columns:
        with on_device(partial):
            _column_sum_kernel[(ceil_div(n_columns, BLOCK_C),)](
                *(partial, out, n_partials, n_columns),
                BLOCK_P=BLOCK_P,
                BLOCK_C=BLOCK_C,
                num_warps=NUM_WARPS,
            )
    return out


@triton.jit
def _column_sum_kernel(
    partial, out, n_partials, n_columns, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[c] = Σ_p partial[p, c]; a program sums BLOCK_C columns, BLOCK_P rows at a time."""
    o_column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_partial = tl.arange(0, BLOCK_P)[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        row = start + o_partial
        inside = (row < n_partials) & (o_column < n_columns)
        total += tl.load(partial + row.to(tl.int64) * n_columns + o_column, mask=inside, other=0.0)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    value = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + column, value, mask=column < n_columns)


def machine_code_cases(arch: int) -> Iterator[Case]:
    for kind in TRITON_TYPES.values():
        yield Case(
            kernel=_column_sum_kernel,
            arch=arch,
            signature={"partial": "*fp32", "out": f"*{kind}", "n_partials": "i32"}
            | {"n_columns": "i32"},
            constants={"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C},
            num_warps=NUM_WARPS,
            aligned=("n_columns",),
            expects=(r"LDG\.E",),
        )
