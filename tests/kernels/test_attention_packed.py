"""Packed attention: documents alone, bit for bit; unequal sides; the plan and its cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import attention_plan
from tests.kernels.compare import cast
from tests.kernels.test_attention import assert_variant

QKV = ("q", "k", "v")
LENGTHS = (5, 1, 16, 0, 63, 64, 17, 5, 113, 33)


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    v_width: int = 8,
) -> dict[str, Tensor]:
    total_k = sum(lengths_q if lengths_k is None else lengths_k)
    tensors = {
        "q": torch.randn(sum(lengths_q), heads, 8),
        "k": torch.randn(total_k, kv_heads, 8),
        "v": torch.randn(total_k, kv_heads, v_width),
        "cu_seqlens_q": boundaries(lengths_q),
    }
    if lengths_k is not None:
        tensors["cu_seqlens_k"] = boundaries(lengths_k)
    return tensors


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("v_width", [8, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (64, 64, 64), (16, 32, 64), (600, 3)])
def test_forward_backward(lengths: tuple[int, ...], causal: bool, v_width: int) -> None:
    assert_variant(kernels.attention, inputs(lengths, v_width=v_width), QKV, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (3, 2)])
def test_unequal_sides(causal: bool, window: tuple[int, int] | None) -> None:
    lengths_q = (5, 1, 0, 16, 40, 9, 7, 20)
    lengths_k = (9, 1, 4, 16, 20, 0, 33, 64)
    tensors = inputs(lengths_q, lengths_k)
    assert_variant(kernels.attention, tensors, QKV, causal=causal, window=window)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (4, -1)},
        {"window": (2, 2), "causal": True},
        {"return_lse": True},
        {"return_lse": True, "causal": True, "softcap": 1.5},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    assert_variant(kernels.attention, inputs(LENGTHS), QKV, **options)
    sides = inputs((5, 9, 3), (7, 0, 2))
    assert_variant(kernels.attention, sides, QKV, **options)


@pytest.mark.parametrize("rows", [1, 2])
def test_key_bias_and_sinks(rows: int) -> None:
    tensors = inputs(LENGTHS)
    bias = torch.randn(rows, sum(LENGTHS))
    bias[:, 25:40] = -torch.inf
    tensors |= {"sinks": torch.randn(4), "key_bias": bias}
    names = (*QKV, "sinks")
    assert_variant(kernels.attention, tensors, names, causal=True, return_lse=True)
    del tensors["sinks"]
    assert_variant(kernels.attention, tensors, QKV)
    tensors["key_bias"] = torch.randn(rows, sum(LENGTHS))
    assert_variant(kernels.attention, tensors, (*QKV, "key_bias"))


def gradients(tensors: dict[str, Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    leaves = [tensors[n].detach().requires_grad_() for n in QKV]
    rest = {n: x for n, x in tensors.items() if n not in QKV}
    out = kernels.attention(*leaves, **rest, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, materialize_grads=True)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2), (1, 1), (12, 12)])
def test_a_document_has_the_same_bits_in_any_company(
    causal: bool, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    companies = ((), (64, 64), (63, 5, 113), (16,) * 40, (7, 600))
    for length in (1, 5, 16, 63, 64, 113, 128, 300, 640):
        one = cast(inputs((length,), None, *heads), dtype)
        upstream = torch.randn(length, heads[0], 8).to(dtype)
        alone = gradients(one, upstream, causal=causal)
        for company in companies:
            lengths = (*company, length, *company[::-1])
            many = cast(inputs(lengths, None, *heads), dtype)
            at = slice(sum(company), sum(company) + length)
            for name in QKV:
                many[name][at] = one[name]
            g = torch.randn(sum(lengths), heads[0], 8).to(dtype)
            g[at] = upstream
            for ours, expected in zip(gradients(many, g, causal=causal), alone, strict=True):
                assert torch.equal(ours[at], expected), (length, company)


def test_equals_dense_attention_of_each_document() -> None:
    tensors = cast(inputs((30, 30, 30)), torch.float64)
    dense = {n: tensors[n].unflatten(0, (3, 30)) for n in QKV}
    for causal in (False, True):
        packed = kernels.attention(**tensors, causal=causal)
        torch.testing.assert_close(
            packed.unflatten(0, (3, 30)), kernels.attention(**dense, causal=causal)
        )


def test_a_nan_stays_in_its_own_document() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = cast(inputs((5, 20, 17)), dtype)
        for name in QKV:
            tensors[name][7] = torch.nan
        out = kernels.attention(**tensors)
        assert out[:5].isfinite().all()
        assert out[25:].isfinite().all()


def test_some_queries_of_each_document() -> None:
    """Queries are the last rows of each document: causal aligns bottom-right per document."""
    whole = cast(inputs((12, 30, 7)), torch.float64)
    all_rows = kernels.attention(**whole, causal=True)
    last = torch.cat([torch.arange(8, 12), torch.arange(40, 42), torch.arange(43, 49)])
    some = whole | {
        "q": whole["q"][last],
        "cu_seqlens_q": boundaries((4, 2, 6)),
        "cu_seqlens_k": whole["cu_seqlens_q"],
    }
    torch.testing.assert_close(kernels.attention(**some, causal=True), all_rows[last])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_zero_sizes(impl: str) -> None:
    for lengths_q, lengths_k in (((), ()), ((0, 0), (0, 0)), ((0,), (3,)), ((3,), (0,))):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = cast(inputs(lengths_q, lengths_k), dtype)
            out, *grads = gradients(tensors, torch.ones(sum(lengths_q), 4, 8).to(dtype), impl=impl)
            assert torch.equal(out, torch.zeros(sum(lengths_q), 4, 8, dtype=dtype))
            for name, grad in zip(QKV, grads, strict=True):
                assert torch.equal(grad, torch.zeros_like(tensors[name]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 5, 11])}, r"cu_seqlens_q: got 11 as the last boundary"),
        ({"cu_seqlens_q": torch.tensor([0, 8, 5, 12])}, r"cu_seqlens_q: got \[0, 8, 5, 12\]"),
        ({"cu_seqlens_q": torch.tensor([1, 12])}, r"cu_seqlens_q: got \[1, 12\]"),
        ({"cu_seqlens_q": torch.tensor([0.0, 12.0])}, r"cu_seqlens_q: got float32"),
        ({"cu_seqlens_k": torch.tensor([0, 12])}, r"cu_seqlens_k: got 2 boundaries; .* \(3\)"),
        ({"mask": torch.ones(1, 1, 12, 12).bool()}, r"mask: got a mask with cu_seqlens"),
        ({"q": torch.ones(1, 12, 4, 8)}, r"q: got .*accepted: a tensor \(total, H, D\)"),
        ({"key_bias": torch.ones(2, 11)}, r"key_bias: got shape \(2, 11\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = cast(inputs((5, 7)), dtype) | change
        if "q" in change:
            tensors["q"] = change["q"].to(dtype)
        with pytest.raises(ValueError, match=message):
            kernels.attention(**tensors)


def test_work_grows_with_the_squares_of_the_lengths() -> None:
    """No group holds more than twice the scores that its documents need, beyond short ones."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (200,), generator=generator)
    plan = kernels.plan_packed(boundaries(tuple(lengths.tolist())))
    scores = sum(g.n * g.lq * g.lk for g in plan.groups)
    assert scores <= 1.25 * int(lengths.square().sum())
    assert len(plan.groups) <= 32


