"""Triton variants and PyTorch's machinery: torch.library.opcheck for every registered operation,
torch.compile as one graph with eager's values and gradients. The samples are those of all variants.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stackwise import kernels
from tests.kernels.cases import CASES, Case, results
from tests.kernels.test_compile import assert_same
from tests.kernels.test_opcheck import record, registered

TRITON_CASES = [case for case in CASES if "triton" in kernels.available()[case.op]]
Calls = dict[str, dict[tuple[Any, ...], tuple[Any, ...]]]


@pytest.fixture(scope="module")
def recorded() -> Calls:
    return record(TRITON_CASES, "triton", (torch.float32,))


def test_every_triton_operation_was_called(recorded: Calls) -> None:
    missing = {name for name in registered() - recorded.keys() if name.startswith("triton_")}
    assert not missing, f"no case of tests/kernels/cases.py calls {sorted(missing)}"


def test_operations_pass_opcheck(recorded: Calls) -> None:
    for name, calls in recorded.items():
        for function, arguments in calls.values():
            # Tracing by AOTAutograd is that of the compiled calls below.
            report = torch.library.opcheck(
                function,
                arguments,
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
                raise_exception=False,
            )
            assert all(result == "SUCCESS" for result in report.values()), (name, report)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case.op.endswith("attention") else case
        for case in TRITON_CASES
    ],
    ids=str,
)
def test_one_graph_with_the_values_and_gradients_of_eager(case: Case) -> None:
    try:
        expected = results(lambda **t: case.call("triton", **t), case.inputs())
    except ValueError as refused:
        if "does not cover this case" not in str(refused):
            raise
        pytest.skip("the Triton variant does not take it")
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(results(lambda **t: compiled("triton", **t), case.inputs()), expected)
