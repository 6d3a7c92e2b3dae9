"""Dense attention: every option against the definition, alignment, masked rows, and the errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import attention_cpu
from stackwise.kernels.attention_composed import open_hidden_rows
from tests.kernels import compare
from tests.kernels.compare import cast

QKV = ("q", "k", "v")


def assert_variant(*args: Any, **options: Any) -> None:
    """PyTorch's float32 kernel takes the difference of two sums that are equal when a row sees one
    key: a few units in the last place, where the definition gives 0."""
    compare.assert_variant(*args, slack=2.0, floor=5e-6, **options)


def inputs(
    lq: int, lk: int, heads: int = 4, kv_heads: int = 2, width: int = 16, v_width: int = 16
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, lq, heads, width),
        "k": torch.randn(2, lk, kv_heads, width),
        "v": torch.randn(2, lk, kv_heads, v_width),
    }


@pytest.fixture(params=[1 << 21, 1000])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile for everything, and tiles of single heads and a few rows."""
    monkeypatch.setattr(attention_cpu, "_TILE", request.param)
    monkeypatch.setattr(attention_cpu, "_CAUSAL_ROWS", 128 if request.param > 1000 else 16)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (113, 50), (50, 113), (1, 77), (77, 1)])
@pytest.mark.parametrize("v_width", [16, 8])
def test_forward_backward(lengths: tuple[int, int], causal: bool, v_width: int) -> None:
    tensors = inputs(*lengths, v_width=v_width)
    assert_variant(kernels.attention, tensors, QKV, causal=causal)


@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (6, 1)])
def test_grouped_heads(heads: tuple[int, int]) -> None:
    for causal in (False, True):
        tensors = inputs(33, 33, *heads)
        assert_variant(kernels.attention, tensors, QKV, causal=causal, scale=0.3)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("lengths", [(40, 40), (40, 23), (23, 40)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(5, -1), (-1, 3), (4, 2), (0, 0), (-1, -1)])
def test_window(lengths: tuple[int, int], causal: bool, window: tuple[int, int]) -> None:
    assert_variant(kernels.attention, inputs(*lengths), QKV, causal=causal, window=window)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_key_bias_with_hidden_keys_and_whole_hidden_items(causal: bool, rows: int) -> None:
    tensors = inputs(40, 40)
    bias = torch.randn(2, rows, 40)
    bias[0, :, 30:] = -torch.inf
    bias[1, :, :7] = -torch.inf
    assert_variant(kernels.attention, tensors, QKV, causal=causal, key_bias=bias)
    bias[1] = -torch.inf
    assert_variant(kernels.attention, tensors, QKV, causal=causal, key_bias=bias)
    out = kernels.attention(**tensors, causal=causal, key_bias=bias)
    assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("return_lse", [False, True])
def test_gradient_of_key_bias(return_lse: bool) -> None:
    tensors = inputs(20, 20) | {"key_bias": torch.randn(2, 2, 20)}
    names = (*QKV, "key_bias")
    assert_variant(kernels.attention, tensors, names, causal=True, return_lse=return_lse)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_mask_with_hidden_rows(rows: int, causal: bool) -> None:
    mask = torch.rand(2, rows, 37, 41) > 0.5
    mask[0, :, 5:9] = False
    tensors = inputs(37, 41)
    assert_variant(kernels.attention, tensors, QKV, mask=mask, causal=causal)
    bias = torch.randn(2, 1, 41)
    bias[:, :, 20:] = -torch.inf
    assert_variant(
        kernels.attention, tensors, QKV, mask=mask, causal=causal, key_bias=bias, window=(9, 9)
    )


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hidden_rows_give_zero_minus_infinity_and_no_gradient(
    impl: str, dtype: torch.dtype
) -> None:
    tensors = cast(inputs(9, 4), dtype)
    tensors = {n: x.requires_grad_() for n, x in tensors.items()}
    out, lse = kernels.attention(**tensors, causal=True, return_lse=True, impl=impl)
    plain = kernels.attention(**tensors, causal=True, impl=impl)
    for o in (out, plain):
        assert torch.equal(o[:, :5], torch.zeros_like(o[:, :5]))
        dq, dk, dv = torch.autograd.grad(o.sum(), (tensors["q"], tensors["k"], tensors["v"]),
                                         retain_graph=True)  # fmt: skip
        assert torch.equal(dq[:, :5], torch.zeros_like(dq[:, :5]))
        assert dk.isfinite().all()
        assert dv.isfinite().all()
    assert (lse[..., :5] == -torch.inf).all()
    assert lse[..., 5:].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}])
