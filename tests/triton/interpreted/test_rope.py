"""Rotary embedding in Triton: values and gradients of queries and keys, by the error rule.

A program takes eight heads at most and 2,048 pairs, so head counts and lengths are odd ones.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels.rope import rope_reference
from tests.triton.compare import assert_follows_reference, poisoned_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLES = (2, 3)


def tables(*lead: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random, not cosines of one angle per pair: every column of both tables has its own value."""
    return torch.randn(*lead, width).to(dtype), torch.randn(*lead, width).to(dtype)


def follows(inputs: list[Tensor], interleaved: bool) -> None:
    assert_follows_reference(
        partial(kernels.rope, impl="triton"),
        rope_reference,
        inputs,
        TABLES,
        interleaved=interleaved,
    )


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "heads", "width", "rotated"),
    [(1, (4, 4), 64, 64), (63, (9, 3), 40, 24), (113, (2, 1), 6, 2)],
    ids=["one token", "groups, partial, odd sizes", "one pair"],
)
def test_rope_follows_its_reference(
    length: int,
    heads: tuple[int, int],
    width: int,
    rotated: int,
    dtype: torch.dtype,
    interleaved: bool,
) -> None:
    q, k = (torch.randn(2, length, h, width).to(dtype) for h in heads)
    follows([q, k, *tables(length, width=rotated)], interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_tables_of_each_row_and_of_half_precision(interleaved: bool) -> None:
    q, k = (torch.randn(3, 21, h, 16).bfloat16() for h in (5, 5))
    follows([q, k, *tables(3, 21, width=16, dtype=torch.bfloat16)], interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_packed_tokens(interleaved: bool) -> None:
    q, k = (torch.randn(239, h, 32) for h in (4, 2))
    follows([q, k, *tables(239, width=32)], interleaved)


def test_views_into_a_fused_projection_and_strided_tables() -> None:
    fused = torch.randn(2, 37, 8, 20)
    q, k = fused[:, :, :5], fused[:, :, 5:7]
    cos, sin = torch.randn(37, 2, 12).unbind(1)
    follows([q, k, cos, sin], False)
    follows([q, k, cos, sin.contiguous()], False)
    follows([q.transpose(0, 1), k.transpose(0, 1), *tables(2, width=12)], True)


def test_strided_last_dimension() -> None:
    q, k = (torch.randn(2, 9, 3, 32)[..., ::2] for _ in range(2))
    cos, sin = (t.T for t in torch.randn(2, 16, 9))
    follows([q, k, cos, sin], True)


def test_empty_inputs_and_empty_tables() -> None:
    with poisoned_memory():
        q = torch.empty(2, 0, 4, 8, requires_grad=True)
        out, _ = kernels.rope(q, q, *tables(0, width=8), impl="triton")
        assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    same_q, same_k = kernels.rope(q, k, *tables(5, width=0), impl="triton")
    assert torch.equal(same_q, q)
    assert torch.equal(same_k, k)


def test_rotation_is_undone_by_its_gradient() -> None:
    angles = torch.rand(11, 8).repeat(1, 2)
    q = torch.randn(1, 11, 3, 16, dtype=torch.float32, requires_grad=True)
    out, _ = kernels.rope(q, q.detach(), angles.cos(), angles.sin(), impl="triton")
    (back,) = torch.autograd.grad(out, q, out.detach())
    torch.testing.assert_close(back, q.detach(), atol=1e-6, rtol=1e-6)


def test_wrong_arguments() -> None:
    q, (cos, sin) = torch.ones(1, 3, 2, 8), tables(3, width=8)
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        kernels.rope(q.double(), q.double(), cos, sin, impl="triton")
    with pytest.raises(ValueError, match="cos: got 7 columns"):
        kernels.rope(q, q, cos[:, :7], sin[:, :7], impl="triton")


def test_operation_is_described_to_the_compiler() -> None:
    q, k = torch.randn(2, 7, 6, 16)[:, :, ::2], torch.randn(2, 7, 1, 16)
    kernels.rope(q, k, *tables(7, width=8), impl="triton")
    for backward in (False, True):
        torch.library.opcheck(
            torch.ops.stackwise.triton_rope.default,
            (q, k, *tables(7, width=8), True, backward),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_compiled_as_one_graph() -> None:
    rotate = partial(kernels.rope, impl="triton", interleaved=True)
    q, k = torch.randn(2, 7, 3, 16), torch.randn(2, 7, 1, 16)
    cos, sin = tables(7, width=8)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(q, k, cos, sin), rotate(q, k, cos, sin), strict=True):
        assert torch.equal(ours, eager)