def test_the_plan_is_remembered_until_the_boundaries_change_or_die() -> None:
    cu = boundaries((3, 4))
    plan = kernels.plan_packed(cu)
    assert kernels.plan_packed(cu) is plan
    assert kernels.plan_packed(cu, cu) is plan
    cu[1] = 5
    changed = kernels.plan_packed(cu)
    assert changed is not plan
    assert [int(n) for g in changed.groups for n in g.lengths_q.flatten()] == [5, 2]
    key = (id(cu), id(cu))
    assert key in attention_plan._plans
    del cu
    gc.collect()
    assert key not in attention_plan._plans


def test_boundaries_made_in_inference_mode_are_not_remembered() -> None:
    with torch.inference_mode():
        cu = boundaries((3, 4))
        first = kernels.plan_packed(cu)
        cu[1] = 5
        assert kernels.plan_packed(cu) is not first
        tensors = inputs((5, 2)) | {"cu_seqlens_q": cu}
        out = kernels.attention(**tensors)
    torch.testing.assert_close(out, kernels.attention(**tensors, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph_and_checkpoints(dtype: torch.dtype) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = cast(inputs((5, 17, 3)), dtype)
    leaves = [tensors[n].requires_grad_() for n in QKV]
    cu = tensors["cu_seqlens_q"]

    def fn(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        out = kernels.attention(q, k, v, cu_seqlens_q=cu, causal=True)
        return kernels.attention(out, k, v, cu_seqlens_q=cu)

    def both(call: Callable[..., Tensor]) -> list[Tensor]:
        out = call(*leaves, cu)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_operations_pass_opcheck(dtype: torch.dtype) -> None:
    tensors = cast(inputs((5, 17, 3)), dtype)
    q, k, v, cu = tensors.values()
    tests = ("test_schema", "test_faketensor")
    options = (True, -1, -1, 0.5)
    ops = torch.ops.stackwise
    args = (q, k, v, cu, cu, *options)
    torch.library.opcheck(ops.attention_packed_cpu.default, args, test_utils=tests)
    out, lse = ops.attention_packed_cpu(*args)
    args = (out, q, k, v, out, lse, cu, cu, *options)
    torch.library.opcheck(ops.attention_packed_cpu_backward.default, args, test_utils=tests)
