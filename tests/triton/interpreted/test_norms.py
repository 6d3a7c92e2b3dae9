"""rms_norm and layer_norm in the interpreter: values, gradients, layouts, and what they refuse."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stackwise import kernels
from stackwise.kernels import norm_ops
from stackwise.kernels.triton_ops import norm_kernels, norms
from tests.triton.compare import assert_follows_reference, poisoned_memory

# One element, odd widths, GPT-2's, one no vector divides; few rows, and enough of them for every
# program of the persistent backward pass to walk over several tiles.
SHAPES = [(3, 1), (239, 63), (3, 113), (29, 768), (1, 1000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_multiprocessors", lambda device: 2)


def rms(x: Tensor, weight: Tensor, residual: Tensor | None = None, **options: Any) -> Any:
    return kernels.rms_norm(x, weight, 1e-5, residual, **{"impl": "triton", **options})


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> Any:
    return kernels.layer_norm(x, weight, bias, 1e-5, residual, **{"impl": "triton", **options})


def follows_reference(function: Any, *tensors: Tensor | None, **options: Any) -> None:
    assert_follows_reference(function, partial(function, impl="reference"), tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_norms_follow_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Both outputs, gradients of every input; float32 weights under half-precision inputs."""
    x, residual = torch.randn(2, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[1])
    follows_reference(partial(rms, weight_offset=1.0), x, weight, residual)
    follows_reference(layer, x, weight, bias, residual)


def test_a_row_of_many_warps_follows_the_definition() -> None:
    x, residual = torch.randn(2, 3, 4096).bfloat16()
    follows_reference(layer, x, torch.randn(4096), torch.randn(4096), residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (239, 113), (3, 768)], ids=str)
