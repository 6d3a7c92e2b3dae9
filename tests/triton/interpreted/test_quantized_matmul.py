"""Quantised products in Triton: decoding bit for bit, values and every gradient by the error rule.

Up to 256 rows one kernel decodes and multiplies, in tiles of 64 outputs by 128 inputs (64 by 64
backward); above, the weight is decoded into scratch. The shapes fall on both sides of these edges.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import low_rank_matmul, quantize
from stackwise.kernels.formats import FORMATS
from stackwise.kernels.lora_linear import lora_linear_reference
from stackwise.kernels.quantized_linear import quantized_linear_reference
from stackwise.kernels.swiglu_mlp import swiglu_mlp_reference
from stackwise.kernels.triton_ops import quantized_matmul
from tests.triton.compare import assert_follows_reference, poisoned_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = [(name, False) for name in FORMATS] + [("nf4", True)]


@pytest.fixture
def _through_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows take the path of many, in several ragged pieces."""
    monkeypatch.setattr(quantized_matmul, "FUSED_ROWS", 0)
    monkeypatch.setitem(low_rank_matmul.SCRATCH_BYTES, "cpu", 40_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "double"), KINDS)
def test_decodes_bit_for_bit(format: str, double: bool, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(150, 200), format, double_quantization=double)
    expected = weight.dequantize(dtype)
    for rows, columns in ((slice(0, 150), slice(0, 200)), (slice(33, 140), slice(128, 200))):
        out = torch.full((rows.stop - rows.start, columns.stop - columns.start), torch.nan).to(
            dtype
        )
        quantized_matmul._decode(weight, out, rows, columns)
        assert torch.equal(out, expected[rows, columns])


@pytest.mark.parametrize(("format", "double"), KINDS)
def test_one_hot_inputs_return_the_weight_bit_for_bit(format: str, double: bool) -> None:
    weight = quantize(torch.randn(70, 150), format, double_quantization=double)
    out = kernels.quantized_linear(torch.eye(150).bfloat16(), weight, impl="triton")
    assert torch.equal(out, weight.dequantize(torch.bfloat16).t())
    x = torch.zeros(70, 150, dtype=torch.bfloat16, requires_grad=True)
    y = kernels.quantized_linear(x, weight, impl="triton")
    (dx,) = torch.autograd.grad(y, x, torch.eye(70).bfloat16())
    assert torch.equal(dx, weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 130, 70, 3), (70, 200, 129, 16)])
def test_lora_linear(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_lora(*shape, dtype)


@pytest.mark.usefixtures("_through_scratch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_through_scratch(dtype: torch.dtype) -> None:
    check_lora(33, 200, 129, 5, dtype)


def check_lora(m: int, k: int, n: int, r: int, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(n, k) / k**0.5, "nvfp4")

    def call(function: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return function(x, weight, a, b, scaling=0.7, bias=bias)

    shapes = ((2, m, k), (r, k), (n, r), (n,))
    tensors = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]
    ours = partial(call, partial(kernels.lora_linear, impl="triton"))
    assert_follows_reference(ours, partial(call, lora_linear_reference), tensors)
    assert_follows_reference(ours, partial(call, lora_linear_reference), tensors, (0, 2, 3))


@pytest.mark.parametrize(("format", "double"), KINDS)
def test_every_format(format: str, double: bool) -> None:
    weight = quantize(torch.randn(90, 140), format, double_quantization=double)
    ours = partial(kernels.quantized_linear, weight=weight, impl="triton")
    reference = partial(quantized_linear_reference, weight=weight)
    assert_follows_reference(ours, reference, [torch.randn(20, 140).bfloat16()])


def test_a_plain_weight_with_an_adapter() -> None:
    tensors = [torch.randn(shape) for shape in ((9, 40), (33, 40), (2, 40), (33, 2))]
    ours = partial(kernels.lora_linear, impl="triton")
    assert_follows_reference(ours, lora_linear_reference, tensors)


def test_ranks_of_many_steps() -> None:
    weight = quantize(torch.randn(64, 192), "nf4")

    def call(function: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return function(x, weight, a, b)

    tensors = [torch.randn(shape).bfloat16() for shape in ((5, 192), (50, 192), (64, 50))]
    ours = partial(call, partial(kernels.lora_linear, impl="triton"))
    assert_follows_reference(ours, partial(call, lora_linear_reference), tensors)


def test_strided_inputs_empty_batches_and_zero_stride_gradients() -> None:
    weight = quantize(torch.randn(33, 70), "mxfp4")
    x = torch.randn(70, 18).t()[::2].requires_grad_()
    ours = kernels.quantized_linear(x, weight, impl="triton")
    plain = quantized_linear_reference(x, weight)
    torch.testing.assert_close(ours, plain)
    (dx,), (expected,) = (torch.autograd.grad(out.sum(), x) for out in (ours, plain))
    torch.testing.assert_close(dx, expected)
    empty = kernels.quantized_linear(torch.empty(0, 70), weight, impl="triton")
    assert empty.shape == (0, 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_mlp(dtype: torch.dtype) -> None:
    k, f, m, r = 70, 130, 19, 3
    formats = {"gate": "nvfp4", "up": "mxfp4", "down": "nf4"}
    shapes = {"gate": (f, k), "up": (f, k), "down": (k, f)}
    weights = [quantize(torch.randn(shapes[n]) / k**0.5, formats[n]) for n in shapes]

    def call(function: Any, x: Tensor, *pairs: Tensor) -> Tensor:
        lora = {n: (pairs[2 * i], pairs[2 * i + 1]) for i, n in enumerate(shapes)}
        return function(x, *weights, lora=lora, scaling=0.5)

    tensors = [torch.randn(m, k).to(dtype)]
    for outer, inner in shapes.values():
        tensors += [(torch.randn(s) / s[1] ** 0.5).to(dtype) for s in ((r, inner), (outer, r))]
    ours = partial(call, partial(kernels.swiglu_mlp, impl="triton"))
    assert_follows_reference(ours, partial(call, swiglu_mlp_reference), tensors)


def test_repeats_give_the_same_bits() -> None:
    weight = quantize(torch.randn(64, 128), "nvfp4")
    x = torch.randn(40, 128).bfloat16().requires_grad_()
    results = []
    for _ in range(2):
        with poisoned_memory():
            y = kernels.quantized_linear(x, weight, impl="triton")
            results.append((y, *torch.autograd.grad(y.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
