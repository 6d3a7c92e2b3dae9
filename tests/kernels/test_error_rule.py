"""The error rule for every operation's default variant: all dtypes, strided inputs, NaN in all
memory that is allocated without a value; nothing in, nothing out; gradcheck of every definition.

The samples of cases.py, so that a new operation is held to it too. Each operation's own test file
has its options, odd shapes and edges.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import CASES, Case, Tensors, results
from tests.kernels.compare import assert_close, poison
from tests.triton.compare import poisoned_memory

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# PyTorch's own float32 kernels beyond the rule by themselves: (factor, where the exact value is 0).
SINGLE = {"attention": (2.0, 5e-6), "mla_attention": (2.0, 5e-6)}
ERF = {"geglu-erf": (3.0, 0.0), "bias_gelu-erf": (3.0, 0.0)}


def doubled(tensors: Tensors) -> Tensors:
    """The same values in float64, as leaves."""
    return {
        n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for n, x in tensors.items()
    }


def strided(tensors: Tensors) -> Tensors:
    """The same values, every second element of other memory, the rest NaN."""
    found = {}
    for name, x in tensors.items():
        wide = torch.full((*x.shape, 2), torch.nan) if x.is_floating_point() else None
        if wide is None:
            found[name] = x
            continue
        wide = wide.to(x.dtype)
        wide[..., 0] = x.detach()
        found[name] = wide[..., 0].requires_grad_(x.requires_grad)
    return found


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = case.inputs(dtype)
    exact = results(lambda **t: case.call("reference", **t), doubled(tensors))
    plain = results(lambda **t: case.call("reference", **t), tensors)
    given = strided(tensors) if layout == "strided" else tensors
    poison()
    with poisoned_memory():
        ours = results(case.call, given)
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        assert ours[name].dtype == value.dtype, name
    factor, floor = (1.0, 0.0)
    if dtype == torch.float32:
        factor, floor = SINGLE.get(case.op, ERF.get(str(case), (1.0, 0.0)))
    relative = 1e-11 if dtype == torch.float64 else 0.0
    assert_close(str(dtype), ours, plain, exact, factor, floor, relative)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.dynamic], ids=str)
def test_nothing_in_nothing_out(case: Case, dtype: torch.dtype) -> None:
    tensors = {}
    for name, x in case.inputs(dtype).items():
        empty = x.detach()
        for dimension in case.dynamic.get(name, ()):
            empty = empty.narrow(dimension, 0, 0)
        tensors[name] = empty.requires_grad_(x.requires_grad)
    if "cu_seqlens_q" in tensors:
        tensors["cu_seqlens_q"] = tensors["cu_seqlens_q"] * 0
    expected = results(lambda **t: case.call("reference", **t), tensors)
    with poisoned_memory():
        ours = results(case.call, tensors)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], torch.zeros_like(value)), name
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck_of_the_definition(case: Case) -> None:
    tensors = doubled(case.inputs())
    names = [name for name, x in tensors.items() if x.requires_grad]

    def call(*leaves: torch.Tensor) -> object:
        return case.call("reference", **(tensors | dict(zip(names, leaves, strict=True))))

    leaves = [tensors[name] for name in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
