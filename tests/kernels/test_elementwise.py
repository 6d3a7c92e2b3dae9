"""swiglu, geglu and bias_gelu: values, gradients, and parity with Transformers and PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import cpu
from tests.kernels.compare import assert_variant

# PyTorch's float32 erf-GELU is off by 1e-6, beyond the rule.
ERF = {"approximate": "none", "slack": 3.0}
SHAPES = [(1, 1), (3, 63), (2, 5, 113), (239, 8)]


@pytest.fixture(params=[1 << 17, 100])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensors as one block, and many blocks with a ragged last one."""
    monkeypatch.setattr(cpu.row_blocks, "__defaults__", (request.param,))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_gelu_forward_backward(shape: tuple[int, ...]) -> None:
    tensors = {"x": 3 * torch.randn(shape), "bias": torch.randn(shape[-1])}
    for options in ({"approximate": "tanh"}, ERF):
        assert_variant(kernels.bias_gelu, tensors, ("x", "bias"), **options)
        assert_variant(kernels.bias_gelu, tensors, ("bias",), **options)
        assert_variant(kernels.bias_gelu, tensors, (), **options)
        without = {"x": tensors["x"]}
        assert_variant(lambda x, **o: kernels.bias_gelu(x, None, **o), without, ("x",), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_units_forward_backward(shape: tuple[int, ...]) -> None:
    tensors = {"gate": 3 * torch.randn(shape), "up": torch.randn(shape)}
    for wanted in (("gate", "up"), ("gate",), ("up",), ()):
        assert_variant(kernels.swiglu, tensors, wanted)
        assert_variant(kernels.geglu, tensors, wanted, **ERF)
        assert_variant(kernels.geglu, tensors, wanted, approximate="tanh")


def test_bias_gelu_far_from_zero() -> None:
    x = torch.tensor([[-1e4, -30.0, -8.0, 0.0, 8.0, 30.0, 1e4]])
    assert_variant(lambda x, **o: kernels.bias_gelu(x, None, **o), {"x": x}, ("x",))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: kernels.swiglu(x, y, impl="reference"),
        lambda x, y: kernels.geglu(x, y, "none", impl="reference"),
        lambda x, y: kernels.geglu(x, y, "tanh", impl="reference"),
        lambda x, y: kernels.bias_gelu(x, y[0], "tanh", impl="reference"),
        lambda x, y: kernels.bias_gelu(x, y[0], "none", impl="reference"),
    ],
    ids=["swiglu", "geglu", "geglu_tanh", "bias_gelu_tanh", "bias_gelu_none"],
)
def test_gradcheck_of_the_definitions(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(fn, inputs)


def test_parity_with_transformers_and_pytorch() -> None:
    from transformers.activations import NewGELUActivation

    x, y = torch.randn(7, 33, dtype=torch.float64), torch.randn(7, 33, dtype=torch.float64)
    for impl in ("reference", "torch"):
        ours = kernels.bias_gelu(x, y[0], "tanh", impl=impl)
        torch.testing.assert_close(ours, NewGELUActivation()(x + y[0]), rtol=1e-13, atol=1e-13)
        ours = kernels.bias_gelu(x, None, "none", impl=impl)
        torch.testing.assert_close(ours, F.gelu(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            kernels.swiglu(x, y, impl=impl), F.silu(x) * y, rtol=1e-13, atol=1e-13
        )
        torch.testing.assert_close(
            kernels.geglu(x, y, "tanh", impl=impl),
            F.gelu(x, approximate="tanh") * y,
            rtol=1e-13,
            atol=1e-13,
        )


def test_strided_views_and_zero_sizes() -> None:
    both = torch.randn(6, 40)
    tensors = {"gate": both[::2, :20], "up": both[::2, 20:]}
    assert_variant(kernels.swiglu, tensors, ("gate", "up"))
    assert_variant(kernels.geglu, tensors, ("gate", "up"), approximate="tanh")
    turned = {"x": both.T, "bias": torch.randn(12)[::2]}
    assert_variant(kernels.bias_gelu, turned, ("x", "bias"))
    for shape in ((0, 4), (3, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        for out in (
            kernels.swiglu(empty, empty),
            kernels.geglu(empty, empty, "tanh"),
            kernels.bias_gelu(empty, torch.zeros(shape[-1])),
        ):
            assert out.shape == shape
            (grad,) = torch.autograd.grad(out.sum(), empty)
            assert grad.shape == shape


def test_a_bias_in_float32_beside_bf16_activations_gets_a_float32_gradient() -> None:
    x = torch.randn(500, 8).bfloat16().requires_grad_()
    bias = torch.zeros(8, requires_grad=True)
    dx, dbias = torch.autograd.grad(kernels.bias_gelu(x, bias).float().sum(), (x, bias))
    assert dx.dtype == torch.bfloat16
    assert dbias.dtype == torch.float32
    torch.testing.assert_close(dbias, dx.double().sum(0).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernels.swiglu(x, x[:1]), r"up: got shape \(1, 4\); accepted: .* = \(3, 4\)"),
        (lambda x: kernels.swiglu(x, x.double()), r"up: got torch.float64 .* dtype and device"),
        (lambda x: kernels.geglu(x, x, "tan"), r"approximate: got 'tan'; accepted: 'none', 'tanh'"),
        (lambda x: kernels.bias_gelu(x, x), r"bias: got .* accepted: a tensor \(D\)"),
        (lambda x: kernels.bias_gelu(x, x[0, :3]), r"bias: got shape \(3,\)"),
        (lambda x: kernels.bias_gelu(x.long(), None), r"x: got int64 .* floating-point"),
        (lambda x: kernels.swiglu(x, x, impl="quick"), r"impl='quick' does not exist for swiglu"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 4))


def test_compiles_as_one_graph_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    def fn(x: Tensor, y: Tensor) -> Tensor:
        a = kernels.swiglu(x, y) + kernels.geglu(x, y, "tanh")
        return a + kernels.bias_gelu(x, y[0])

    x, y = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(fn(x, y).sum(), (x, y))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        grads = torch.autograd.grad(other(x, y).sum(), (x, y))
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)
