"""mla_attention: the latent form equals attention on expanded heads, dense and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from tests.kernels.compare import cast
from tests.kernels.test_attention import assert_variant

NAMES = ("q_nope", "q_rope", "kv_latent", "k_rope", "w_uk", "w_uv")


def inputs(lq: int = 23, lk: int = 23, lead: tuple[int, ...] = (2,)) -> dict[str, Tensor]:
    heads, dn, dr, dv, latent = 4, 12, 6, 10, 20
    return {
        "q_nope": torch.randn(*lead, lq, heads, dn),
        "q_rope": torch.randn(*lead, lq, heads, dr),
        "kv_latent": torch.randn(*lead, lk, latent),
        "k_rope": torch.randn(*lead, lk, dr),
        "w_uk": torch.randn(heads * dn, latent) / latent**0.5,
        "w_uv": torch.randn(heads * dv, latent) / latent**0.5,
    }


@pytest.mark.parametrize("lengths", [(23, 23), (1, 31), (31, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_backward(lengths: tuple[int, int], causal: bool) -> None:
    assert_variant(kernels.mla_attention, inputs(*lengths), NAMES, causal=causal)


def test_packed_documents() -> None:
    tensors = inputs(40, 40, ())
    cu = torch.tensor([0, 5, 5, 22, 40], dtype=torch.int32)
    for causal in (False, True):
        assert_variant(kernels.mla_attention, tensors, NAMES, causal=causal, cu_seqlens_q=cu)


def test_options_of_attention_pass_through() -> None:
    mask = torch.rand(2, 1, 23, 23) > 0.3
    assert_variant(kernels.mla_attention, inputs(), NAMES, mask=mask, scale=0.2)
    assert_variant(kernels.mla_attention, inputs(), NAMES, return_lse=True, softcap=2.0)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_equals_the_absorbed_form(impl: str) -> None:
    """q_nope·(W_uk c) = (W_ukᵀ q_nope)·c: the scores never need the expanded keys."""
    tensors = cast(inputs(), torch.float64)
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = tensors.values()
    heads = q_nope.shape[2]
    absorbed = torch.einsum("blhd,hdr->blhr", q_nope, w_uk.unflatten(0, (heads, -1)))
    scores = torch.einsum("blhr,bmr->bhlm", absorbed, latent)
    scores = scores + torch.einsum("blhd,bmd->bhlm", q_rope, k_rope)
    weights = torch.softmax(scores / (12 + 6) ** 0.5, dim=-1)
    mixed = torch.einsum("bhlm,bmr->blhr", weights, latent)
    expected = torch.einsum("blhr,hdr->blhd", mixed, w_uv.unflatten(0, (heads, -1)))
    torch.testing.assert_close(kernels.mla_attention(**tensors, impl=impl), expected)


def test_gradcheck_of_the_definition() -> None:
    small = cast(inputs(3, 4, (1,)), torch.float64)
    leaves = [x.requires_grad_() for x in small.values()]
    call = lambda *t: kernels.mla_attention(*t, causal=True, impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_autocast_computes_in_bf16() -> None:
    tensors = inputs()
    for impl in ("reference", "torch"):
        with torch.autocast("cpu", torch.bfloat16):
            out = kernels.mla_attention(**tensors, impl=impl)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(
            out.float(), kernels.mla_attention(**tensors, impl="reference"), rtol=0.05, atol=0.05
        )


def test_zero_sizes() -> None:
    for impl in ("reference", "torch"):
        tensors = {n: x.requires_grad_() for n, x in inputs(0, 5).items()}
        out = kernels.mla_attention(**tensors, impl=impl)
        assert out.shape == (2, 0, 4, 10)
        grads = torch.autograd.grad(out.sum(), list(tensors.values()))
        assert all(not g.any() for g in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rope": torch.ones(2, 22, 4, 6)}, r"q_rope: got shape"),
        ({"k_rope": torch.ones(2, 23, 5)}, r"k_rope: got shape \(2, 23, 5\)"),
        ({"kv_latent": torch.ones(3, 23, 20), "k_rope": torch.ones(3, 23, 6)}, r"kv_latent: .* 3"),
        ({"w_uk": torch.ones(47, 20)}, r"w_uk: got shape \(47, 20\)"),
        ({"w_uv": torch.ones(41, 20)}, r"w_uv: got 41 rows; accepted: a multiple of the 4 heads"),
        ({"w_uv": torch.ones(40, 19)}, r"w_uv: got shape \(40, 19\)"),
        ({"w_uv": torch.ones(40, 20).double()}, r"w_uv: got torch.float64"),
        ({"impl": "cuda"}, r"impl='cuda' does not exist for mla_attention"),
        ({"nonsense": 1}, r"nonsense: .*unknown option"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.mla_attention(**(inputs() | change))


def test_compiles_as_one_graph_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = [x.requires_grad_() for x in inputs().values()]

    def fn(*tensors: Tensor) -> Tensor:
        return kernels.mla_attention(*tensors, causal=True).square().sum()

    def both(call: Callable[..., Tensor]) -> list[Tensor]:
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves)]

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected, rtol=1e-5, atol=1e-5)
