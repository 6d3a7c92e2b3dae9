"""Machine code of the norms: no spills, vector access, the registers that the plan counts on."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from stackwise.kernels.triton_ops import norms
from stackwise.kernels.triton_ops.machine_code import Case, Report, faults, inspect
from stackwise.kernels.triton_ops.norm_plan import NormPlan


def check(case: Case) -> Report:
    report = inspect(case)
    assert not faults(report)
    if case.kernel is norms._norm_backward_kernel:
        # 16 warps of persistent programs share the 65,536 registers of a multiprocessor.
        assert report.registers <= 128, report
    return report


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("width", [768, 8192])
def test_layer_norm_of_bf16_keeps_its_programs_resident(arch: int, width: int) -> None:
    wanted = f"bf16 fp32 WIDTH={width} "
    cases = [c for c in norms.machine_code_cases(arch) if wanted in c.name]
    cases = [c for c in cases if "CENTERED=True" in c.name]
    reports = [check(case) for case in cases[-2:]]
    assert {r.kernel.split("[")[0] for r in reports} == {
        "norm_forward_kernel",
        "norm_backward_kernel",
    }


def test_a_row_beyond_the_accepted_width_would_spill() -> None:
    plan = NormPlan(block=16384, tile_rows=1, programs=132, num_warps=16, num_stages=2)
    report = inspect(norms._backward_case(90, "bf16", 16384, plan, True))
    assert any("spill" in fault for fault in faults(report))
