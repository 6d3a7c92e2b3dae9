"""linear_attention equals the quadratic form of its feature map, dense and packed, in every map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import linear_attention_scan, linear_attention_torch
from stackwise.kernels.linear_attention import map_features
from tests.kernels import compare
from tests.kernels.compare import cast

QKV = ("q", "k", "v")
MAPS = ("favor", "elu", "relu", "exp")


def assert_variant(*args: Any, **options: Any) -> None:
    """A state adds up the keys in another order than a row of scores: a factor of three."""
    compare.assert_variant(*args, slack=3.0, floor=3e-6, **options)


def inputs(
    lq: int, lk: int, heads: int = 4, kv_heads: int = 2, width: int = 8, v_width: int = 12
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, lq, heads, width),
        "k": torch.randn(2, lk, kv_heads, width),
        "v": torch.randn(2, lk, kv_heads, v_width),
    }


def mapped(name: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if name == "favor":
        width = tensors["q"].shape[-1]
        tensors = tensors | {"features": kernels.sample_features("gaussian", width, 14)}
    if name == "relu":
        # A row with a tiny sum of weights loses digits in every form.
        tensors = tensors | {n: tensors[n] + 1 for n in ("q", "k")}
    return tensors, {"feature_map": name}


@pytest.fixture(params=[128, 16])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one go, and chunks of 16 rows of one head at a time."""
    monkeypatch.setattr(linear_attention_scan, "_CHUNK", request.param)
    monkeypatch.setattr(linear_attention_scan, "_BLOCK", 1 << 24 if request.param > 16 else 1)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (113, 50), (50, 77), (1, 33)])
