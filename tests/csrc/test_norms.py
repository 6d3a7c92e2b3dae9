"""rms_norm and layer_norm of csrc/ on the emulator: values, every gradient, no rule broken.

The emulator reports what no comparison of numbers shows: races, unwritten and foreign memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from stackwise.kernels import _cuda
from stackwise.kernels.cuda_ops import launch, norms
from tests.csrc.compare import DTYPES, IDS, check_layer_norm, check_rms_norm, draw
from tests.csrc.emulator import Emulator

pytestmark = pytest.mark.usefixtures("emulator")

# A row in part of a warp, vectors and not; in one warp; in several; beyond the registers of the
# backward pass for float32 and for all; beyond those of the forward pass.
SHAPES = [
    *((1, 1), (239, 1), (63, 8), (1, 63), (113, 63), (70, 64), (239, 65)),
    *((7, 768), (9, 1000), (7, 1001), (4, 4096), (5, 4100), (3, 8192), (2, 8193), (2, 16384)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, width = 2 * draw(*shape, dtype=dtype) + 1, shape[1]
    weight, bias = draw(width, dtype=dtype), draw(width, dtype=dtype)
    check_layer_norm(x, weight, bias)
    check_rms_norm(x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", [(1, 1), (113, 63), (70, 64), (7, 768), (3, 4100), (2, 8192)])
def test_residual(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    weight, bias = draw(shape[1], dtype=dtype), draw(shape[1], dtype=dtype)
    check_layer_norm(x, weight, bias, residual)
    check_rms_norm(x, weight, residual, weight_offset=1.0)


def test_more_rows_than_one_block_takes_at_once() -> None:
    check_layer_norm(draw(1501, 96), draw(96), draw(96))
    check_rms_norm(draw(400, 96, dtype=torch.bfloat16), draw(96))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_types(low: torch.dtype) -> None:
    x, residual = draw(9, 72, dtype=low), draw(9, 72)
    check_layer_norm(x, draw(72), draw(72))
    check_layer_norm(x, draw(72), draw(72, dtype=low))
    check_layer_norm(x, draw(72, dtype=low), draw(72))
    check_rms_norm(x, draw(72), residual)
    check_rms_norm(residual, draw(72, dtype=low), x)
    check_rms_norm(x, draw(72, dtype=low), draw(9, 72, dtype=torch.bfloat16))


def poisoned(*shape: int) -> Tensor:
    """NaN, to hold the rows of a strided view: reading beside a row shows."""
    return torch.full(shape, torch.nan)


def test_strided_views() -> None:
    columns = poisoned(21, 88)
    columns[::3, 8:72] = draw(7, 64)
    check_layer_norm(columns[::3, 8:72], draw(64), draw(64))
    shifted = poisoned(7, 68)
    shifted[:, 1:65] = draw(7, 64)
    check_rms_norm(shifted[:, 1:65], draw(64), shifted[:, 1:65])
    check_rms_norm(draw(64, 7).T, draw(64))
    check_layer_norm(draw(7, 64), draw(128)[::2], draw(128)[::2])
    check_rms_norm(draw(3, 4, 5, 64).transpose(1, 2), draw(64))
    check_rms_norm(draw(64).expand(5, 64), draw(64))
    check_rms_norm(draw(64), draw(64))
    check_layer_norm(draw(128)[::2], draw(64))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_unaligned_addresses(dtype: torch.dtype) -> None:
    check_layer_norm(draw(5 * 64 + 1, dtype=dtype)[1:].view(5, 64), draw(64), draw(64))
    check_rms_norm(draw(5, 64, dtype=dtype), draw(65, dtype=dtype)[1:])


def gradients(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    generator = torch.Generator().manual_seed(3)
    incoming = torch.randn(out.shape, generator=generator).to(out.dtype)
    return (out, *torch.autograd.grad(out, leaves, incoming))


def test_the_same_bits_every_time() -> None:
    for shape in ((239, 64), (29, 768), (5, 8200)):
        x, weight, bias = draw(*shape, dtype=torch.bfloat16), draw(shape[1]), draw(shape[1])
        first = gradients(norms.layer_norm, x, weight, bias)
        for other in zip(first, gradients(norms.layer_norm, x, weight, bias), strict=True):
            assert torch.equal(*other)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (5, 0)])
def test_zero_sizes(shape: tuple[int, ...], emulator: Emulator) -> None:
    x, weight, bias = torch.zeros(shape), draw(shape[-1]), draw(shape[-1])
    out, dx, dweight, dbias = gradients(norms.layer_norm, x, weight, bias)
    assert out.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))
    assert emulator.launches == []


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_asked_for(wanted: tuple[int, ...]) -> None:
    tensors = [draw(7, 64), draw(64), draw(64)]
    all_of_them = gradients(norms.layer_norm, *tensors)[1:]
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    out = norms.layer_norm(*leaves)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    some = torch.autograd.grad(out, [leaves[i] for i in wanted], incoming)
    for i, gradient in zip(wanted, some, strict=True):
        torch.testing.assert_close(gradient, all_of_them[i], rtol=0, atol=0)


def test_either_output_alone_carries_a_gradient() -> None:
    x, residual, weight = (t.requires_grad_() for t in (draw(3, 64), draw(3, 64), draw(64)))
    normed, summed = norms.rms_norm(x, weight, residual=residual)
    (alone,) = torch.autograd.grad(summed.sum(), x, retain_graph=True)
    assert torch.equal(alone, torch.ones_like(x))
    both = torch.autograd.grad(normed.sum() + summed.sum(), x, retain_graph=True)[0]
    (normed_alone,) = torch.autograd.grad(normed.sum(), x)
    torch.testing.assert_close(both, normed_alone + 1)


def test_no_gradient_of_a_gradient() -> None:
    x, weight = draw(3, 64).requires_grad_(), draw(64).requires_grad_()
    out = norms.rms_norm(x, weight).square().sum()
    (dx,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_compiles_as_one_graph_and_checkpoints(emulator: Emulator) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = norms.rms_norm(x, weight, residual=x + 1)
        return norms.layer_norm(summed, weight, weight + 1) + normed

    x, weight = draw(4, 64).requires_grad_(), draw(64).requires_grad_()
    expected = torch.autograd.grad(function(x, weight).sum(), (x, weight))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(function, *a, use_reentrant=False)):
        emulator.launches.clear()
        found = torch.autograd.grad(other(x, weight).sum(), (x, weight))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert "sw_norm_backward" in emulator.launches


def operation_samples() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.stackwise
    x, weight = draw(3, 64), draw(64)
    for centered in (False, True):
        stats = torch.rand((2, 3) if centered else 3)
        yield ops.cuda_norm_forward, (x, weight, None, 1e-5, 0.0, centered)
        yield ops.cuda_norm_residual_forward, (x, x + 1, weight, None, 1e-5, 0.0, centered)
        bias = torch.bfloat16 if centered else None
        for wanted in ((True, bias), (False, None)):
            options = (0.0, centered, *wanted)
            yield ops.cuda_norm_backward, (x, None, x + 1, weight, stats, *options)


def test_operations_are_registered_correctly() -> None:
    for op, arguments in operation_samples():
        torch.library.opcheck(op.default, arguments)


def test_the_registered_operation_and_the_direct_call_agree() -> None:
    x, weight, bias = draw(5, 64), draw(64), draw(64)
    direct = gradients(norms.layer_norm, x, weight, bias)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = gradients(norms.layer_norm, x, weight, bias)
    assert {"stackwise.cuda_norm_forward.default", "stackwise.cuda_norm_backward.default"} <= {
        *seen
    }
    for pair in zip(direct, watched, strict=True):
        assert torch.equal(*pair)


def test_host_entries_refuse_what_the_kernels_cannot_take(emulator: Emulator) -> None:
    forward, backward = emulator.library.sw_norm_forward, emulator.library.sw_norm_backward
    pack_forward, pack_backward = _cuda.NORM_FORWARD.pack, _cuda.NORM_BACKWARD.pack
    fp32, fp16, bf16 = (launch.TYPE_CODES[t] for t in (DTYPES[0], DTYPES[2], DTYPES[1]))

    def run_forward(rows: int = 1, width: int = 8, types: int = fp32) -> int:
        pointers, strides = (0,) * 7, (width, 0)
        return int(forward(pack_forward(*pointers, *strides, rows, width, 0.0, 0.0, types, 0, 0)))

    invalid = 1
    assert run_forward(rows=0) == 0
    assert run_forward(rows=-1) == invalid
    assert run_forward(width=0) == invalid
    assert run_forward(width=1 << 30) == invalid
    assert run_forward(types=3) == invalid
    assert run_forward(types=bf16 | fp16 << 4) == invalid

    def run_backward(partial: int = 0, dbias: int = 0, count: int = 1) -> int:
        pointers = (0,) * 6 + (partial, 0, dbias)
        numbers = (8, 0, 8, 0, 8, 0.0, fp32, 0, count)
        return int(backward(pack_backward(*pointers, *numbers, 0)))

    assert run_backward() == 0
    assert run_backward(partial=16) == invalid, "sums without a place for dweight"
    assert run_backward(dbias=16) == invalid, "a bias of a norm that is not centered"
    assert run_backward(count=0) == invalid
    assert "invalid argument" in emulator.library.sw_error_string(invalid).decode()


def test_a_short_buffer_is_reported(emulator: Emulator) -> None:
    x, weight = draw(4, 64), draw(64)
    y, stats = torch.empty(4, 64)[:3], torch.empty(4)
    with pytest.raises(_cuda.CudaLibraryError, match=r"out of bounds: it writes 16 bytes .* is y,"):
        norms._launch_forward(x, None, weight, None, y, None, stats, 1e-5, 0.0, False)
    emulator.launches.clear()
    check_rms_norm(x, weight)
    assert len(emulator.launches) == 2