def test_plain_norms_follow_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    follows_reference(rms, x, weight)
    follows_reference(layer, x, weight)
    follows_reference(layer, x, weight, torch.randn(shape[1]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_sum_is_the_sum_to_the_bit(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 113).to(dtype)
    for norm in (rms, layer):
        assert torch.equal(norm(x, torch.ones(113), residual=residual)[1], x + residual)


def test_offset_rows_lose_no_variance() -> None:
    """Mean 1000, deviation 1: E[x²] - E[x]² in float32 would be off by percents."""
    follows_reference(layer, torch.randn(5, 768) + 1000, torch.randn(768), torch.randn(768))


@pytest.mark.parametrize("norm", [rms, layer])
def test_strided_inputs_are_read_in_place(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, weight = torch.randn(2, 7, 3 * 63), torch.randn(63)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    monkeypatch.setattr(norms, "column_sum", lambda partial, dtype: partial.sum(0).to(dtype))
    weight.contiguous = lambda: weight  # type: ignore[method-assign]
    x = fused[..., 63:126]
    y = norm(x, weight)
    assert torch.equal(y, norm(x.clone(), weight))


@pytest.mark.parametrize("norm", [rms, layer])
def test_strided_and_transposed_inputs_follow_the_definition(norm: Any) -> None:
    weight = torch.randn(63)
    follows_reference(norm, torch.randn(2, 7, 3 * 63)[..., 63:126], weight)
    follows_reference(norm, torch.randn(63, 9).T, weight)
    follows_reference(norm, torch.randn(4, 5, 63).transpose(0, 1), torch.randn(63, 2)[:, 0])


@pytest.mark.parametrize("norm", [rms, layer])
def test_broadcast_gradients_are_read_through_their_strides(norm: Any) -> None:
    x = torch.randn(5, 63, requires_grad=True)
    weight = torch.randn(63)
    ours, reference = (
        torch.autograd.grad(norm(x, weight, impl=impl).sum(), x)[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_31_bits() -> None:
    """600 rows, 4 Mi elements apart: the last ones start past element 2³¹."""
    stride, rows = (1 << 22) - 16, 600
    x = torch.empty(stride * rows, dtype=torch.float16).as_strided((rows, 63), (stride, 1))
    x[:] = torch.randn(rows, 63)
    weight = torch.ones(63)
    expected = kernels.rms_norm(x.clone(), weight, impl="reference")
    torch.testing.assert_close(kernels.rms_norm(x, weight, impl="triton"), expected)


@pytest.mark.parametrize("norm", [rms, layer])
def test_weight_gradients_are_the_same_bits_every_time(norm: Any) -> None:
    x, weight = torch.randn(239, 113), torch.randn(113, requires_grad=True)
    upstream = torch.randn(239, 113)
    first, second = (torch.autograd.grad(norm(x, weight), weight, upstream)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("norm", [rms, layer])
@pytest.mark.parametrize("shape", [(0, 768), (2, 0, 768), (4, 0)], ids=str)
def test_nothing_in_nothing_out(norm: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    y, summed = norm(x, weight, residual=torch.randn(shape))
    assert y.shape == summed.shape == shape
    dx, dweight = torch.autograd.grad([y, summed], [x, weight], [y, summed])
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1]))


def test_frozen_parameters_get_no_gradient_and_leave_dx_alone() -> None:
    x, weight, bias = torch.randn(9, 113, requires_grad=True), torch.randn(113), torch.randn(113)
    upstream = torch.randn(9, 113)
    expected = torch.autograd.grad(layer(x, weight.requires_grad_(), bias), x, upstream)[0]
    frozen = torch.autograd.grad(layer(x, weight.detach(), bias), x, upstream)[0]
    torch.testing.assert_close(frozen, expected, rtol=1e-6, atol=1e-6)
    bias.requires_grad_()
    dbias = torch.autograd.grad(layer(x, weight.detach(), bias), bias, upstream)[0]
    torch.testing.assert_close(dbias, upstream.sum(0))


@pytest.mark.parametrize("norm", [rms, layer])
def test_either_output_may_be_unused(norm: Any) -> None:
    x, residual = (torch.randn(5, 63, requires_grad=True) for _ in range(2))
    weight = torch.randn(63, requires_grad=True)
    upstream = torch.randn(5, 63)
    for used in (0, 1):
        ours, reference = (
            torch.autograd.grad(
                norm(x, weight, residual=residual, impl=impl)[used],
                (x, residual, weight),
                upstream,
                allow_unused=True,
            )
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_a_float32_residual_stream_keeps_its_dtype() -> None:
    x = torch.randn(5, 63, dtype=torch.bfloat16, requires_grad=True)
    residual, weight = torch.randn(5, 63, requires_grad=True), torch.randn(63)
    y, summed = rms(x, weight, residual)
    assert y.dtype == summed.dtype == torch.float32
    assert torch.equal(summed, x + residual)
    dx, dresidual = torch.autograd.grad([y, summed], [x, residual], [y.detach(), y.detach()])
    assert torch.equal(dx, dresidual.bfloat16())


def test_torch_modules_agree() -> None:
    """torch.nn.RMSNorm in float32 is LlamaRMSNorm, torch.nn.LayerNorm is GPT-2's."""
    x = torch.randn(2, 5, 768)
    llama, gpt2 = torch.nn.RMSNorm(768, eps=1e-5), torch.nn.LayerNorm(768, eps=1e-5)
    for module in (llama, gpt2):
        torch.nn.init.normal_(module.weight)
    torch.testing.assert_close(rms(x, llama.weight), llama(x))
    torch.testing.assert_close(layer(x, gpt2.weight, gpt2.bias), gpt2(x))


def test_operators_are_registered_correctly() -> None:
    x, residual, weight, bias = *torch.randn(2, 3, 63), *torch.randn(2, 63)
    y, stats = norms._forward_op(x, weight, bias, 1e-5, 0.0, True)
    torch.library.opcheck(norms._forward_op, (x, weight, bias, 1e-5, 0.0, True))
    torch.library.opcheck(norms._residual_op, (x, residual, weight, None, 1e-5, 1.0, False))
    options = (0.0, True, True, True)
    torch.library.opcheck(norms._backward_op, (y, residual, x, weight, stats, *options))


@pytest.mark.parametrize("norm", [rms, layer])
def test_compiles_as_one_graph(norm: Any) -> None:
    x, residual = torch.randn(2, 5, 63).requires_grad_()
    weight = torch.randn(63, requires_grad=True)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        y, summed = norm(x, weight, residual=residual)
        return (y * summed).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, weight), (x, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(loss(x, weight), (x, weight)))


def test_under_autocast_and_checkpointing() -> None:
    x = torch.randn(5, 63, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(63, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x, weight)
        again = checkpoint(layer, x, weight, use_reentrant=False)
    assert plain.dtype == torch.bfloat16
    for out in (plain, again):
        assert torch.equal(out, plain)
    first, second = (torch.autograd.grad(o.float().sum(), weight)[0] for o in (plain, again))
    assert torch.equal(first, second)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="8193 columns; accepted: up to 8192"):
        rms(torch.randn(2, 8193), torch.randn(8193))
    with pytest.raises(ValueError, match=r"dtype torch\.float64; accepted: float32"):
        layer(torch.randn(2, 8).double(), torch.randn(8).double())
    with pytest.raises(ValueError, match=r"residual: got shape \(3, 8\)"):
        layer(torch.randn(2, 8), torch.randn(8), residual=torch.randn(3, 8))


def broken(folder: Path, right: str, wrong: str) -> ModuleType:
    """The kernels with one expression replaced."""
    source = Path(norm_kernels.__file__).read_text()
    assert right in source
    path = folder / "broken_norm_kernels.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken_norm_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.where(m_col[None, :], b_s - mean[:, None], 0.0)", "b_s - mean[:, None]"),
        ("m_row = o_row < rows - i_first", "m_row = o_row < rows - i_first - 1"),
        ("b_dweight += b_dy * b_n", "b_dweight = b_dy * b_n"),
    ],
    ids=["padding counted as data", "last row unwritten", "only the last tile summed"],
)
def test_a_broken_kernel_is_caught(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_of = broken(tmp_path, right, wrong)
    for name in ("_norm_forward_kernel", "_norm_backward_kernel"):
        monkeypatch.setattr(norms, name, getattr(kernels_of, name))
    with pytest.raises(AssertionError, match="elements are out"):
        follows_reference(layer, torch.randn(239, 113), torch.randn(113), torch.randn(113))


def test_poisoned_memory_reaches_the_buffers_of_the_kernels() -> None:
    with poisoned_memory():
        assert norm_ops.new_stats(torch.empty(3, 5), True).isnan().all()
