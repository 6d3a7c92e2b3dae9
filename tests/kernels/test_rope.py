"""rope: a rotation of each pair, both layouts, partial widths, and Transformers' own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from tests.kernels.compare import assert_variant

TENSORS = ("q", "k")


def tables(length: int, width: int, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** -(torch.arange(width // 2, dtype=torch.float64) / max(width // 2, 1))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def inputs(
    length: int, width: int, rotated: int, interleaved: bool, batched: bool
) -> dict[str, Tensor]:
    cos, sin = tables(length, rotated, interleaved)
    if batched:
        cos, sin = torch.stack([cos, cos.flip(0)]), torch.stack([sin, sin.flip(0)])
    return {
        "q": torch.randn(2, length, 4, width),
        "k": torch.randn(2, length, 2, width),
        "cos": cos,
        "sin": sin,
    }


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("length", "width", "rotated"), [(1, 2, 2), (63, 8, 8), (17, 12, 6)])
def test_forward_backward(
    length: int, width: int, rotated: int, interleaved: bool, batched: bool
) -> None:
    tensors = inputs(length, width, rotated, interleaved, batched)
    assert_variant(kernels.rope, tensors, TENSORS, interleaved=interleaved)
    assert_variant(kernels.rope, tensors, ("k",), interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_rows_equal_the_dense_ones(interleaved: bool) -> None:
    tensors = inputs(9, 8, 8, interleaved, batched=True)
    assert_variant(
        kernels.rope, {n: x.flatten(0, 1) for n, x in tensors.items()}, TENSORS,
        interleaved=interleaved,
    )  # fmt: skip
    dense = kernels.rope(**tensors, interleaved=interleaved)
    packed = kernels.rope(
        **{n: x.flatten(0, 1) for n, x in tensors.items()}, interleaved=interleaved
    )
    for a, b in zip(dense, packed, strict=True):
        assert torch.equal(a.flatten(0, 1), b)


def test_float32_tables_beside_bf16_heads() -> None:
    tensors = inputs(31, 8, 8, False, False)
    q, k = tensors["q"].bfloat16(), tensors["k"].bfloat16()
    cos, sin = tensors["cos"].float(), tensors["sin"].float()
    ours = kernels.rope(q, k, cos, sin)
    exact = kernels.rope(q.float(), k.float(), cos, sin, impl="reference")
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only_and_lengths_stay(impl: str, interleaved: bool) -> None:
    cos, sin = tables(20, 8, interleaved)
    one = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 20, 1, 8)
    two = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 20, 1, 8)
    q, k = kernels.rope(one, two, cos, sin, interleaved=interleaved, impl=impl)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in range(-5, 6):
        values = scores.diagonal(distance)
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(q.norm(dim=-1), one.norm(dim=-1))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_parity_with_transformers(impl: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    tensors = {n: x.float() for n, x in inputs(13, 16, 16, False, True).items()}
    theirs = apply_rotary_pos_emb(
        tensors["q"], tensors["k"], tensors["cos"], tensors["sin"], unsqueeze_dim=2
    )
    ours = kernels.rope(**tensors, impl=impl)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_of_the_definition(interleaved: bool) -> None:
    cos, sin = tables(3, 4, interleaved)
    q = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 3, 1, 6, dtype=torch.float64, requires_grad=True)
    call = lambda q, k: kernels.rope(  # noqa: E731
        q, k, cos, sin, interleaved=interleaved, impl="reference"
    )
    assert torch.autograd.gradcheck(call, (q, k))


def test_strided_views_and_zero_sizes() -> None:
    tensors = inputs(7, 8, 6, False, False)
    fused = torch.randn(2, 7, 10, 8)
    tensors |= {"q": fused[:, :, :6:2], "k": fused[:, :, 6:].flip(2)}
    assert_variant(kernels.rope, tensors, TENSORS)
    cos, sin = tables(0, 8)
    q = torch.zeros(2, 0, 4, 8, requires_grad=True)
    out, _ = kernels.rope(q, q, cos, sin)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cos": torch.ones(5, 8)}, r"cos: got shape \(5, 8\); accepted: \(L, R\) = \(7, 8\)"),
        ({"sin": torch.ones(7, 6)}, r"sin: got shape \(7, 6\)"),
        ({"cos": torch.ones(7, 5)}, r"cos: got 5 columns; accepted: an even number up to D = 8"),
        ({"cos": torch.ones(7, 10)}, r"cos: got 10 columns"),
        ({"k": torch.ones(2, 6, 2, 8)}, r"k: got shape \(2, 6, 2, 8\)"),
        ({"k": torch.ones(2, 7, 2, 8).double()}, r"k: got torch.float64"),
        ({"q": torch.ones(7, 8)}, r"q: got .*\(B, L, H, D\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    tensors = {n: x.float() for n, x in inputs(7, 8, 8, False, False).items()}
    with pytest.raises(ValueError, match=message):
        kernels.rope(**(tensors | change))


def test_compiles_as_one_graph_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = {n: x.float() for n, x in inputs(7, 8, 6, True, False).items()}
    q, k = tensors["q"].requires_grad_(), tensors["k"].requires_grad_()

    def fn(q: Tensor, k: Tensor) -> Tensor:
        a, b = kernels.rope(q, k, tensors["cos"], tensors["sin"], interleaved=True)
        return (a.square().sum() + b.square().sum()) * a.mean()

    expected = torch.autograd.grad(fn(q, k), (q, k))
    compiled: Callable[..., Any] = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(torch.autograd.grad(other(q, k), (q, k)), expected)