def test_softcap_sinks_and_lse(options: dict[str, Any]) -> None:
    tensors = inputs(19, 27)
    assert_variant(kernels.attention, tensors, QKV, return_lse=True, **options)
    assert_variant(kernels.attention, tensors, QKV, softcap=0.7, **options)
    tensors |= {"sinks": torch.randn(4)}
    names = (*QKV, "sinks")
    assert_variant(kernels.attention, tensors, names, softcap=2.0, return_lse=True, **options)
    assert_variant(kernels.attention, tensors, names, **options)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_hidden_rows_can_be_opened_for_kernels_that_cannot_take_them(kind: str) -> None:
    keep = torch.tensor([[True, False, True], [False, False, False]])
    mask = keep if kind == "bool" else torch.zeros(2, 3).masked_fill(~keep, -torch.inf)
    opened, hidden = open_hidden_rows(mask)
    assert hidden.shape == (1, 1, 2, 1)
    assert hidden.flatten().tolist() == [False, True]
    expected = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.equal(opened[0, 0] if kind == "bool" else opened[0, 0] == 0, expected)


def test_large_scores_do_not_overflow() -> None:
    tensors = inputs(30, 30)
    tensors["q"] = tensors["q"] * 300
    assert_variant(kernels.attention, tensors, QKV, causal=True)
    assert_variant(kernels.attention, tensors, QKV, causal=True, return_lse=True)


