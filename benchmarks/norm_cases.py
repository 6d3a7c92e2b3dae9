"""What bench_rms_norm and bench_layer_norm share: (N, D) inputs, with and without residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.cases import Case, Options, Tensors, Work, random, size

# Rows and widths: GPT-2 and LLaMA widths; on a CPU two that take milliseconds.
ROWS, WIDTHS = 16384, (768, 1024, 2048, 4096, 8192)
CPU_ROWS, CPU_WIDTHS = 4096, (768, 2048)
GPT2_ROWS = 4096  # at small widths the launches count: the rows of a small batch


def norm_cases(options: Options, parameters: tuple[str, ...]) -> Sequence[Case]:
    """bf16 with and without residual, float32 without; ``parameters`` are "weight" and "bias".

    On a CPU bf16 comes with residual only, as blocks have it.
    """
    if options.quick:
        sizes = [(64, 96)]
    elif options.device.type == "cpu":
        sizes = [(CPU_ROWS, width) for width in CPU_WIDTHS]
    else:
        sizes = [(GPT2_ROWS, width) for width in WIDTHS[:2]]
        sizes += [(ROWS, width) for width in WIDTHS]
    kinds = [(torch.bfloat16, True), (torch.float32, False)]
    if options.device.type != "cpu":
        kinds.insert(0, (torch.bfloat16, False))
    return [
        norm_case(rows, width, dtype, residual, parameters)
        for dtype, residual in kinds
        for rows, width in sizes
    ]


def norm_case(
    rows: int, width: int, dtype: torch.dtype, residual: bool, parameters: tuple[str, ...]
) -> Case:
    def make(device: torch.device) -> Tensors:
        draw = random(width, device, dtype)
        tensors = {"x": draw(rows, width)}
        if residual:
            tensors["residual"] = draw(rows, width)
        tensors["weight"] = draw(width, scale=0.2, shift=1.0)
        if "bias" in parameters:
            tensors["bias"] = draw(width, scale=0.2)
        return tensors

    names = ("x", "residual", *parameters) if residual else ("x", *parameters)
    kind = f"{'fp32' if dtype == torch.float32 else 'bf16'}, {rows} rows"
    return Case(
        series=f"{kind}, with residual" if residual else kind,
        x=("D", "width", width),
        dtype=dtype,
        shape={"rows": rows, "residual": residual},
        make=make,
        wanted=names,
        work=norm_work(rows, width, dtype, residual),
    )


def norm_work(rows: int, width: int, dtype: torch.dtype, residual: bool) -> Work:
    """Forward reads x (and residual), writes y (and the sum); backward reads dy, what was
    normalised (and the sum's gradient) and writes dx, which is the residual's gradient too."""
    one = size(dtype, rows, width)
    return Work((4 if residual else 2) * one, (4 if residual else 3) * one)
