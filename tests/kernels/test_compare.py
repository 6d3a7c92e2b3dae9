"""The comparer itself can fail: on a wrong value, a NaN, a wrong infinity, an unwritten place."""

from __future__ import annotations

import pytest
import torch

from stackwise.kernels import workspace
from tests.kernels.compare import assert_close, poison


def test_reports_the_worst_element_with_its_three_values() -> None:
    exact = {"out0": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)}
    plain = {"out0": exact["out0"].float()}
    ours = {"out0": plain["out0"].clone()}
    assert_close("same", ours, plain, exact)
    ours["out0"][1, 0] = 3.1
    message = r"out0\[1, 0\]: ours 3.09\d+, same dtype 3.0, exact 3.0"
    with pytest.raises(AssertionError, match=message):
        assert_close("wrong", ours, plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_an_infinity_is_an_error(value: float) -> None:
    exact = {"out0": torch.ones(3, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="ours"):
        assert_close("x", {"out0": torch.tensor([1.0, value, 1.0])}, exact, exact)


def test_infinities_must_agree() -> None:
    exact = {"out0": torch.tensor([-torch.inf, 1.0], dtype=torch.float64)}
    assert_close("x", {"out0": torch.tensor([-torch.inf, 1.0])}, exact, exact)
    with pytest.raises(AssertionError, match="ours"):
        assert_close("x", {"out0": torch.tensor([0.0, 1.0])}, exact, exact)


def test_poison_reaches_scratch_and_weight_buffers() -> None:
    weight = torch.zeros(2)
    small = workspace.scratch().take("test", (3,), weight, torch.float32)
    with workspace.borrow(weight) as space:
        large = space.take("test", (3,), weight, torch.float32)
    poison()
    assert small.isnan().all()
    assert large.isnan().all()
