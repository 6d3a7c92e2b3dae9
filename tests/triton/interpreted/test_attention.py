"""Dense attention in the interpreter: outputs, lse and every gradient against float64.

Lengths are those of FlashAttention's tests: one row, one key, tiles that end anywhere, more queries
than keys and fewer. Tiles are the real ones, so most cases are a few blocks of a head or two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels.triton_ops import attention_launch
from tests.triton.compare import assert_follows_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [(1, 1), (239, 1), (799, 3), (113, 203), (108, 256), (640, 128), (511, 1), (3, 513)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse; rows that see nothing get 0 for an lse of -inf, whose errors are no numbers."""
    out, lse = kernels.attention(
        q, k, v, key_bias=key_bias, sinks=sinks, return_lse=True, **{"impl": "triton", **options}
    )
    return out, torch.where(lse == -torch.inf, 0.0, lse)


# Gradients of scores are p (dp - Δ), whose terms come from sums in different orders. The reference
# subtracts a sum of the same products: with one key its error is exactly 0.
FLOAT32_FLOOR = 1e-5


def follows_reference(*tensors: Tensor | None, **options: Any) -> None:
    floor = FLOAT32_FLOOR if tensors[0].dtype == torch.float32 else 0.0
    assert_follows_reference(
        attend, partial(attend, impl="reference"), tensors, floor=floor, **options
    )


def inputs(
    lq: int,
    lk: int,
    heads: int = 1,
    kv_heads: int = 1,
    width: int = 64,
    v_width: int = 64,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> list[Tensor]:
    return [
        torch.randn(batch, lq, heads, width).to(dtype),
        torch.randn(batch, lk, kv_heads, width).to(dtype),
        torch.randn(batch, lk, kv_heads, v_width).to(dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """Bidirectional in float32, causal in half precision: the loops are the same in both."""
    follows_reference(*inputs(*lengths, dtype=dtype), causal=dtype != torch.float32)


@pytest.mark.parametrize("lengths", [(113, 203), (203, 113), (640, 128)], ids=str)
def test_causal_is_aligned_at_the_end(lengths: tuple[int, int]) -> None:
    follows_reference(*inputs(*lengths), causal=True)


def test_many_tiles() -> None:
    follows_reference(*inputs(1023, 1024, dtype=torch.bfloat16), causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_many_tiles_of_many_heads(causal: bool, dtype: torch.dtype) -> None:
    follows_reference(*inputs(1023, 1024, 6, 2, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_query_heads_share_tiles(kv_heads: int, dtype: torch.dtype) -> None:
    """Six, three and one rows per position; tiles begin within a position's heads."""
    follows_reference(*inputs(59, 70, 6, kv_heads, dtype=dtype), causal=True)


@pytest.mark.parametrize("cached", [1, 1 << 30], ids=["a head at a time", "all heads together"])
def test_the_order_of_tiles_reaches_every_tile(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_launch, "CACHED_BYTES", cached)
    follows_reference(*inputs(150, 150, 3, 3, batch=2), causal=True)


def test_sections_that_do_not_divide_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "CACHED_BYTES", 2 * 150 * 128 * 4)
    assert attention_launch.heads_per_section(3, 150 * 128 * 4, True) == 2
    follows_reference(*inputs(150, 150, 3, 3), causal=True)


# One piece, two, a piece that is not filled; keys wider than values, values wider than keys.
WIDTHS = [(32, 32), (48, 80), (72, 96), (128, 128), (160, 224), (192, 128), (256, 256), (16, 20)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_head_dimensions(widths: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        follows_reference(*inputs(70, 67, 2, 1, *widths, dtype=dtype), causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_head_dimensions_over_many_tiles(widths: tuple[int, int], dtype: torch.dtype) -> None:
    follows_reference(*inputs(203, 239, 4, 2, *widths, dtype=dtype))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_exact_products_reach_small_errors(softcap: float | None) -> None:
    """Not only within the reference's error: within a few units of float32."""
    q, k, v = inputs(113, 203)
    ours = kernels.attention(q, k, v, softcap=softcap, return_lse=True, impl="triton")
    exact = kernels.attention(
        q.double(), k.double(), v.double(), softcap=softcap, return_lse=True, impl="reference"
    )
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)
