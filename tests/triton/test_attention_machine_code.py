"""Machine code of the attention kernels: what Hopper's tensor cores are asked to do, and limits."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from stackwise.kernels.triton_ops import attention_cases
from stackwise.kernels.triton_ops.machine_code import REGISTER_A, Case, faults, inspect


def cases(arch: int, *words: str) -> list[Case]:
    found = attention_cases.machine_code_cases(arch)
    return [case for case in found if all(word in case.name for word in words)]


def test_every_product_of_training_at_128_runs_on_wgmma() -> None:
    """Causal, bf16: all products of the loops are wgmma, p and ds are operands in registers, and
    tiles come by asynchronous copies, without a spill."""
    training = cases(90, "bf16", "WIDTH_0=128 WIDTH_1=0 ", "HAS_BIAS=False")
    assert len(training) == 3
    products = {"forward": 2, "backward_keys": 4, "backward_queries": 3}
    for case in training:
        assert {"HGMMA", REGISTER_A} <= set(case.expects)
        report = inspect(case)
        assert not faults(report)
        name = case.kernel.fn.__name__.removeprefix("_attention_").removesuffix("_kernel")
        # Two loops, each product at least two instructions deep.
        assert report.matrix_instructions >= 4 * products[name]


def test_fewer_warps_would_spill() -> None:
    """Why the plan has eight: with four, an accumulator takes twice the registers."""
    case = next(c for c in cases(90, "bf16", "WIDTH_0=128 WIDTH_1=0 ") if "forward" in c.name)
    report = inspect(dataclasses.replace(case, num_warps=4))
    assert any("spill" in fault for fault in faults(report))
