"""Every operation that the package registers with torch.library passes torch.library.opcheck.

The sample arguments are recorded while the cases of cases.py run forward and backward. An operation
that no case reaches fails, so that a new one cannot be forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stackwise import kernels
from tests.kernels.cases import CASES, Case, results

Calls = dict[str, dict[tuple[Any, ...], tuple[Any, ...]]]
DTYPES = (torch.float32, torch.bfloat16)
ELSEWHERE = ("triton_", "cuda_")  # recorded in the interpreter, and on a GPU


class Recorder(TorchDispatchMode):
    """Keeps the first arguments of each operation of ours, for each pattern of types."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "stackwise":
            pattern = tuple(getattr(x, "dtype", type(x)) for x in args)
            name = function.name().removeprefix("stackwise::")
            self.calls.setdefault(name, {}).setdefault(pattern, (function, _kept(args)))
        return result


def _kept(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Scratch memory may be behind an argument: what is checked later is a copy."""
    return tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments)


def record(
    cases: Sequence[Case], impl: str | None = None, dtypes: Sequence[torch.dtype] = DTYPES
) -> Calls:
    """Calls of the operations in both directions of every case that ``impl`` covers."""
    with Recorder() as recorder:
        for case, dtype in itertools.product(cases, dtypes):
            try:
                results(lambda case=case, **t: case.call(impl, **t), case.inputs(dtype))
            except ValueError as refused:
                if "does not cover this case" not in str(refused):
                    raise
    return recorder.calls


def registered() -> set[str]:
    """Names of the package's operations that this process has defined."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("stackwise::") for name in names if name.startswith("stackwise::")}


@pytest.fixture(scope="module")
def recorded() -> Calls:
    return record(CASES)


def test_every_public_operation_has_a_case() -> None:
    missing = set(kernels.available()) - {case.op for case in CASES}
    assert not missing, f"no sample call in tests/kernels/cases.py: {sorted(missing)}"


def test_every_registered_operation_was_called(recorded: Calls) -> None:
    missing = {name for name in registered() - recorded.keys() if not name.startswith(ELSEWHERE)}
    assert not missing, f"no case of tests/kernels/cases.py calls {sorted(missing)}"
    assert len(recorded) >= 7


def test_operations_pass_opcheck(recorded: Calls) -> None:
    for name, calls in recorded.items():
        for function, arguments in calls.values():
            report = torch.library.opcheck(function, arguments, raise_exception=False)
            assert all(result == "SUCCESS" for result in report.values()), (name, report)
