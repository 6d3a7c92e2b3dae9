"""rms_norm and layer_norm: statistics, residual form, weight gradients that survive bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import norm_cpu
from tests.kernels.compare import assert_close, assert_variant, cast, run

SHAPES = [(1, 1), (63, 5), (2, 7, 113), (239, 64)]


@pytest.fixture(params=[1 << 18, 300])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_cpu, "_BLOCK", request.param)


def inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "x": 2 * torch.randn(shape) + 1,
        "weight": torch.randn(shape[-1]),
        "residual": torch.randn(shape),
    }


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_forward_backward(shape: tuple[int, ...], offset: float) -> None:
    tensors = inputs(shape)
    names = ("x", "weight", "residual")
    assert_variant(kernels.rms_norm, tensors, names, weight_offset=offset, eps=1e-5)
    del tensors["residual"]
    assert_variant(kernels.rms_norm, tensors, ("x", "weight"), weight_offset=offset)
    assert_variant(kernels.rms_norm, tensors, (), weight_offset=offset)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_layer_norm_forward_backward(shape: tuple[int, ...]) -> None:
    tensors = inputs(shape)
    assert_variant(kernels.layer_norm, tensors, ("x", "weight", "residual"))
    tensors["bias"] = torch.randn(shape[-1])
    assert_variant(kernels.layer_norm, tensors, ("x", "weight", "bias", "residual"))
    del tensors["residual"]
    for wanted in (("x", "weight", "bias"), ("x",), ("weight",), ("bias",), ()):
        assert_variant(kernels.layer_norm, tensors, wanted, eps=1e-4)


@pytest.mark.parametrize("fn", [kernels.rms_norm, kernels.layer_norm])
def test_float32_parameters_beside_bf16_activations(fn: Callable[..., Any]) -> None:
    low = {"x": torch.randn(600, 40).bfloat16(), "weight": torch.rand(40) + 0.5}
    exact = run(fn, cast(low, torch.float64), ("x", "weight"), impl="reference")
    plain = run(fn, low, ("x", "weight"), impl="reference")
    ours = run(fn, low, ("x", "weight"))
    assert ours["dweight"].dtype == torch.float32
    assert_close("mixed", ours, plain, exact)


@pytest.mark.parametrize("fn", [kernels.rms_norm, kernels.layer_norm])
def test_gradcheck_of_the_definitions(fn: Callable[..., Any]) -> None:
    x, r = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    call = lambda x, w, r: fn(x, w, residual=r, impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, w, r))


def test_parity_with_transformers_and_pytorch() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        module = LlamaRMSNorm(48, eps=1e-5).to(dtype)
        module.weight.data.uniform_(0.5, 1.5)
        x = torch.randn(5, 9, 48).to(dtype)
        for impl in ("reference", "torch"):
            ours = kernels.rms_norm(x, module.weight, 1e-5, impl=impl)
            torch.testing.assert_close(ours, module(x))
    x, w, b = torch.randn(9, 48), torch.randn(48), torch.randn(48)
    for impl in ("reference", "torch"):
        torch.testing.assert_close(
            kernels.layer_norm(x, w, b, impl=impl), F.layer_norm(x, (48,), w, b)
        )
        torch.testing.assert_close(kernels.layer_norm(x, w, impl=impl), F.layer_norm(x, (48,), w))


@pytest.mark.parametrize("fn", [kernels.rms_norm, kernels.layer_norm])
def test_residual_form_returns_the_sum_exactly(fn: Callable[..., Any]) -> None:
    x, r, w = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    for impl in ("reference", "torch"):
        normed, summed = fn(x, w, residual=r, impl=impl)
        assert torch.equal(summed, x + r)
        assert torch.equal(normed, fn(x + r, w, impl=impl))


@pytest.mark.parametrize("fn", [kernels.rms_norm, kernels.layer_norm])
def test_strided_views_and_zero_sizes(fn: Callable[..., Any]) -> None:
    wide = torch.randn(30, 24)
    assert_variant(fn, {"x": wide[::3, 4:20], "weight": torch.randn(16)}, ("x", "weight"))
    assert_variant(fn, {"x": wide.T, "weight": torch.randn(60)[::2]}, ("x", "weight"))
    x, w = torch.zeros(0, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = fn(x, w)
    dx, dw = torch.autograd.grad(out.sum(), (x, w))
    assert out.shape == dx.shape == (0, 3, 8)
    assert torch.equal(dw, torch.zeros(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: kernels.rms_norm(x, w[:3]), r"weight: got shape \(3,\); accepted: \(D\)"),
        (lambda x, w: kernels.layer_norm(x, w, w[:2]), r"bias: got shape \(2,\)"),
        (lambda x, w: kernels.layer_norm(x, w, residual=x[:1]), r"residual: got shape \(1, 4\)"),
        (lambda x, w: kernels.rms_norm(x.int(), w), r"x: got int32"),
        (lambda x, w: kernels.rms_norm(x, w, impl="cuda"), r"impl='cuda' does not cover this case"),
    ],
)
def test_bad_arguments_are_named(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 4), torch.randn(4))


def test_compiles_as_one_graph_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    def fn(x: Tensor, w: Tensor) -> Tensor:
        normed, summed = kernels.rms_norm(x, w, residual=x)
        return kernels.layer_norm(summed, w) + normed

    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    expected = torch.autograd.grad(fn(x, w).sum(), (x, w))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        grads = torch.autograd.grad(other(x, w).sum(), (x, w))
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)
