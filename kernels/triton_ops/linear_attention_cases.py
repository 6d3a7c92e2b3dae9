"""Launch configurations of the linear attention kernels, for the check of their machine code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .linear_attention import _constants
from .linear_attention_backward import (
    _linear_key_gradients_kernel,
    _linear_query_gradients_kernel,
    _linear_query_states_kernel,
    _linear_value_gradients_kernel,
)
from .linear_attention_forward import (
    _linear_key_states_kernel,
    _linear_outputs_kernel,
    _linear_scan_kernel,
)
from .linear_attention_plan import most_registers, plan_linear, widest
from .machine_code import TRITON_TYPES, Case

_KERNELS = (
    _linear_key_states_kernel,
    _linear_outputs_kernel,
    _linear_query_gradients_kernel,
    _linear_query_states_kernel,
    _linear_key_gradients_kernel,
    _linear_value_gradients_kernel,
)
_INPUT_POINTERS = ("p_q", "p_k", "p_v", "p_out", "p_dout", "p_dq", "p_dk", "p_dv")
_INTEGER_POINTERS = ("p_table", "p_documents")
# (head dimension, features): of one block of features, and of several.
_SIZES = ((64, 64), (128, 256))


def machine_code_cases(arch: int) -> Iterator[Case]:
    """Every tile of the plan in the map with the most work and in an element-wise one, causal with
    a bias and a group, the heaviest variant; and what the others leave out, in bf16."""
    for dtype in TRITON_TYPES:
        for width, features in (size for size in _SIZES if size[0] <= widest(dtype, arch)):
            for name in ("favor", "elu"):
                for kernel in _KERNELS:
                    yield _case(kernel, arch, dtype, name, width, features, True)
    wide = _SIZES[widest(torch.bfloat16, arch) > _SIZES[0][0]]
    for kernel in _KERNELS[1:]:
        yield _case(kernel, arch, torch.bfloat16, "favor", *wide, False)
    for causal in (False, True):
        for reverse in (False, True):
            yield _scan_case(arch, causal, reverse)


def _case(
    kernel: Any, arch: int, dtype: torch.dtype, name: str, width: int, features: int, causal: bool
) -> Case:
    features = features if name == "favor" else width
    plan = plan_linear(width, width, features, dtype, arch, name)
    constants = {
        "CAUSAL": causal,
        "GROUP": 4,
        "HAS_BIAS": True,
        **_constants(plan, name, dtype, width, width, features),
    }
    registers = most_registers(name, arch)
    values = kernel is _linear_value_gradients_kernel
    strides = tuple(name for name in kernel.arg_names if name.startswith("s_"))
    return Case(
        kernel=kernel,
        arch=arch,
        signature=_signature(kernel, TRITON_TYPES[dtype]),
        constants={name: constants[name] for name in kernel.arg_names if name in constants},
        num_warps=plan.value_warps if values else plan.num_warps,
        num_stages=plan.num_stages,
        options={} if registers is None else {"maxnreg": registers},
        aligned=strides,
        expects=_expected(dtype, arch),
    )


def _expected(dtype: torch.dtype, arch: int) -> tuple[str, ...]:
    """float32 products do not run on the tensor cores, and low tiles not through wgmma."""
    if dtype == torch.float32:
        return ()
    return ("HGMMA",) if dtype == torch.bfloat16 and arch == 90 else ("HMMA",)


def _scan_case(arch: int, causal: bool, reverse: bool) -> Case:
    plan = plan_linear(*_SIZES[1], _SIZES[1][1], torch.bfloat16, arch, "favor")
    constants = {
        "CAUSAL": causal,
        "REVERSE": reverse,
        "EXPONENT": True,
        "WIDTH_V": _SIZES[1][0],
        "FEATURES": _SIZES[1][1],
        "BLOCK_F": plan.scan_features,
        "BLOCK_V": plan.scan_columns,
    }
    return Case(
        kernel=_linear_scan_kernel,
        arch=arch,
        signature=_signature(_linear_scan_kernel, "bf16"),
        constants=constants,
        num_warps=plan.scan_warps,
    )


def _signature(kernel: Any, kind: str) -> dict[str, str]:
    """``kind`` is the type of the inputs; a state that is read has that of its products."""
    product = "bf16" if kind == "bf16" else "fp32"
    reads = kernel not in (_linear_key_states_kernel, _linear_query_states_kernel)
    types = {"root": "fp32", "p_w": f"*{kind}", "p_total": f"*{product}"}
    if reads and kernel is not _linear_scan_kernel:
        types["p_state"] = f"*{product}"
    for name in kernel.arg_names:
        if name in _INPUT_POINTERS:
            types[name] = f"*{kind}"
        elif name.startswith("p_") and name not in types:
            types[name] = "*i32" if name in _INTEGER_POINTERS else "*fp32"
        elif name.islower() and name not in types:
            types[name] = "i32"
    return {name: kind for name, kind in types.items() if name in kernel.arg_names}