def test_strided_views() -> None:
    fused = torch.randn(2, 50, 8, 16)
    tensors = {"q": fused[:, ::2, :4], "k": fused[:, 1::2, 4:6], "v": fused[:, :25, 6:].flip(1)}
    for causal in (False, True):
        assert_variant(kernels.attention, tensors, QKV, causal=causal)
    turned = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs(9, 9).items()}
    assert_variant(kernels.attention, turned, QKV)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_item_does_not_depend_on_its_batch(causal: bool, dtype: torch.dtype) -> None:
    tensors = cast(inputs(70, 70), dtype)
    both = kernels.attention(**tensors, causal=causal)
    one = kernels.attention(**{n: x[:1] for n, x in tensors.items()}, causal=causal)
    assert torch.equal(both[:1], one)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_parity_with_sdpa_and_bottom_right_alignment(impl: str) -> None:
    tensors = cast(inputs(7, 7), torch.float64)
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = kernels.attention(**tensors, causal=True, impl=impl)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
    # The last rows of a longer causal attention, as a key-value cache computes them.
    tail = kernels.attention(
        tensors["q"][:, -3:], tensors["k"], tensors["v"], causal=True, impl=impl
    )
    torch.testing.assert_close(tail, ours[:, -3:])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_closed_form_of_two_keys(impl: str) -> None:
    q = torch.tensor([2.0]).view(1, 1, 1, 1)
    k = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    v = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    out, lse = kernels.attention(q, k, v, scale=0.5, return_lse=True, impl=impl)
    weight = math.e / (math.e + 1 / math.e)
    assert out.item() == pytest.approx(10 * weight + 20 * (1 - weight), rel=1e-6)
    assert lse.item() == pytest.approx(math.log(math.e + 1 / math.e), rel=1e-6)
    sinks = torch.zeros(1)
    out = kernels.attention(q, k, v, scale=0.5, sinks=sinks, impl=impl)
    total = math.e + 1 / math.e + 1
    assert out.item() == pytest.approx((10 * math.e + 20 / math.e) / total, rel=1e-6)
    out = kernels.attention(q, k, v, scale=50.0, softcap=1.0, impl=impl)
    assert out.item() == pytest.approx(10 * weight + 20 * (1 - weight), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (1, 1)},
        {"softcap": 1.5, "return_lse": True},
        {"key_bias": torch.randn(1, 1, 5, dtype=torch.float64)},
        {"mask": torch.ones(1, 1, 4, 5, dtype=torch.bool).tril(-1)},
    ],
    ids=["plain", "causal", "window", "softcap", "key_bias", "mask"],
)
def test_gradcheck_of_the_definition(options: dict[str, Any]) -> None:
    shapes = ((1, 4, 2, 3), (1, 5, 1, 3), (1, 5, 1, 2))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        extra = {"sinks": sinks} if "softcap" in options else {}
        return kernels.attention(q, k, v, impl="reference", **options, **extra)

    inputs = (*tensors, sinks) if "softcap" in options else (*tensors, sinks.detach())
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_sizes(impl: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = {n: x.requires_grad_() for n, x in cast(inputs(*lengths), dtype).items()}
    out = kernels.attention(**tensors, causal=True, impl=impl)
    assert torch.equal(out, torch.zeros(2, lengths[0], 4, 16, dtype=dtype))
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    for grad, x in zip(grads, tensors.values(), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))
    empty = {n: x[:0] for n, x in cast(inputs(3, 4), dtype).items()}
    assert kernels.attention(**empty, impl=impl).shape == (0, 3, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(9, 4, 16)}, r"q: got .*accepted: a tensor \(B, L, H, D\)"),
        ({"k": torch.ones(2, 9, 3, 16), "v": torch.ones(2, 9, 3, 16)}, r"k: got 3 heads"),
        ({"k": torch.ones(2, 9, 2, 8)}, r"k: got shape \(2, 9, 2, 8\)"),
        ({"v": torch.ones(2, 8, 2, 16)}, r"v: got shape \(2, 8, 2, 16\)"),
        ({"k": torch.ones(3, 9, 2, 16), "v": torch.ones(3, 9, 2, 16)}, r"k: got shape \(3, 9"),
        ({"v": torch.ones(2, 9, 2, 16).bfloat16()}, r"v: got torch.bfloat16 .* torch.float32"),
        ({"key_bias": torch.ones(2, 3, 9)}, r"key_bias: got shape \(2, 3, 9\)"),
        ({"mask": torch.ones(2, 1, 9, 9)}, r"mask: got float32 .*a bool tensor"),
        ({"mask": torch.ones(2, 1, 9, 8, dtype=torch.bool)}, r"mask: got shape"),
        ({"window": (-2, 0)}, r"window: got \(-2, 0\)"),
        ({"softcap": 0.0}, r"softcap: got 0.0; accepted: a number above 0"),
        ({"sinks": torch.ones(2)}, r"sinks: got shape \(2,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, r"cu_seqlens_k: got a tensor without"),
        ({"impl": "cuda"}, r"impl='cuda' does not exist for attention"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.attention(**(inputs(9, 9) | change))


def test_autocast_computes_in_bf16_and_returns_gradients_in_the_inputs_dtype() -> None:
    tensors = {n: x.requires_grad_() for n, x in inputs(20, 20).items()}
    for impl in ("reference", "torch"):
        with torch.autocast("cpu", torch.bfloat16):
            out = kernels.attention(**tensors, causal=True, impl=impl)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().sum(), list(tensors.values()))
        assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph_and_checkpoints(dtype: torch.dtype) -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = [x.to(dtype).requires_grad_() for x in inputs(12, 12).values()]
    bias = torch.zeros(2, 1, 12)
    bias[:, :, 9:] = -torch.inf

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kernels.attention(q, k, v, causal=True)
        return kernels.attention(out, k, v, key_bias=bias)

    def both(call: Callable[..., Tensor]) -> list[Tensor]:
        out = call(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected)


def test_registered_operations_pass_opcheck() -> None:
    q, k, v = (x.bfloat16() for x in inputs(6, 9).values())
    bias = torch.zeros(1, 1, 6, 9, dtype=torch.bfloat16)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.stackwise
    torch.library.opcheck(ops.attention_cpu.default, (q, k, v, bias, False, 0.5), test_utils=tests)
    out = ops.attention_cpu(q, k, v, None, True, 0.5)
    args = (out, q, k, v, None, True, 0.5)
    torch.library.opcheck(ops.attention_cpu_backward.default, args, test_utils=tests)