@pytest.mark.parametrize("name", MAPS)
def test_forward_backward(name: str, lengths: tuple[int, int], causal: bool) -> None:
    tensors, options = mapped(name, inputs(*lengths))
    names = (*QKV, "features") if name == "favor" else QKV
    assert_variant(kernels.linear_attention, tensors, names, causal=causal, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_equals_the_quadratic_form_of_the_same_map(name: str, causal: bool) -> None:
    """To 1e-5 in float32, at lengths of several chunks; the quadratic form is computed here."""
    tensors, options = mapped(name, inputs(400, 400))
    ours = kernels.linear_attention(**tensors, causal=causal, **options)
    double = cast(tensors, torch.float64)
    root = 8**-0.25
    phi_q, phi_k = (map_features(double[n], name, double.get("features"), root) for n in ("q", "k"))
    if name in ("favor", "exp"):
        phi_q, phi_k = phi_q.exp(), phi_k.exp()
    weights = torch.einsum("bihm,bjhm->bhij", phi_q, phi_k.repeat_interleave(2, 2))
    weights = weights.tril() if causal else weights
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhd->bihd", weights, double["v"].repeat_interleave(2, 2))
    assert (ours - expected).abs().max() <= 1e-5
    reference = kernels.linear_attention(**tensors, causal=causal, impl="reference", **options)
    assert (reference - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(heads: tuple[int, int], causal: bool) -> None:
    tensors, options = mapped("favor", inputs(33, 33, *heads))
    assert_variant(kernels.linear_attention, tensors, QKV, causal=causal, scale=0.5, **options)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_key_bias(name: str, causal: bool) -> None:
    tensors, options = mapped(name, inputs(37, 37))
    hidden = torch.randn(2, 1, 37)
    hidden[0, :, 30:] = -torch.inf
    hidden[1, :, :20] = -torch.inf
    hidden[1, :, 25] = -torch.inf
    assert_variant(
        kernels.linear_attention, tensors | {"key_bias": hidden}, QKV, causal=causal, **options
    )
    tensors["key_bias"] = torch.randn(2, 2, 37)
    names = (*QKV, "key_bias")
    assert_variant(kernels.linear_attention, tensors, names, causal=causal, **options)
    nothing = torch.full((2, 1, 37), -torch.inf)
    out = kernels.linear_attention(**tensors | {"key_bias": nothing}, causal=causal, **options)
    assert torch.equal(out, torch.zeros_like(out))


CU = [0, 5, 5, 22, 23, 60]


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_packed_documents(name: str, causal: bool) -> None:
    tensors, options = mapped(name, {n: x[0] for n, x in inputs(60, 60).items()})
    cu = torch.tensor(CU, dtype=torch.int32)
    names = (*QKV, "key_bias")
    for rows in (1, 2):
        tensors["key_bias"] = torch.randn(rows, 60)
        assert_variant(
            kernels.linear_attention, tensors, names, causal=causal, cu_seqlens_q=cu, **options
        )
    few = torch.tensor([0, 2, 2, 19, 20, 21], dtype=torch.int32)
    fewer = tensors | {"q": tensors["q"][:21]}
    assert_variant(
        kernels.linear_attention, fewer, names, causal=causal, cu_seqlens_q=few, cu_seqlens_k=cu,
        **options,
    )  # fmt: skip
    many = torch.tensor([0, 9, 9, 30, 31, 75], dtype=torch.int32)
    more = tensors | {"q": torch.randn(75, 4, 8)}
    assert_variant(
        kernels.linear_attention, more, names, causal=causal, cu_seqlens_q=many, cu_seqlens_k=cu,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_document_does_not_see_its_neighbours(causal: bool, impl: str) -> None:
    tensors, options = mapped("favor", {n: x[0] for n, x in inputs(60, 60).items()})
    options |= {"causal": causal, "impl": impl}
    cu = torch.tensor(CU, dtype=torch.int32)
    packed = kernels.linear_attention(**tensors, cu_seqlens_q=cu, **options)
    alone = {n: x if n == "features" else x[None, 23:] for n, x in tensors.items()}
    torch.testing.assert_close(packed[23:], kernels.linear_attention(**alone, **options)[0])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", MAPS)
def test_weights_sum_to_one(name: str, impl: str) -> None:
    tensors, options = mapped(name, inputs(40, 40))
    tensors["v"] = torch.ones_like(tensors["v"])
    for causal in (False, True):
        # A relu row has a feature in common with one of eight keys here.
        out = kernels.linear_attention(**tensors, causal=causal, impl=impl, **options)
        seen = out[:, 8:]
        torch.testing.assert_close(seen, torch.ones_like(seen))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_rows_without_weight_give_zero_and_no_gradient(impl: str) -> None:
    tensors = {n: x.requires_grad_() for n, x in inputs(9, 9).items()}
    with torch.no_grad():
        tensors["q"][:, :4] = -1
    for causal in (False, True):
        out = kernels.linear_attention(**tensors, feature_map="relu", causal=causal, impl=impl)
        assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
        grads = torch.autograd.grad(out.sum(), list(tensors.values()))
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][:, :4].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["favor", "exp"])
def test_features_far_beyond_the_exponents_of_float32(name: str, causal: bool) -> None:
    """Exponents up to some thousands, rising and falling along the row: exp of them would be
    infinite or 0. The expected values come from logarithms throughout."""
    tensors, options = mapped(name, inputs(150, 150))
    size = 40 * torch.linspace(0, 9, 150).sin().view(1, 150, 1, 1)
    tensors |= {n: tensors[n] * size for n in ("q", "k")}
    double = cast(tensors, torch.float64)
    low = {n: x.requires_grad_() for n, x in double.items() if n in QKV}
    u = [map_features(low[n], name, double.get("features"), 8**-0.25) for n in ("q", "k")]
    u[1] = u[1].repeat_interleave(2, 2)
    logs = torch.logsumexp(u[0][:, :, None] + u[1][:, None], dim=-1).permute(0, 3, 1, 2)
    if causal:
        logs = logs.masked_fill(torch.ones(150, 150).triu(1).bool(), -torch.inf)
    weights = logs.softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, low["v"].repeat_interleave(2, 2))
    truth = torch.autograd.grad(expected.square().sum(), list(low.values()))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-2)):
        leaves = cast({n: x.detach() for n, x in tensors.items()}, dtype)
        grads_of = [leaves[n].requires_grad_() for n in QKV]
        out = kernels.linear_attention(**leaves, causal=causal, **options)
        assert (out - expected).abs().max() <= tolerance * expected.abs().max()
        grads = torch.autograd.grad(out.square().sum(), grads_of)
        for ours, exact in zip(grads, truth, strict=True):
            assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


def test_chunks_shrink_only_for_keys_far_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = linear_attention_scan.Scan._chunk_rows

    def recorded(self: Any) -> int:
        sizes.append(original(self))
        return sizes[-1]

    monkeypatch.setattr(linear_attention_scan.Scan, "_chunk_rows", recorded)
    tensors, options = mapped("exp", inputs(300, 300))
    kernels.linear_attention(**tensors, causal=True, **options)
    tensors["k"][:, 200] += 500
    kernels.linear_attention(**tensors, causal=True, **options)
    assert sizes[0] == 128
    assert sizes[1] == 8


