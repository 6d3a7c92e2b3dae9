"""SwiGLU, GEGLU and biased GELU in Triton: values and every gradient, by the error rule.

A contiguous input is tiled as one row of 2,048 half-precision or 1,024 float32 elements per
program; rows that lie apart in tiles of 1,024 (512) columns, or 128 (64) when they are narrow. The
widths fall on both sides of these edges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels.bias_gelu import bias_gelu_reference
from stackwise.kernels.geglu import geglu_reference
from stackwise.kernels.swiglu import swiglu_reference
from stackwise.kernels.triton_ops import reduction
from tests.triton.compare import assert_follows_reference, poisoned_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GATED = {
    "swiglu": (kernels.swiglu, swiglu_reference, {}),
    "geglu-erf": (kernels.geglu, geglu_reference, {"approximate": "none"}),
    "geglu-tanh": (kernels.geglu, geglu_reference, {"approximate": "tanh"}),
}
APPROXIMATE = ("tanh", "none")


def values(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    """Wide enough to reach both flat ends of an activation."""
    return (scale * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("width", [1, 63, 1000])
def test_gated_units_follow_their_references(name: str, dtype: torch.dtype, width: int) -> None:
    function, reference, options = GATED[name]
    inputs = [values(2, 5, width, dtype=dtype) for _ in range(2)]
    assert_follows_reference(partial(function, impl="triton"), reference, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [113, 1100])
def test_halves_of_a_fused_projection(dtype: torch.dtype, width: int) -> None:
    gate, up = values(3, 6, 2 * width, dtype=dtype).chunk(2, dim=-1)
    assert_follows_reference(partial(kernels.swiglu, impl="triton"), swiglu_reference, [gate, up])


def test_transposed_inputs_and_gradients() -> None:
    gate, up = values(7, 239).T, values(239, 14)[:, ::2]
    assert_follows_reference(partial(kernels.swiglu, impl="triton"), swiglu_reference, [gate, up])
    leaf = values(7, 239).requires_grad_()
    expanded, plain = (
        torch.autograd.grad(kernels.swiglu(leaf, leaf, impl=impl).sum(), leaf)[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(expanded, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("width", [1, 63, 1100])
def test_bias_gelu_follows_its_reference(dtype: torch.dtype, approximate: str, width: int) -> None:
    inputs = [values(2, 9, width, dtype=dtype), values(width, dtype=dtype)]
    assert_follows_reference(
        partial(kernels.bias_gelu, impl="triton"),
        bias_gelu_reference,
        inputs,
        approximate=approximate,
    )


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("apart", [False, True], ids=["gapless", "rows apart"])
def test_bias_gelu_without_a_bias(approximate: str, apart: bool) -> None:
    x = values(5, 2 * 613)[:, :613] if apart else values(5, 613)
    assert_follows_reference(
        partial(kernels.bias_gelu, impl="triton"),
        bias_gelu_reference,
        [x, None],
        approximate=approximate,
    )


def test_bias_gradient_over_many_rows_is_right_and_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A GPU of 17 multiprocessors: 68 row ranges, more than the final sum takes at once, of two
    # tiles each, the last one not full.
    monkeypatch.setitem(reduction.MULTIPROCESSORS, 90, 17)
    x, bias = values(68 * 32 - 5, 5, dtype=torch.bfloat16), values(5)
    gelu = partial(kernels.bias_gelu, impl="triton")
    assert_follows_reference(gelu, bias_gelu_reference, [x, bias])
    dout = torch.randn(x.shape).bfloat16()
    leaf = bias.requires_grad_()
    first, second = (torch.autograd.grad(gelu(x, leaf), leaf, dout)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    with poisoned_memory():
        x, y = (torch.empty(shape, requires_grad=True) for _ in range(2))
        bias = torch.ones(shape[-1], requires_grad=True)
        out = kernels.swiglu(x, y, impl="triton")
        assert out.shape == shape
        assert [g.shape for g in torch.autograd.grad(out.sum(), [x, y])] == [shape, shape]
        out = kernels.bias_gelu(x, bias, impl="triton")
        dx, dbias = torch.autograd.grad(out.sum(), [x, bias])
    assert dx.shape == shape
    assert torch.equal(dbias, torch.zeros(shape[-1]))


def test_large_values_neither_overflow_nor_become_nan() -> None:
    x = torch.tensor([-3e4, -300.0, -20.0, 0.0, 20.0, 300.0, 3e4], requires_grad=True)
    one = torch.ones(7)
    for name, (function, _, options) in GATED.items():
        out = function(x, one, impl="triton", **options)
        (slope,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(out, x.clamp(min=0), atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(slope[4:], one[4:], atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(slope[:3], 0 * one[:3], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernels.swiglu(x.double(), x.double(), impl="triton"), "dtype torch.float64"),
        (lambda x: kernels.swiglu(x, x[:, :3], impl="triton"), r"up: got shape \(2, 3\)"),
        (lambda x: kernels.bias_gelu(x, x[0].double(), impl="triton"), "dtype torch.float64"),
        (lambda x: kernels.bias_gelu(x, None, "sigmoid", impl="triton"), "approximate: got"),
    ],
    ids=["float64", "shapes differ", "float64 bias", "approximate"],
)
def test_wrong_arguments(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4))


def test_operations_are_described_to_the_compiler() -> None:
    check = partial(
        torch.library.opcheck,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    x, y, dout = (values(3, 20) for _ in range(3))
    half = values(3, 40)[:, :20]
    ops = torch.ops.stackwise
    kernels.swiglu(x, y, impl="triton")
    kernels.bias_gelu(x, y[0], impl="triton")
    check(ops.triton_gated_forward.default, (half, y, 0))
    check(ops.triton_gated_backward.default, (dout, half, y, 2))
    check(ops.triton_bias_gelu_forward.default, (half, y[0], 1))
    check(ops.triton_bias_gelu_backward.default, (dout, half, y[0], 1))
    check(ops.triton_bias_gelu_backward.default, (dout, half, None, 2))


def test_compiled_as_one_graph() -> None:
    def layer(x: Tensor, bias: Tensor) -> Tensor:
        h = kernels.bias_gelu(x, bias, impl="triton")
        return kernels.swiglu(h, kernels.geglu(x, h, impl="triton"), impl="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, bias = values(4, 30, scale=1.0), values(30, scale=1.0)
    results = []
    for run in (compiled, layer):
        leaves = [t.clone().requires_grad_() for t in (x, bias)]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)
