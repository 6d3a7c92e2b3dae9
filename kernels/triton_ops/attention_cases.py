"""The launch configurations of the attention kernels, for the check of their machine code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .attention_backward import _attention_backward_keys_kernel, _attention_delta_kernel
from .attention_backward_queries import _attention_backward_queries_kernel
from .attention_forward import _attention_forward_kernel
from .attention_launch import (
    DELTA_ROWS,
    DELTA_WARPS,
    MAX_WIDTH,
    Form,
    Tiles,
    block,
    plan_attention,
    split_width,
)
from .machine_code import REGISTER_A, TRITON_TYPES, VECTOR_LOAD, Case

# Of q and k, and of v: every row of the plan at its widest, and pieces that fill no tile.
WIDTHS = ((64, 64), (96, 112), (128, 128), (192, 128), (160, 224), (256, 256))

_SYNC, _ASYNC_COPY = r"HMMA", r"LDGSTS\.E\S*\.128"
_MATRIX = {
    80: (_SYNC,),
    89: (_SYNC,),
    90: (r"HGMMA", REGISTER_A),
    100: (r"UTC\S*MMA",),
    120: (_SYNC,),
}
_FLOATS = {"lse", "dlse", "stats", "bias", "sinks", "dbias", "dsinks"}
_UNALIGNED = {"s_lse", "s_stat", "s_dbias", "s_bias_b", "s_bias_h"}


def machine_code_cases(arch: int) -> Iterator[Case]:
    """Every tile of the plan with all options of the kernels, and those of the common forms.

    Options add code to a loop (bias, cap, window, groups of heads, packed tensors) or leave it out,
    so that all of them together need the most registers; plain causal attention, the form of
    training, is compiled beside it. Narrower heads of a row of the plan need fewer registers than
    the widest, with pieces that are masked where they fill no tile. float16 differs from bfloat16
    in conversions only.
    """
    for width, v_width in WIDTHS:
        form = Form(split_width(width), split_width(v_width), right=True)
        rich = replace(form, group=3, varlen=True, left=True, bias=True, cap=True)
        yield from _cases(arch, torch.bfloat16, rich)
        yield from _cases(arch, torch.float32, replace(rich, exact=True))
        if (width, v_width) in ((64, 64), (128, 128), (192, 128)):
            yield from _cases(arch, torch.bfloat16, form)
        if width == v_width == 128:
            yield from _cases(arch, torch.float16, rich)
    for dtype in TRITON_TYPES:
        yield _delta_case(arch, dtype)


def _cases(arch: int, dtype: torch.dtype, form: Form) -> Iterator[Case]:
    plan = plan_attention(form, arch)
    rich = form.bias
    yield _case(_attention_forward_kernel, arch, dtype, form, plan.forward, {"HAS_SINKS": rich})
    yield _case(_attention_backward_queries_kernel, arch, dtype, form, plan.queries, {})
    launches = [(plan.keys, True, True)]
    if plan.values is not None:
        launches = [(plan.keys, True, False), (plan.values, False, True)]
    for tiles, k_grad, v_grad in launches:
        parts = {"K_GRAD": k_grad, "V_GRAD": v_grad, "BIAS_GRAD": rich and k_grad}
        yield _case(_attention_backward_keys_kernel, arch, dtype, form, tiles, parts)


def _case(
    kernel: Any, arch: int, dtype: torch.dtype, form: Form, tiles: Tiles, parts: dict[str, bool]
) -> Case:
    constants = {**form.constants, **tiles.constants, **parts}
    signature = {
        name: _kind(name, TRITON_TYPES[dtype]) for name in kernel.arg_names if name not in constants
    }
    return Case(
        kernel=kernel,
        arch=arch,
        signature=signature,
        constants=constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        options={k: v for k, v in tiles.options.items() if k == "maxnreg"},
        aligned=tuple(n for n in signature if n.startswith("s_") and n not in _UNALIGNED),
        expects=(VECTOR_LOAD,) if form.exact else (*_MATRIX[arch], _ASYNC_COPY),
    )


def _kind(name: str, element: str) -> str:
    if name == "schedule":
        return "*i32"
    if name in _FLOATS:
        return "*fp32"
    if name in ("scale", "cap"):
        return "fp32"
    counts = ("len_", "s_", "n_", "left", "right", "heads", "section", "length")
    return "i32" if name.startswith(counts) else f"*{element}"


def _delta_case(arch: int, dtype: torch.dtype) -> Case:
    constants = {"WIDTH": MAX_WIDTH, "BLOCK_D": block(MAX_WIDTH), "BLOCK_M": DELTA_ROWS}
    constants |= {"HAS_DLSE": True, "HAS_SINKS": True}
    kernel = _attention_delta_kernel
    names = [name for name in kernel.arg_names if name not in constants]
    return Case(
        kernel=kernel,
        arch=arch,
        signature={name: _kind(name, TRITON_TYPES[dtype]) for name in names},
        constants=constants,
        num_warps=DELTA_WARPS,
        aligned=tuple(name for name in names if name.startswith("s_")),
        expects=(VECTOR_LOAD,),
    )
