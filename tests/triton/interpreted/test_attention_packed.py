"""Packed attention in the interpreter: documents of every kind, unused tokens, and its schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from tests.triton.compare import assert_follows_reference
from tests.triton.interpreted.test_attention import DTYPES, FLOAT32_FLOOR

# One token, none, a tile less one, a tile and more.
LENGTHS = (5, 1, 0, 127, 150)


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    heads: int = 2,
    kv_heads: int = 1,
    dtype: torch.dtype = torch.float32,
    unused: int = 0,
) -> list[Any]:
    """q, k, v, cu_seqlens_q, cu_seqlens_k, with ``unused`` tokens after the last document."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    total_q, total_k = sum(lengths_q) + unused, sum(lengths_k) + unused
    tensors = [
        torch.randn(total_q, heads, 64),
        torch.randn(total_k, kv_heads, 64),
        torch.randn(total_k, kv_heads, 32),
    ]
    return [*(x.to(dtype) for x in tensors), boundaries(lengths_q), boundaries(lengths_k)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    impl: str = "triton",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of the documents' tokens, 0 where a row sees nothing."""
    out, lse = kernels.attention(
        *(q, k, v), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=key_bias, sinks=sinks,
        return_lse=True, impl=impl, **options,
    )  # fmt: skip
    used = int(cu_q[-1])
    return out[:used], torch.where(lse == -torch.inf, 0.0, lse)[:, :used]


def reference(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return attend(*tensors, impl="reference", **options)


def follows_reference(*tensors: Any, **options: Any) -> None:
    floor = FLOAT32_FLOOR if tensors[0].dtype == torch.float32 else 0.0
    assert_follows_reference(attend, reference, tensors, floor=floor, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents(dtype: torch.dtype) -> None:
    follows_reference(*inputs(LENGTHS, dtype=dtype), causal=dtype != torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_unequal_sides(causal: bool) -> None:
    sides = inputs((5, 1, 0, 70, 140, 9), (140, 1, 33, 60, 20, 0))
    follows_reference(*sides, causal=causal)
    follows_reference(*sides, causal=causal, window=(30, 20))


def test_lengths_of_one_row_and_one_key() -> None:
    follows_reference(*inputs((511, 3), (1, 513), 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unused_tokens_get_zeros_and_are_not_read(dtype: torch.dtype) -> None:
    """Both sides have tokens beyond the last boundary: NaN there reaches nothing."""
    tensors = inputs((5, 70), unused=150, dtype=dtype)
    follows_reference(*tensors, causal=True)
    for x in tensors[:3]:
        x[75:] = torch.nan
    leaves = [x.requires_grad_() for x in tensors[:3]]
    out, lse = kernels.attention(*leaves, cu_seqlens_q=tensors[3], return_lse=True, impl="triton")
    assert out[:75].isfinite().all()
    assert (out[75:] == 0).all()
    assert (lse[:, 75:] == -torch.inf).all()
    for gradient in torch.autograd.grad(out.float().sum(), leaves):
        assert gradient[:75].isfinite().all()
        assert (gradient[75:] == 0).all()


def test_all_options_together() -> None:
    tensors = inputs(LENGTHS, heads=4, kv_heads=2, dtype=torch.bfloat16)
    bias = torch.randn(2, sum(LENGTHS))
    bias[:, 10:40] = -torch.inf
    follows_reference(*tensors, bias, torch.randn(4), causal=True, window=(60, -1), softcap=3.0)


def test_a_bias_shared_by_the_heads() -> None:
    follows_reference(*inputs((5, 70), heads=2, kv_heads=2), torch.randn(1, 75))


def run(tensors: list[Any], upstream: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = kernels.attention(*leaves, cu_seqlens_q=tensors[3], impl="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("causal", [False, True])
def test_a_document_has_the_same_bits_in_any_company(causal: bool) -> None:
    for length, company in ((70, (5, 130)), (1, (64,)), (150, (0, 7))):
        one = inputs((length,), dtype=torch.bfloat16)
        upstream = torch.randn(length, 2, 32).bfloat16()
        alone = run(one, upstream, causal=causal)
        lengths = (*company, length, *company)
        many = inputs(lengths, dtype=torch.bfloat16)
        at = slice(sum(company), sum(company) + length)
        for mine, x in zip(many[:3], one[:3], strict=True):
            mine[at] = x
        around = torch.randn(sum(lengths), 2, 32).bfloat16()
        around[at] = upstream
        for ours, expected in zip(run(many, around, causal=causal), alone, strict=True):
            assert torch.equal(ours[at], expected), (length, company)


def test_a_nan_stays_in_its_own_document() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs((5, 70, 17), dtype=dtype)
        for x in tensors[:3]:
            x[7] = torch.nan
        for x in run(tensors, torch.ones(92, 2, 32).to(dtype)):
            assert x[:5].isfinite().all()
            assert x[75:].isfinite().all()


def test_equals_dense_attention_of_each_document() -> None:
    q, k, v, cu, _ = inputs((70, 70))
    packed = kernels.attention(q, k, v, cu_seqlens_q=cu, causal=True, impl="triton")
    dense = [x.unflatten(0, (2, 70)) for x in (q, k, v)]
    assert torch.equal(
        packed.unflatten(0, (2, 70)), kernels.attention(*dense, causal=True, impl="triton")
    )


@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (0, 0)), ((0,), (3,)), ((3,), (0,))])
def test_zero_sizes(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    tensors = inputs(*lengths)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    out, lse = kernels.attention(
        *leaves, cu_seqlens_q=tensors[3], cu_seqlens_k=tensors[4], return_lse=True, impl="triton"
    )
    assert torch.equal(out, torch.zeros(sum(lengths[0]), 2, 32))
    assert lse.shape == (2, sum(lengths[0]))
    for x, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


def test_boundaries_that_lie_reach_no_other_memory() -> None:
    """They cannot be checked without waiting for the device: cut off at the total, never falling,
    so that every tile of the schedule lies inside the tensors."""
    q, k, v, *_ = inputs((40,))
    for wrong in ([0, 60], [0, 30, 10, 40], [5, 40]):
        cu = torch.tensor(wrong, dtype=torch.int32)
        out = kernels.attention(q, k, v, cu_seqlens_q=cu, impl="triton")
        assert out.isfinite().all()
