"""Quantised weights: bit-exact against a scalar implementation, with the known errors and sizes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from stackwise.kernels import QuantizedTensor, quantize
from stackwise.kernels.formats import FORMATS, round_e2m1, round_e4m3, round_nf4, table
from tests.kernels.scalar_formats import quantized

# Relative RMS error on N(0, 1) weights: the values that the formats are known to have.
ERRORS = {
    ("nf4", None): 0.0920,
    ("nvfp4", None): 0.0952,
    ("mxfp4", "floor"): 0.1149,
    ("mxfp4", "even"): 0.1119,
    ("fp8_tensor", None): 0.0265,
    ("fp8_row", None): 0.0265,
    ("fp8_block", None): 0.0265,
    ("mxfp8", "ceil"): 0.0267,
}
BITS = {"nf4": 4.5, "nvfp4": 4.5, "mxfp4": 4.25, "fp8_tensor": 8, "fp8_row": 8, "fp8_block": 8,
        "mxfp8": 8.25}  # fmt: skip


def hard_weight(n: int, k: int) -> torch.Tensor:
    """Weights with ties, zeros of both signs, zero blocks, tiny and huge values."""
    weight = torch.randn(n, k) * torch.logspace(-3, 2, n)[:, None]
    weight[0] = torch.arange(k) % 27 * 0.25 - 3.25
    weight[1, : k // 2] = 0.0
    weight[2] = -0.0
    weight[3] *= 1e-7
    return weight


def codes_of(q: QuantizedTensor) -> torch.Tensor:
    if not FORMATS[q.format].four_bit:
        return q.data.view(torch.uint8)
    pairs = torch.stack((q.data & 15, q.data >> 4), dim=-1)
    return pairs.reshape(*q.shape[:-1], -1)[..., : q.shape[-1]]


@pytest.mark.parametrize("shape", [(5, 128), (131, 70), (4, 1)])
@pytest.mark.parametrize(
    ("format", "rounding"),
    [(name, None) for name in FORMATS]
    + [("mxfp4", "floor"), ("mxfp4", "ceil"), ("mxfp8", "floor"), ("mxfp8", "even")],
)
def test_equals_the_scalar_implementation_bit_for_bit(
    format: str, rounding: str | None, shape: tuple[int, int]
) -> None:
    weight = hard_weight(*shape)
    q = quantize(weight, format, scale_rounding=rounding)
    default = "ceil" if format == "mxfp8" else "even"
    codes, values = quantized(weight.numpy(), format, rounding or default)
    np.testing.assert_array_equal(codes_of(q).numpy(), codes)
    np.testing.assert_array_equal(q.dequantize().numpy(), values)


@pytest.mark.parametrize(("format", "rounding"), list(ERRORS))
def test_error_on_normal_weights(format: str, rounding: str | None) -> None:
    weight = torch.randn(1024, 1024)
    q = quantize(weight, format, scale_rounding=rounding)
    error = (q.dequantize() - weight).norm() / weight.norm()
    assert ERRORS[format, rounding] * 0.97 < error < ERRORS[format, rounding] * 1.03
    assert q.bits_per_weight == pytest.approx(BITS[format], rel=0.005)


def test_double_quantization_costs_no_accuracy_and_saves_the_scales() -> None:
    weight = torch.randn(1024, 1024)
    q = quantize(weight, "nf4", double_quantization=True)
    assert (q.dequantize() - weight).norm() / weight.norm() < 0.0920 * 1.03
    assert q.bits_per_weight == pytest.approx(4.127, rel=0.001)
    plain = quantize(weight, "nf4")
    assert torch.equal(q.data, plain.data)
    assert (q.scales() - plain.scale).abs().max() < 0.01 * plain.scale.max()


@pytest.mark.parametrize(
    ("round_to", "top"), [(round_e2m1, 6.0), (round_nf4, 1.0), (round_e4m3, 448.0)]
)
def test_stochastic_rounding_is_unbiased_and_takes_only_the_neighbours(round_to, top) -> None:  # type: ignore[no-untyped-def]
    points = torch.linspace(-top, top, 57)
    kind = {6.0: "e2m1", 1.0: "nf4"}.get(top)

    def value(x: torch.Tensor) -> torch.Tensor:
        return table(kind, x.device)[x.int()] if kind else x.float()

    grid = (
        table(kind, points.device).unique()
        if kind
        else torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().unique()
    )
    grid = grid[grid.isfinite()]
    draws = 4000
    many = points.repeat(draws, 1)
    drawn = value(round_to(many, torch.rand(many.shape)))
    below = torch.stack([grid[grid <= p].max() for p in points])
    above = torch.stack([grid[grid >= p].min() for p in points])
    assert ((drawn == below) | (drawn == above)).all()
    # Five standard errors of a two-point distribution, which is at most half its width.
    bound = 5 * (above - below) / 2 / draws**0.5 + 1e-6
    assert ((drawn.mean(0) - points).abs() <= bound).all()


def test_stochastic_rounding_repeats_with_its_generator() -> None:
    weight = torch.randn(40, 96)
    first, again = (
        quantize(
            weight, "nvfp4", rounding="stochastic", generator=torch.Generator().manual_seed(3)
        ).data
        for _ in range(2)
    )
    other = quantize(
        weight, "nvfp4", rounding="stochastic", generator=torch.Generator().manual_seed(4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other.data)


@pytest.mark.parametrize("format", list(FORMATS))
def test_experts_are_quantised_one_by_one(format: str) -> None:
    weight = torch.randn(3, 130, 96) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    q = quantize(weight, format)
    assert q.shape == weight.shape
    alone = torch.stack([quantize(matrix, format).dequantize() for matrix in weight])
    assert torch.equal(q.dequantize(), alone)


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantises_into_any_dtype_with_one_rounding(format: str, dtype: torch.dtype) -> None:
    weight = torch.randn(33, 100)
    q = quantize(weight, format)
    assert (
        torch.equal(q.dequantize(torch.float64).to(dtype), q.dequantize(dtype))
        or (
            # float64 keeps the product exact, float32 rounds it once more: at most the last place.
            (q.dequantize(torch.float64) - q.dequantize(dtype).double()).abs()
            <= q.dequantize(torch.float64).abs() * torch.finfo(dtype).eps
        ).all()
    )
    assert quantize(weight.to(torch.bfloat16), format).dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("shape", [(0, 64), (8, 0), (2, 0, 32)])
def test_empty_weights(format: str, shape: tuple[int, ...]) -> None:
    q = quantize(torch.empty(shape), format)
    assert q.dequantize().shape == shape
    again = QuantizedTensor.from_tensors(q.tensors(), q.metadata())
    assert again.dequantize().shape == shape


@pytest.mark.parametrize("format", list(FORMATS))
def test_strided_weights_and_the_input_stays_as_it_was(format: str) -> None:
    wide = torch.randn(70, 200)
    before = wide.clone()
    view = wide.t()[3:140:2]
    assert torch.equal(
        quantize(view, format).dequantize(), quantize(view.contiguous(), format).dequantize()
    )
    assert torch.equal(wide, before)


@pytest.mark.parametrize(
    ("format", "double"), [(name, False) for name in FORMATS] + [("nf4", True)]
)
def test_tensors_and_metadata_rebuild_it(format: str, double: bool) -> None:
    q = quantize(torch.randn(20, 100).bfloat16(), format, double_quantization=double)
    again = QuantizedTensor.from_tensors(q.tensors(), q.metadata())
    assert torch.equal(again.dequantize(), q.dequantize())
    assert again.dtype == torch.bfloat16
    assert again.double_quantized is double


def test_from_tensors_refuses_what_does_not_fit() -> None:
    q = quantize(torch.randn(20, 100), "nvfp4")
    tensors, metadata = q.tensors(), q.metadata()

    def refused(match: str, tensors: dict, **changes: object) -> None:  # type: ignore[type-arg]
        with pytest.raises(ValueError, match=match):
            QuantizedTensor.from_tensors(tensors, metadata | changes)

    refused("format: got 'int3'", tensors, format="int3")
    refused("dtype: got int8", tensors, dtype="int8")
    refused("shape", tensors, shape=[20])
    refused("data: got uint8", tensors, shape=[21, 100])
    refused("tensors: got", {k: v for k, v in tensors.items() if k != "scale"})
    refused("data: got int8", tensors | {"data": tensors["data"].view(torch.int8)})
    nan = torch.full_like(tensors["global_scale"], float("nan"))
    refused("global_scale: got a scale that is not finite", tensors | {"global_scale": nan})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(4), "nvfp4", {}), "weight: got float32 (4,)"),
        ((torch.ones(4, 4, dtype=torch.int64), "nvfp4", {}), "weight: got int64"),
        ((torch.randn(4, 4), "fp5", {}), "format: got 'fp5'"),
        ((torch.full((4, 4), float("nan")), "nf4", {}), "weight: got a value that is not finite"),
        ((torch.randn(4, 4), "nf4", {"rounding": "up"}), "rounding: got 'up'"),
        ((torch.randn(4, 4), "mxfp4", {"double_quantization": True}), "double_quantization"),
        ((torch.randn(4, 4), "nf4", {"scale_rounding": "even"}), "scale_rounding"),
    ],
)
def test_wrong_arguments(arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    weight, format, options = arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(weight, format, **options)


def test_to_keeps_the_codes() -> None:
    q = quantize(torch.randn(8, 64), "nvfp4")
    half = q.to(dtype=torch.bfloat16)
    assert half.dequantize().dtype == torch.bfloat16
    assert half.data.data_ptr() == q.data.data_ptr()
    assert q.to("meta").device.type == "meta"
