"""quantized_linear and lora_linear: values and gradients, exactness, memory, wrong arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import QuantizedTensor, low_rank_matmul, quantize
from stackwise.kernels.formats import FORMATS
from tests.kernels.compare import assert_variant

SHAPES = [(1, 1, 1, 1), (7, 70, 33, 4), (63, 200, 129, 3), (130, 256, 300, 8)]  # M, K, N, r


@pytest.fixture(params=["whole", "pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight dequantised at once, and in many ragged pieces."""
    if request.param == "pieces":
        monkeypatch.setitem(low_rank_matmul.SCRATCH_BYTES, "cpu", 20_000)


def inputs(m: int, k: int, n: int, r: int, bias: bool = True) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(m, k),
        "lora_a": torch.randn(r, k) / k**0.5,
        "lora_b": torch.randn(n, r) / r**0.5,
    }
    return tensors | ({"bias": torch.randn(n)} if bias else {})


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["nvfp4", "nf4", "fp8_block"])
def test_lora_over_a_quantised_weight(format: str, shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape)
    weight = quantize(torch.randn(shape[2], shape[1]) / shape[1] ** 0.5, format)

    def call(x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return kernels.lora_linear(x, weight, lora_a, lora_b, bias=bias, scaling=0.7, **options)

    for wanted in (("x", "lora_a", "lora_b", "bias"), ("lora_a",), ("lora_b",), ("x",), ()):
        assert_variant(call, tensors, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_over_a_plain_weight(shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape, bias=False)
    tensors["weight"] = torch.randn(shape[2], shape[1]) / shape[1] ** 0.5
    for wanted in (("x", "weight", "lora_a", "lora_b"), ("weight",), ("x", "lora_a")):
        assert_variant(kernels.lora_linear, tensors, wanted, scaling=2.0)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("format", list(FORMATS))
def test_quantized_linear(format: str) -> None:
    for m, k, n, _ in SHAPES:
        weight = quantize(torch.randn(n, k), format)

        def call(x: Tensor, bias: Tensor | None = None, **o: Any) -> Tensor:
            return kernels.quantized_linear(x, weight, bias, **o)  # noqa: B023

        assert_variant(call, {"x": torch.randn(m, k), "bias": torch.randn(n)}, ("x", "bias"))
        assert_variant(call, {"x": torch.randn(2, m, k)}, ("x",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("format", list(FORMATS))
def test_one_hot_inputs_return_the_weight_bit_for_bit(
    format: str, double: bool, dtype: torch.dtype
) -> None:
    double = double and format == "nf4"
    weight = quantize(torch.randn(150, 200), format, double_quantization=double)
    out = kernels.quantized_linear(torch.eye(200, dtype=dtype), weight)
    assert torch.equal(out, weight.dequantize(dtype).t())
    x = torch.zeros(150, 200, dtype=dtype, requires_grad=True)
    kernels.quantized_linear(x, weight).backward(torch.eye(150, dtype=dtype))
    assert x.grad is not None
    assert torch.equal(x.grad, weight.dequantize(dtype))


def test_gradcheck_of_the_references() -> None:
    weight = quantize(torch.randn(6, 20, dtype=torch.float64), "nvfp4")
    x, a, b, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(3, 20), (2, 20), (6, 2), (6,)]
    )
    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda x, a, b, c, impl=impl: kernels.lora_linear(
                x, weight, a, b, scaling=0.5, bias=c, impl=impl
            ),
            (x, a, b, bias),
        )
        assert torch.autograd.gradcheck(
            lambda x, c, impl=impl: kernels.quantized_linear(x, weight, c, impl=impl), (x, bias)
        )


def test_a_fresh_adapter_changes_nothing() -> None:
    x, weight = torch.randn(5, 96), quantize(torch.randn(40, 96), "nvfp4")
    out = kernels.lora_linear(x, weight, torch.randn(4, 96), torch.zeros(40, 4))
    assert torch.equal(out, kernels.quantized_linear(x, weight))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (5, 0)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    k = shape[-1]
    weight = quantize(torch.randn(9, k), "nvfp4")
    tensors = {"x": torch.randn(shape), "a": torch.randn(3, k), "b": torch.randn(9, 3)}

    def call(x: Tensor, a: Tensor, b: Tensor, **o: Any) -> Tensor:
        return kernels.lora_linear(x, weight, a, b, **o)

    assert_variant(call, tensors, ("x", "a", "b"))


def test_strided_inputs_and_zero_stride_gradients() -> None:
    weight = quantize(torch.randn(33, 70), "nvfp4")
    x = torch.randn(70, 2, 9).permute(1, 2, 0).requires_grad_()
    a, b = torch.randn(70, 4).t(), torch.randn(4, 33).t()
    ours = kernels.lora_linear(x, weight, a, b)
    plain = kernels.lora_linear(x, weight, a, b, impl="reference")
    torch.testing.assert_close(ours, plain)
    (dx,) = torch.autograd.grad(ours.sum(), x)
    (dx_plain,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(dx, dx_plain)


def test_adapters_of_another_dtype_keep_their_gradients_dtype() -> None:
    weight = quantize(torch.randn(33, 64), "nf4")
    a = torch.randn(4, 64, requires_grad=True)
    b = torch.randn(33, 4, requires_grad=True)
    out = kernels.lora_linear(torch.randn(5, 64).bfloat16(), weight, a, b)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == b.dtype == torch.float32


def test_autocast_takes_its_dtype() -> None:
    weight, x = quantize(torch.randn(33, 64), "nvfp4"), torch.randn(5, 64, requires_grad=True)
    a, b = torch.randn(4, 64), torch.randn(33, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.lora_linear(x, weight, a, b)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    plain = kernels.lora_linear(x.detach().bfloat16(), weight, a, b)
    assert torch.equal(out, plain)


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    weight = quantize(torch.randn(512, 1024), "nvfp4")
    x = torch.randn(4, 1024, requires_grad=True)
    a = torch.randn(4, 1024, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.lora_linear(x, weight, a, torch.randn(512, 4))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    own = {t.untyped_storage().data_ptr() for t in weight.tensors().values()}
    assert sum(size for at, size in storages.items() if at not in own) < 64 * 1024


def test_scratch_is_what_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    before = low_rank_matmul._scratch

    def counted(elements: int, like: Tensor) -> Tensor:
        taken.append(elements * like.element_size())
        return before(elements, like)

    monkeypatch.setattr(low_rank_matmul, "_scratch", counted)
    monkeypatch.setitem(low_rank_matmul.SCRATCH_BYTES, "cpu", 300_000)
    weight = quantize(torch.randn(700, 500), "nf4")
    x = torch.randn(3, 500, dtype=torch.bfloat16, requires_grad=True)
    kernels.quantized_linear(x, weight).sum().backward()
    assert max(taken) == low_rank_matmul.scratch_bytes((700, 500), torch.bfloat16, "cpu")


@pytest.mark.parametrize("format", ["nvfp4", "nf4"])
def test_compiles_whole(format: str) -> None:
    weight = quantize(torch.randn(33, 64), format, double_quantization=format == "nf4")
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(33, 4, requires_grad=True)
    x = torch.randn(6, 64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return kernels.lora_linear(x, weight, a, b, scaling=0.5).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x), (x, a, b))
    got = torch.autograd.grad(compiled(x), (x, a, b))
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_equals_an_adapter_layer_as_commonly_written() -> None:
    x, weight = torch.randn(5, 64), torch.randn(33, 64)
    a, b = torch.randn(4, 64), torch.randn(33, 4)
    plain = F.linear(x, weight) + F.linear(F.linear(x, a), b) * (16 / 4)
    torch.testing.assert_close(kernels.lora_linear(x, weight, a, b, scaling=4.0), plain)


def quantized(n: int, k: int) -> QuantizedTensor:
    return quantize(torch.zeros(n, k), "nvfp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 5)}, "weight: got shape (8, 64); accepted: (N, K) with K = 5"),
        ({"weight": torch.ones(8, 64).double()}, "weight: got torch.float64"),
        ({"weight": quantized(8, 32)}, "weight: got shape (8, 32)"),
        ({"weight": [1.0]}, "weight: got [1.0]; accepted: a Tensor or a QuantizedTensor (N, K)"),
        ({"lora_a": torch.ones(3, 63)}, "lora_a: got shape (3, 63)"),
        ({"lora_b": torch.ones(8, 2)}, "lora_b: got shape (8, 2)"),
        ({"bias": torch.ones(7)}, "bias: got shape (7,)"),
        ({"impl": "cutlass"}, "impl='cutlass' does not exist for lora_linear"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 64),
        "weight": quantized(8, 64),
        "lora_a": torch.ones(3, 64),
        "lora_b": torch.ones(8, 3),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.lora_linear(**(arguments | changes))


def test_quantized_linear_wants_a_quantised_weight() -> None:
    with pytest.raises(ValueError, match="weight: got float32"):
        kernels.quantized_linear(torch.ones(2, 4), torch.ones(3, 4))  # type: ignore[arg-type]
