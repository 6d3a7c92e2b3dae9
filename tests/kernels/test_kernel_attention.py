"""Exact kernel attention against its definition and against closed forms, dense and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import kernel_attention_torch
from stackwise.kernels.kernel_attention import normalized_gaussian
from tests.kernels import compare
from tests.kernels.compare import cast

QKV = ("q", "k", "v")
ALL = (*QKV, "bandwidth")
FORMS = [("gaussian", True), ("gaussian", False), ("laplacian", True), ("laplacian", False)]


def assert_variant(*args: Any, **options: Any) -> None:
    """The sums of a tile are ordered otherwise than the definition's: a factor of two."""
    compare.assert_variant(*args, slack=2.0, floor=2e-6, **options)


def inputs(
    lq: int, lk: int, heads: int = 4, kv_heads: int = 2, width: int = 8, v_width: int = 12
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, lq, heads, width),
        "k": torch.randn(2, lk, kv_heads, width),
        "v": torch.randn(2, lk, kv_heads, v_width),
        "bandwidth": 1 + torch.rand(heads),
    }


@pytest.fixture(params=[1 << 20, 600])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile for everything, and tiles of single heads and a few rows."""
    monkeypatch.setattr(kernel_attention_torch, "_TILE", request.param)
    monkeypatch.setattr(kernel_attention_torch, "_CAUSAL_ROWS", 128 if request.param > 600 else 16)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (50, 77), (77, 50)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_backward(form: tuple[str, bool], lengths: tuple[int, int], causal: bool) -> None:
    assert_variant(
        kernels.kernel_attention, inputs(*lengths), ALL,
        kernel=form[0], normalize=form[1], causal=causal,
    )  # fmt: skip


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bias_mask_and_window(form: tuple[str, bool]) -> None:
    options: dict[str, Any] = {"kernel": form[0], "normalize": form[1]}
    bias = torch.randn(2, 1, 37)
    bias[0, :, 30:] = -torch.inf
    tensors = inputs(29, 37) | {"key_bias": bias}
    assert_variant(kernels.kernel_attention, tensors, ALL, causal=True, **options)
    tensors["key_bias"] = torch.randn(2, 2, 37)
    assert_variant(kernels.kernel_attention, tensors, (*ALL, "key_bias"), window=(5, 2), **options)
    mask = torch.rand(2, 4, 29, 37) > 0.5
    mask[0, :, 5:9] = False
    assert_variant(kernels.kernel_attention, tensors, ALL, mask=mask, window=(-1, 3), **options)
    assert_variant(kernels.kernel_attention, tensors, ALL, mask=mask[:, :1], **options)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("per", ["query head", "key head", "number"])
def test_grouped_heads_and_their_bandwidths(heads: tuple[int, int], per: str) -> None:
    tensors = inputs(33, 33, *heads)
    bandwidth = tensors.pop("bandwidth")
    if per == "number":
        options: dict[str, Any] = {"bandwidth": 1.7}
        for kernel in ("gaussian", "laplacian"):
            assert_variant(kernels.kernel_attention, tensors, QKV, kernel=kernel, **options)
        return
    tensors["bandwidth"] = bandwidth if per == "query head" else bandwidth[: heads[1]]
    for kernel in ("gaussian", "laplacian"):
        assert_variant(kernels.kernel_attention, tensors, ALL, kernel=kernel, causal=True)


CU = [0, 5, 5, 22, 23, 60]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, 2)}], ids=str)
def test_packed_documents(form: tuple[str, bool], options: dict[str, Any]) -> None:
    tensors = inputs(60, 60)
    tensors = {n: x if n == "bandwidth" else x[0] for n, x in tensors.items()}
    tensors["key_bias"] = torch.randn(2, 60)
    cu = torch.tensor(CU, dtype=torch.int32)
    options = options | {"kernel": form[0], "normalize": form[1], "cu_seqlens_q": cu}
    assert_variant(kernels.kernel_attention, tensors, (*ALL, "key_bias"), **options)
    fewer = tensors | {"q": tensors["q"][:21]}
    few = torch.tensor([0, 2, 2, 19, 20, 21], dtype=torch.int32)
    options |= {"cu_seqlens_q": few, "cu_seqlens_k": cu}
    assert_variant(kernels.kernel_attention, fewer, ALL, **options)


def test_work_follows_the_documents_and_not_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = []
    original = kernel_attention_torch._tiles

    def counted(*args: Any) -> Any:
        for tile in original(*args):
            tiles.append(tile.shape[0] * tile.shape[3] * (tile.keys.stop - tile.keys.start))
            yield tile

    monkeypatch.setattr(kernel_attention_torch, "_tiles", counted)
    q, k, v = (torch.randn(1024, 1, 8) for _ in range(3))
    cu = torch.arange(0, 1025, 64, dtype=torch.int32)
    kernels.kernel_attention(q, k, v, cu_seqlens_q=cu)
    assert sum(tiles) == 16 * 64**2
    tiles.clear()
    kernels.kernel_attention(q[None], k[None], v[None], causal=True)
    assert sum(tiles) < 0.6 * 1024**2


def plain(x: dict[str, Tensor], kernel: str, normalize: bool) -> Tensor:
    """From the distances themselves, one query head and one key head."""
    distance = (x["q"][:, :, None, 0] - x["k"][:, None, :, 0]).norm(dim=-1)
    width = x["bandwidth"][0]
    exponent = -(distance**2) / (2 * width**2) if kernel == "gaussian" else -distance / width
    weights = exponent.exp()
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights @ x["v"][:, :, 0])[:, :, None]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equals_the_formula_on_distances(form: tuple[str, bool], impl: str) -> None:
    tensors = cast(inputs(19, 23, 1, 1), torch.float64)
    expected = plain(tensors, *form)
    ours = kernels.kernel_attention(**tensors, kernel=form[0], normalize=form[1], impl=impl)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck_of_the_definition(form: tuple[str, bool]) -> None:
    small = cast(inputs(3, 4, 2, 1, 3, 2) | {"key_bias": torch.randn(2, 1, 4)}, torch.float64)
    leaves = {name: x.requires_grad_() for name, x in small.items()}

    def call(*tensors: Tensor) -> Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        return kernels.kernel_attention(
            **named, kernel=form[0], normalize=form[1], causal=True, impl="reference"
        )

    assert torch.autograd.gradcheck(call, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_query_on_its_key_has_weight_one_and_a_finite_gradient(
    form: tuple[str, bool], dtype: torch.dtype, impl: str
) -> None:
    """|q|² + |k|² - 2 q·k is not exactly 0 there; its root would be a distance of 1e-3."""
    q = torch.randn(1, 9, 1, 64, dtype=dtype).mul(3).requires_grad_()
    eye = torch.eye(9, dtype=dtype).view(1, 9, 1, 9)
    options: dict[str, Any] = {"kernel": form[0], "bandwidth": 0.1, "normalize": form[1]}
    out = kernels.kernel_attention(q, q.detach(), eye, impl=impl, **options)
    # The other keys are some 30 away: their weights are exp(-300) at most.
    # A gaussian keeps the rounding of |q|² + |k|², some 1e4 units, over 2σ² = 0.02.
    rounding = 0.0 if form[0] == "laplacian" else 5e5 * torch.finfo(dtype).eps
    tolerance = 1e-12 + rounding
    assert (out[0, :, 0] - torch.eye(9, dtype=dtype)).abs().max() <= tolerance
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    assert grad.isfinite().all()
    if form[0] == "laplacian":
        assert grad.abs().max() <= 1e-12


def test_half_precision_inputs_lose_only_the_rounding_of_the_result() -> None:
    """Distances are not rounded to bf16, of which a laplacian would take the root."""
    for kernel, normalize in FORMS:
        tensors = inputs(50, 50, width=64)
        low = {n: x if n == "bandwidth" else x.bfloat16() for n, x in tensors.items()}
        exact = kernels.kernel_attention(
            **cast(low, torch.float64), kernel=kernel, normalize=normalize, impl="reference"
        )
        ours = kernels.kernel_attention(**low, kernel=kernel, normalize=normalize)
        assert (ours.double() - exact).abs().max() <= exact.abs().max() / 256


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per", ["query head", "key head", "number"])
def test_the_normalised_gaussian_is_attention_with_a_key_bias(per: str, causal: bool) -> None:
    """The path of the variants that have only ``attention``, here with its definition."""
    tensors = cast(inputs(21, 30), torch.float64) | {"key_bias": torch.randn(2, 2, 30).double()}
    if per != "query head":
        tensors["bandwidth"] = tensors["bandwidth"][:2]
    names = (*QKV, "key_bias")
    options: dict[str, Any] = {"causal": causal}
    if per == "number":
        del tensors["bandwidth"]
        options["bandwidth"] = 1.3
    else:
        names = (*names, "bandwidth")
    ours = compare.run(normalized_gaussian, tensors, names, impl="reference", **options)
    exact = compare.run(kernels.kernel_attention, tensors, names, impl="reference", **options)
    compare.assert_close("float64", ours, exact, exact, relative=1e-11)
    packed = {n: x[0] if x.dim() > 1 else x for n, x in tensors.items()}
    options["cu_seqlens_q"] = torch.tensor([0, 4, 21], dtype=torch.int32)
    options["cu_seqlens_k"] = torch.tensor([0, 9, 30], dtype=torch.int32)
    ours = compare.run(normalized_gaussian, packed, names, impl="reference", **options)
    exact = compare.run(kernels.kernel_attention, packed, names, impl="reference", **options)
    compare.assert_close("float64", ours, exact, exact, relative=1e-11)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hidden_rows_give_zero_and_no_gradient(form: tuple[str, bool], impl: str) -> None:
    tensors = {n: x.requires_grad_() for n, x in inputs(9, 4).items()}
    out = kernels.kernel_attention(
        **tensors, kernel=form[0], normalize=form[1], causal=True, impl=impl
    )
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert torch.equal(grads[0][:, :5], torch.zeros_like(grads[0][:, :5]))
    assert all(g.isfinite().all() for g in grads)


def test_strided_views() -> None:
    fused = torch.randn(2, 50, 8, 8)
    tensors = {"q": fused[:, ::2, :4], "k": fused[:, 1::2, 4:6], "v": fused[:, :25, 6:].flip(1)}
    for kernel, normalize in FORMS:
        assert_variant(kernels.kernel_attention, tensors, QKV, kernel=kernel, normalize=normalize)


def test_zero_sizes() -> None:
    for impl in ("reference", "torch"):
        for lengths in ((0, 5), (5, 0)):
            tensors = {n: x.requires_grad_() for n, x in inputs(*lengths).items()}
            out = kernels.kernel_attention(**tensors, impl=impl)
            assert torch.equal(out, torch.zeros(2, lengths[0], 4, 12))
            grads = torch.autograd.grad(out.sum(), list(tensors.values()), allow_unused=True)
            assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "cubic"}, r"kernel: got 'cubic'; accepted: 'gaussian', 'laplacian'"),
        ({"bandwidth": 0.0}, r"bandwidth: got 0.0; accepted: a finite number above 0"),
        ({"bandwidth": torch.ones(3)}, r"bandwidth: got 3 values; accepted: one per head of q \(4"),
        ({"bandwidth": torch.ones(4).long()}, r"bandwidth: got int64"),
        ({"k": torch.ones(2, 9, 3, 8)}, r"k: got 3 heads|v: got shape"),
        ({"q": torch.ones(2, 9, 4, 7)}, r"k: got shape"),
        ({"window": (1, -2)}, r"window: got \(1, -2\)"),
        ({"key_bias": torch.ones(2, 1, 8)}, r"key_bias: got shape \(2, 1, 8\)"),
        ({"impl": "cuda"}, r"impl='cuda' does not exist for kernel_attention"),
        ({"impl": "triton", "kernel": "laplacian"}, r"only the normalised gaussian"),
        ({"impl": "triton", "normalize": False}, r"only the normalised gaussian"),
        ({"impl": "triton"}, r"kernel_attention: (a tensor is on cpu|Triton cannot)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.kernel_attention(**(inputs(9, 9) | change))


def test_operators_are_registered_correctly() -> None:
    x = inputs(5, 7)
    bias, mask = torch.randn(2, 1, 7), torch.rand(2, 1, 5, 7) > 0.2
    rule = (True, True, -1, 0)
    arguments = (*x.values(), bias, mask, None, None, *rule)
    out = kernel_attention_torch._forward_op(*arguments)
    torch.library.opcheck(kernel_attention_torch._forward_op, arguments)
    torch.library.opcheck(kernel_attention_torch._backward_op, (out, *arguments, True, True))
    torch.library.opcheck(kernel_attention_torch._backward_op, (out, *arguments, False, False))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = (*(t[0][:5] for t in (x["q"], x["k"], x["v"])), x["bandwidth"])
    arguments = (*packed, bias[0, :, :5], None, cu, None, *rule)
    torch.library.opcheck(kernel_attention_torch._forward_op, arguments)
    out = kernel_attention_torch._forward_op(*arguments)
    torch.library.opcheck(kernel_attention_torch._backward_op, (out, *arguments, True, True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_compiles_as_one_graph_and_checkpoints(form: tuple[str, bool]) -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = [x.requires_grad_() for x in inputs(9, 9).values()]

    def fn(q: Tensor, k: Tensor, v: Tensor, bandwidth: Tensor) -> Tensor:
        options: dict[str, Any] = {"kernel": form[0], "normalize": form[1], "causal": True}
        return kernels.kernel_attention(q, k, v, bandwidth=bandwidth, **options).square().sum()

    def both(call: Callable[..., Tensor]) -> list[Tensor]:
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves)]

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected, rtol=1e-5, atol=1e-5)


def test_autocast_computes_on_bf16_inputs() -> None:
    tensors = inputs(9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.kernel_attention(**tensors)
    assert out.dtype == torch.bfloat16
    low = {n: x if n == "bandwidth" else x.bfloat16() for n, x in tensors.items()}
    assert torch.equal(out, kernels.kernel_attention(**low))
