"""The gate: what is right passes, what is wrong does not, and the verdict says where."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Bench, Case, Provider, Work, random
from benchmarks.gate import Gate, Verdict, compare

CPU = torch.device("cpu")


def definition(x: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(x) * weight


def case(dtype: torch.dtype = torch.float32, rows: int = 113) -> Case:
    def make(device: torch.device) -> dict[str, Tensor]:
        draw = random(1, device, dtype)
        return {"x": draw(rows, 7), "weight": draw(7)}

    return Case(
        series="plain", x=("rows", "rows", rows), dtype=dtype, shape={}, make=make,
        wanted=("x", "weight"), work=Work(1, 1),
    )  # fmt: skip


def judge(function, name: str = "peer", dtype: torch.dtype = torch.float32, **bench) -> Verdict:
    made = Bench("op", lambda options: [], definition, lambda *_: (), **bench)
    return Gate(made, case(dtype), CPU).judge(Provider(name, function))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return definition(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gate = torch.sigmoid(x)
        dweight = (grad * gate).sum(0)
        dweight[3] = 0
        return grad * weight * gate * (1 - gate), dweight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_definition_in_another_order_passes(dtype: torch.dtype) -> None:
    assert judge(lambda x, weight: weight / (1 + torch.exp(-x)), dtype=dtype).ratio <= 1.0


def test_one_wrong_element_is_caught() -> None:
    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        out = definition(x, weight)
        bump = torch.zeros_like(out)
        bump[41, 2] = 1e-3
        return out + bump

    verdict = judge(wrong)
    assert verdict.ratio > 1
    assert verdict.reason.startswith("out0")


def test_one_wrong_gradient_is_caught() -> None:
    verdict = judge(WrongGradient.apply)
    assert verdict.ratio > 1
    assert verdict.reason.startswith("dweight")


def test_an_unwritten_output_is_caught_in_ours() -> None:
    def unwritten(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:-1] = definition(x, weight)[:-1]
        return out + 0 * x + 0 * weight

    assert judge(unwritten, "stackwise-triton").ratio == math.inf


def test_a_wrong_shape_and_an_exception_are_verdicts() -> None:
    assert "shape" in judge(lambda x, weight: definition(x, weight).sum(0)).reason

    def broken(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    verdict = judge(broken)
    assert (verdict.ratio, verdict.reason) == (math.inf, "RuntimeError: no kernel image")


def test_nan_is_not_small() -> None:
    assert judge(lambda x, weight: definition(x, weight) * torch.nan).ratio == math.inf


def test_peers_have_a_margin_and_ours_have_none() -> None:
    ours, peer = Provider("stackwise-torch", definition), Provider("liger", definition)
    assert Verdict(1.0).admits(ours)
    assert not Verdict(1.01).admits(ours)
    assert Verdict(9.0).admits(peer)
    assert not Verdict(11.0).admits(peer)
    assert not Verdict(math.nan).admits(peer)


def test_slack_is_for_float32_alone() -> None:
    def off(x: Tensor, weight: Tensor) -> Tensor:
        return definition(x, weight) * (1 + 1.5e-6 if x.dtype == torch.float32 else 1 + 3e-2)

    assert judge(off).ratio / judge(off, slack=2.0).ratio == pytest.approx(2.0)
    half = torch.bfloat16
    assert judge(off, dtype=half).ratio == judge(off, dtype=half, slack=2.0).ratio


def test_the_bound_is_the_documented_one() -> None:
    exact = {"out0": torch.tensor([4.0, -2.0], dtype=torch.float64)}
    plain = {"out0": torch.tensor([4.5, -2.0])}
    found = {"out0": torch.tensor([4.0, -2.75])}
    bound = 2 * 0.5 + torch.finfo(torch.float32).eps * 4.0
    assert compare(found, plain, exact).ratio == pytest.approx(0.75 / bound)
    # An output in bf16 is held to the definition rounded to bf16.
    exact = {"out0": torch.tensor([1.003], dtype=torch.float64)}
    same = {"out0": torch.tensor([1.003])}
    assert compare({"out0": torch.tensor([1.0]).bfloat16()}, same, exact).ratio <= 1
    assert compare({"out0": torch.tensor([1.0])}, same, exact).ratio > 1