def test_favor_approaches_softmax_and_the_gaussian_kernel() -> None:
    """With many features; the gaussian through the key bias that the docstring names."""
    tensors = {n: x / 2 if n != "v" else x for n, x in inputs(30, 30).items()}
    features = kernels.sample_features("gaussian", 8, 1 << 16)
    for causal in (False, True):
        ours = kernels.linear_attention(**tensors, features=features, causal=causal)
        softmax = kernels.attention(**tensors, causal=causal)
        assert (ours - softmax).abs().max() <= 0.08
        bias = -0.5 * tensors["k"].square().sum(-1).transpose(1, 2) / 1.5**2
        ours = kernels.linear_attention(
            **tensors, features=features, causal=causal, scale=1.5**-2, key_bias=bias
        )
        exact = kernels.kernel_attention(**tensors, bandwidth=1.5, causal=causal)
        assert (ours - exact).abs().max() <= 0.08
        assert (ours - softmax).abs().max() >= 0.1


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_definition(name: str, causal: bool) -> None:
    tensors, options = mapped(name, inputs(4, 5, 2, 1, 3, 2) | {"key_bias": torch.randn(2, 1, 5)})
    leaves = {n: x.requires_grad_() for n, x in cast(tensors, torch.float64).items()}

    def call(*values: Tensor) -> Tensor:
        named = dict(zip(leaves, values, strict=True))
        return kernels.linear_attention(**named, causal=causal, impl="reference", **options)

    assert torch.autograd.gradcheck(call, list(leaves.values()), fast_mode=True)


def test_the_last_rows_of_a_longer_causal_row() -> None:
    """As a cache of keys computes them."""
    tensors, options = mapped("favor", inputs(150, 150))
    whole = kernels.linear_attention(**tensors, causal=True, **options)
    tail = kernels.linear_attention(**tensors | {"q": tensors["q"][:, -3:]}, causal=True, **options)
    torch.testing.assert_close(tail, whole[:, -3:])


def test_strided_views() -> None:
    fused = torch.randn(2, 50, 8, 8)
    tensors = {"q": fused[:, ::2, :4], "k": fused[:, 1::2, 4:6], "v": fused[:, :25, 6:].flip(1)}
    for causal in (False, True):
        assert_variant(kernels.linear_attention, tensors, QKV, causal=causal, feature_map="elu")


def test_zero_sizes() -> None:
    for impl in ("reference", "torch"):
        for lengths in ((0, 5), (5, 0)):
            tensors = {n: x.requires_grad_() for n, x in inputs(*lengths).items()}
            for causal in (False, True):
                out = kernels.linear_attention(
                    **tensors, feature_map="elu", causal=causal, impl=impl
                )
                assert torch.equal(out, torch.zeros(2, lengths[0], 4, 12))
                grads = torch.autograd.grad(out.sum(), list(tensors.values()), allow_unused=True)
                assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "cosine"}, r"feature_map: got 'cosine'; accepted: 'favor', 'elu'"),
        ({"features": None}, r"features: got None; accepted: a tensor \(m, Dqk\)"),
        ({"features": torch.ones(5, 7)}, r"features: got shape \(5, 7\); .*Dqk = 8"),
        ({"features": torch.ones(0, 8)}, r"features: got shape \(0, 8\)"),
        ({"feature_map": "elu"}, r"features: got a value with feature_map='elu'"),
        ({"feature_map": "elu", "features": None, "scale": 1.0}, r"scale: got a value with"),
        ({"scale": -1.0}, r"scale: got -1.0; accepted: a finite number above 0"),
        ({"k": torch.ones(2, 9, 3, 8)}, r"k: got 3 heads|v: got shape"),
        ({"key_bias": torch.ones(2, 1, 8)}, r"key_bias: got shape \(2, 1, 8\)"),
        ({"impl": "cuda"}, r"impl='cuda' does not exist for linear_attention"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.linear_attention(**(inputs(9, 9) | {"features": torch.ones(5, 8)} | change))


@pytest.mark.parametrize("causal", [False, True])
def test_operators_are_registered_correctly(causal: bool) -> None:
    tensors, _ = mapped("favor", inputs(5, 7))
    dense = (*tensors.values(), torch.randn(2, 1, 7), None, None, "favor", causal, 0.6)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = (*(tensors[n][0, :5] for n in QKV), None, None, cu, None, "elu", causal, 0.6)
    for arguments in (dense, packed):
        torch.library.opcheck(linear_attention_torch._forward_op, arguments)
        out = linear_attention_torch._forward_op(*arguments)
        for wants in ((True, True), (False, False)):
            torch.library.opcheck(linear_attention_torch._backward_op, (out, *arguments, *wants))


@pytest.mark.parametrize("name", MAPS)
def test_compiles_as_one_graph_and_checkpoints(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors, options = mapped(name, inputs(9, 9))
    leaves = [x.requires_grad_() for x in tensors.values()]

    def fn(*values: Tensor) -> Tensor:
        named = dict(zip(tensors, values, strict=True))
        return kernels.linear_attention(**named, causal=True, **options).square().sum()

    def both(call: Callable[..., Tensor]) -> list[Tensor]:
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves)]

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected, rtol=1e-5, atol=1e-5)


def test_autocast_computes_on_bf16_inputs() -> None:
    tensors, options = mapped("favor", inputs(9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.linear_attention(**tensors, **options)
    assert out.dtype == torch.bfloat16
    low = {n: x if n == "features" else x.bfloat16() for n, x in tensors.items()}
    assert torch.equal(out, kernels.linear_attention(**low, **options))
