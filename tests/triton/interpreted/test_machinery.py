"""Faulty kernels are caught here, and the interpreter computes bfloat16 as torch does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.triton.compare import assert_follows_reference, poisoned_memory


@triton.jit
def _double_kernel(x, out, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2 x; the faults are those a kernel of one tile per program can have."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    if FAULT == "wrong mask":
        inside = offset < n - 1
    if FAULT == "shifted":
        value = tl.load(x + (offset + 1) % n, mask=inside)
    else:
        value = tl.load(x + offset, mask=inside)
    if FAULT == "one wrong element":
        value = tl.where(offset == 70, value * 1.1, value)
    tl.store(out + offset, 2 * value, mask=inside)


def double(x: Tensor, fault: str = "") -> Tensor:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return launch(x, "" if fault == "wrong gradient" else fault)

        @staticmethod
        def backward(ctx: object, dout: Tensor) -> Tensor:
            return launch(dout, "shifted" if fault == "wrong gradient" else "")

    def launch(x: Tensor, fault: str) -> Tensor:
        out, block = torch.empty_like(x), 64
        programs = triton.cdiv(x.numel(), block) - (fault == "unwritten tile")
        _double_kernel[(programs,)](x, out, x.numel(), FAULT=fault, BLOCK=block)
        return out

    return Double.apply(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong mask", r"output 0 \[112\]: got nan.* 1 of 113 elements"),
        ("unwritten tile", r"output 0 \[\d+\]: got nan.* 49 of 113 elements"),
        ("shifted", "output 0 "),
        ("one wrong element", r"output 0 \[70\].* 1 of 113 elements"),
        ("wrong gradient", "gradient of argument 0"),
    ],
)
def test_faulty_kernels_are_caught(fault: str, message: str, dtype: torch.dtype) -> None:
    x = (1 + torch.rand(113)).to(dtype)
    assert_follows_reference(double, lambda x: 2 * x, [x])
    with pytest.raises(AssertionError, match=message):
        assert_follows_reference(lambda x: double(x, fault), lambda x: 2 * x, [x])


def test_fresh_memory_is_poisoned() -> None:
    with poisoned_memory():
        for fresh in (torch.empty(5), torch.empty_like(torch.ones(5)), torch.ones(1).new_empty(5)):
            assert fresh.isnan().all()


@triton.jit
def _arithmetic_kernel(x, y, out, N: tl.constexpr):
    """Rows of out: x + y, x · y, x − y, max(x, y), and the sum of x, all in the pointers' dtype."""
    offset = tl.arange(0, N)
    a, b = tl.load(x + offset), tl.load(y + offset)
    tl.store(out + offset, a + b)
    tl.store(out + N + offset, a * b)
    tl.store(out + 2 * N + offset, a - b)
    tl.store(out + 3 * N + offset, tl.maximum(a, b))
    total = tl.sum(a.to(tl.float32), axis=0).to(a.dtype)
    tl.store(out + 4 * N + offset, tl.zeros((N,), a.dtype) + total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_of_the_interpreter(dtype: torch.dtype) -> None:
    x, y = (torch.randn(256).to(dtype) for _ in range(2))
    out = torch.empty(5, 256, dtype=dtype)
    _arithmetic_kernel[(1,)](x, y, out, N=256)
    expected = [x + y, x * y, x - y, torch.maximum(x, y)]
    for row, values in zip(out, expected, strict=False):
        assert torch.equal(row, values)
    torch.testing.assert_close(out[4], x.float().sum().to(dtype).expand(256))


@triton.jit
def _convert_kernel(x, out, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out + offset, tl.load(x + offset).to(out.dtype.element_ty))


def _edges() -> Tensor:
    """Ties between neighbours, to even both ways, and what has no mantissa to round."""
    tie, special = [1.00390625, 1.01171875, -1.00390625], [0.0, -0.0, torch.inf, -torch.inf]
    return torch.tensor([*tie, *special, torch.nan, 3.4e38])


@pytest.mark.parametrize("values", [lambda: torch.randn(256), _edges], ids=["random", "edges"])
def test_conversion_to_bfloat16_rounds_to_nearest_even(values: Callable[[], Tensor]) -> None:
    x = torch.nn.functional.pad(values(), (0, 256 - values().numel()))
    out = torch.empty(256, dtype=torch.bfloat16)
    _convert_kernel[(1,)](x, out, N=256)
    torch.testing.assert_close(out, x.bfloat16(), atol=0, rtol=0, equal_nan=True)


@triton.jit
def _product_kernel(x, y, out, N: tl.constexpr):
    """out = x y for (N, N) matrices, float32 accumulation."""
    tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(x + tile), tl.load(y + tile))
    tl.store(out + tile, product)


def test_matrix_product_of_bfloat16() -> None:
    x, y = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    _product_kernel[(1,)](x, y, out, N=32)
    torch.testing.assert_close(out, x.float() @ y.float(), atol=1e-5, rtol=1e-5)
