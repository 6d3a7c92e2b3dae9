"""Every operation in the company of PyTorch's machinery: torch.compile as one graph, with sizes
that change, under autocast; activation checkpointing. Values and gradients are those of eager.

A compiled norm, rope or gated unit on a CPU is its plain formula, eager is hand-written passes: the
difference is a few roundings. Everything else is one operation in both, and equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import CASES, Case, Tensors, results

# Relative to the largest value of a tensor: two roundings of eager, and two of the formula.
ROUNDINGS = 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def one_graph(case: Case, **options: Any) -> Callable[..., Any]:
    return torch.compile(case.call, fullgraph=True, backend="aot_eager", **options)


def assert_same(
    ours: Tensors,
    expected: Tensors,
    computed: torch.dtype | None = None,
    roundings: int = ROUNDINGS,
) -> None:
    """``computed``: the dtype of the arithmetic, where it is not that of the values."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        atol = (
            roundings * torch.finfo(computed or value.dtype).eps * float(_finite(value).abs().max())
        )
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x.isinf(), 0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_graph_with_the_values_and_gradients_of_eager(case: Case) -> None:
    compiled = one_graph(case, dynamic=False)
    for dtype in (torch.float32, torch.bfloat16):
        expected = results(case.call, case.inputs(dtype))
        assert_same(results(compiled, case.inputs(dtype)), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_graph_under_autocast(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(case.call, case.inputs())
        ours = results(one_graph(case, dynamic=False), case.inputs())
    assert_same(ours, expected, torch.bfloat16)


@pytest.mark.parametrize("case", [c for c in CASES if c.dynamic], ids=str)
def test_sizes_may_change_without_another_graph(case: Case) -> None:
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    for repeats in (1, 2):
        tensors = grown(case, repeats)
        expected = results(case.call, tensors)
        for name, dimensions in case.dynamic.items():
            for dimension in dimensions:
                if name in tensors:
                    torch._dynamo.mark_dynamic(tensors[name], dimension)
        assert_same(results(compiled, tensors), expected)
    assert graphs == 1


def grown(case: Case, repeats: int) -> Tensors:
    """Inputs that are ``repeats`` times as long in every dimension that may change."""
    grown = {}
    for name, x in case.inputs().items():
        needs = x.requires_grad
        for dimension in case.dynamic.get(name, ()):
            x = torch.cat([x.detach()] * repeats, dimension)
        grown[name] = x.detach().requires_grad_(needs) if needs else x
    if "cu_seqlens_q" in grown:
        grown["cu_seqlens_q"] = grown["cu_seqlens_q"] * repeats
    return grown


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activation_checkpointing(case: Case) -> None:
    expected = results(case.call, case.inputs())

    def again(**tensors: Any) -> Any:
        return checkpoint(case.call, use_reentrant=False, **tensors)

    assert_same(results(again, case.inputs()), expected, roundings=0)
