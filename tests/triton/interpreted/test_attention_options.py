"""Options of attention in the interpreter, alone and together; hidden rows; regressions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from tests.triton.interpreted.test_attention import DTYPES, follows_reference, inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options_together(dtype: torch.dtype) -> None:
    kv_heads = 1 if dtype == torch.float32 else 2  # its tiles are small
    bias, sinks = torch.randn(2, kv_heads, 100), torch.randn(2 * kv_heads)
    bias[1, :, 80:] = -torch.inf
    follows_reference(
        *inputs(40, 100, 2 * kv_heads, kv_heads, 80, 48, dtype, batch=2), bias, sinks,
        causal=True, window=(30, -1), softcap=2.0, scale=0.4,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(5, -1), (-1, 3), (200, 150), (0, 0)], ids=str)
def test_windows(window: tuple[int, int], causal: bool) -> None:
    follows_reference(*inputs(270, 270), window=window, causal=causal)


@pytest.mark.parametrize("lengths", [(239, 113), (113, 239)], ids=str)
def test_windows_of_unequal_lengths(lengths: tuple[int, int]) -> None:
    follows_reference(*inputs(*lengths, 3, 1), window=(70, 40))


def test_an_endless_window() -> None:
    follows_reference(*inputs(70, 70), window=(1 << 40, 1 << 40))


@pytest.mark.parametrize("rows", [1, 2])
def test_key_bias_and_its_gradient(rows: int) -> None:
    bias = torch.randn(2, rows, 100)
    follows_reference(*inputs(40, 100, 4, 2, batch=2), bias)
    follows_reference(*inputs(40, 100, 4, 2, dtype=torch.bfloat16, batch=2), bias)


def test_a_bias_in_another_dtype_and_layout() -> None:
    bias = torch.randn(150, 1, 2).to(torch.bfloat16).permute(2, 1, 0)
    follows_reference(*inputs(70, 150, 2, 2, dtype=torch.bfloat16, batch=2), bias)


@pytest.mark.parametrize("softcap", [0.7, 50.0])
def test_softcap(softcap: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = inputs(70, 150, dtype=dtype)
        follows_reference(3 * q, k, v, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_and_their_gradient(dtype: torch.dtype) -> None:
    sinks = torch.tensor([0.5, -2.0, 3.0, -torch.inf])
    follows_reference(*inputs(70, 40, 4, 2, dtype=dtype, batch=2), None, sinks[:3].repeat(2)[:4])
    q, k, v = inputs(70, 40, 4, 2, dtype=dtype)
    plain = kernels.attention(q, k, v, causal=True, impl="triton")
    sunk = kernels.attention(q, k, v, causal=True, sinks=sinks, impl="triton")
    assert torch.equal(sunk[:, :, 3], plain[:, :, 3])
    assert not torch.equal(sunk[:, 30:, 2], plain[:, 30:, 2])


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5])
def test_scales(scale: float) -> None:
    follows_reference(*inputs(70, 90), scale=scale, causal=True)
    follows_reference(*inputs(70, 90, dtype=torch.bfloat16), scale=8 * scale)


def gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out.float().sum(), tensors, retain_graph=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hide", ["causal", "bias", "window"])
def test_hidden_rows_give_zero_minus_infinity_and_no_gradient(
    hide: str, dtype: torch.dtype
) -> None:
    tensors = [x.requires_grad_() for x in inputs(150, 60, 2, 1, dtype=dtype)]
    bias, hidden, options = None, slice(0, 90), {}
    if hide == "causal":
        options = {"causal": True}
    elif hide == "window":
        options = {"window": (4, 0)}
    else:
        bias, hidden = torch.full((1, 1, 60), -torch.inf), slice(0, 150)
    out, lse = kernels.attention(*tensors, key_bias=bias, return_lse=True, impl="triton", **options)
    assert (out[:, hidden] == 0).all()
    assert (lse[..., hidden] == -torch.inf).all()
    dq, dk, dv = gradients(out, tensors)
    assert (dq[:, hidden] == 0).all()
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()
    if hide == "bias":
        assert (dk == 0).all()
        assert (dv == 0).all()
    else:
        assert lse[..., 90:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_very_low_lse_with_half_a_tile_of_rows(dtype: torch.dtype) -> None:
    """192 rows are one and a half tiles of 128; with every lse below -88.7, where exp(lse) in
    float32 is 0, cuDNN's kernel under SDPA gives NaN in dq."""
    q, k, v = inputs(192, 192, dtype=dtype)
    bias = torch.full((1, 1, 192), -200.0)
    bias[..., 150:] = -torch.inf
    lse = kernels.attention(q, k, v, key_bias=bias, return_lse=True, impl="triton")[1]
    assert lse.max() < -88.7
    follows_reference(q, k, v, bias)


def test_large_scores_do_not_overflow() -> None:
    """Scores of thousands; in bfloat16, as float32 would show how the blocks of a product are
    summed: scores are computed anew in the backward pass, where another tile has other blocks."""
    q, k, v = inputs(70, 150, dtype=torch.bfloat16)
    follows_reference(40 * q, 40 * k, v)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_in_nothing_out(lengths: tuple[int, int], batch: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(*lengths, 2, 1, batch=batch)]
    sinks = torch.zeros(2, requires_grad=True)
    bias = torch.zeros(batch, 1, lengths[1], requires_grad=True)
    leaves = [*tensors, bias, sinks]
    out, lse = kernels.attention(
        *tensors, key_bias=bias, sinks=sinks, return_lse=True, impl="triton"
    )
    assert torch.equal(out, torch.zeros(batch, lengths[0], 2, 64))
    assert torch.equal(lse, torch.zeros(batch, 2, lengths[0]))
    for leaf, gradient in zip(leaves, gradients(out, leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_what_is_refused_is_named() -> None:
    def fails(message: str, tensors: list[Tensor], **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            kernels.attention(*tensors, impl="triton", **options)

    small = inputs(3, 3)
    fails("q has head dimension 257; accepted: 16 to 256", inputs(3, 3, 1, 1, 257))
    fails("v has head dimension 8; accepted: 16 to 256", inputs(3, 3, 1, 1, 64, 8))
    fails("a dense mask; accepted: causal", small, mask=torch.ones(1, 1, 3, 3).bool())
    fails("scale -1.0; accepted: 0 or more", small, scale=-1.0)
    fails(r"dtype torch\.float64; accepted: float32", [x.double() for x in small])
