"""What bench_swiglu and bench_geglu share: gate and up of the feed-forward widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.cases import Case, Options, Tensors, Work, random, short, size

# (tokens, width): the hidden widths of LLaMA-135M, 1B, 8B and 70B; on a CPU small ones.
SHAPES = ((16384, 1536), (16384, 8192), (8192, 14336), (8192, 28672))
CPU_SHAPES = ((1024, 1536), (1024, 6144))


def gated_cases(options: Options, fixed: dict[str, Any] | None = None) -> Sequence[Case]:
    """bf16; ``fixed`` are options of the operation."""
    cpu = options.device.type == "cpu"
    shapes = ((64, 96),) if options.quick else CPU_SHAPES if cpu else SHAPES
    return [gated_case(*shape, torch.bfloat16, fixed or {}) for shape in shapes]


def gated_case(tokens: int, width: int, dtype: torch.dtype, fixed: dict[str, Any]) -> Case:
    def make(device: torch.device) -> Tensors:
        draw = random(width, device, dtype)
        return {"gate": draw(tokens, width), "up": draw(tokens, width)}

    one = size(dtype, tokens, width)
    return Case(
        series=short(dtype),
        x=("D", "hidden width", width),
        dtype=dtype,
        shape={"tokens": tokens},
        make=make,
        wanted=("gate", "up"),
        # Forward reads gate and up, writes y; backward reads dy too and writes dgate and dup.
        work=Work(3 * one, 5 * one),
        options=fixed,
    )
