"""The flash kernel under scaled_dot_product_attention: registry, and the calls it answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stackwise.kernels import available
from stackwise.patching import register_sdpa, sdpa

registry = pytest.importorskip("torch.nn.attention._registry")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("lq", "lk", "causal"), [(37, 37, True), (37, 37, False), (5, 19, False)])
def test_kernels_answer_as_sdpa(heads: int, kv_heads: int, lq: int, lk: int, causal: bool) -> None:
    """The two functions that are registered, called with the arguments of PyTorch's autograd."""
    shapes = ((2, heads, lq, 16), (2, kv_heads, lk, 16), (2, kv_heads, lk, 16))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3, enable_gqa=True)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, inputs, upstream)
    plain = [x.detach() for x in inputs]
    with torch.no_grad():
        result = sdpa.forward_kernel("torch")(*plain, 0.0, causal, False, scale=0.3)
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, debug = result
        ours = sdpa.backward_kernel("torch")(
            upstream, *plain, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset,
            scale=0.3,
        )  # fmt: skip
    assert (out - expected).abs().max() <= 1e-12
    scores = inputs[0] @ inputs[1].repeat_interleave(heads // kv_heads, 1).mT * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(lq, lk).triu(1).bool(), -torch.inf)
    assert (lse - scores.logsumexp(-1)).abs().max() <= 1e-12
    assert (max_q, max_k, debug.numel()) == (lq, lk, 0)
    for mine, truth in zip(ours, grads, strict=True):
        assert mine.shape == truth.shape
        assert (mine - truth).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p: got 0.1"),
        ({"is_causal": True}, "is_causal: got 3 queries and 4 keys"),
        ({"return_debug_mask": True}, "return_debug_mask: got True"),
    ],
)
def test_calls_that_raise(options: dict[str, Any], message: str) -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match=message):
        sdpa.forward_kernel("torch")(q, k, k, **options)


def test_registration_and_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_IMPLS", dict(registry._FLASH_ATTENTION_IMPLS))
    with pytest.raises(ValueError, match="impl: got 'torch'; accepted: 'triton', 'cuda'"):
        register_sdpa("torch")
    for impl in ("triton", "cuda"):
        register_sdpa(impl)
        assert "stackwise" in torch.nn.attention.list_flash_attention_impls()
        assert torch.nn.attention.current_flash_attention_impl() is None
        if impl not in available()["attention"]:
            with pytest.raises(ValueError, match=f"{impl!r}, which does not exist for attention"):
                torch.nn.attention.activate_flash_attention_impl("stackwise")
            continue
        torch.nn.attention.activate_flash_attention_impl("stackwise")
        try:
            assert torch.nn.attention.current_flash_attention_impl() == "stackwise"
            q = torch.randn(1, 2, 8, 16)
            before = F.scaled_dot_product_attention(q, q, q)
        finally:
            torch.nn.attention.restore_flash_attention_impl()
        assert torch.equal(before, F.scaled_dot_product_attention(q, q, q))
        assert torch.nn.attention.current_flash_attention_impl() is None


def test_an_older_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"PyTorch 2\.13"):
        register_sdpa()


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_on_a_gpu(causal: bool) -> None:
    if "triton" not in available()["attention"]:
        pytest.skip("no Triton variant of attention")
    q, k, v = (
        torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    exact = F.scaled_dot_product_attention(
        *(x.detach().double().cpu().requires_grad_() for x in (q, k, v)), is_causal=causal
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        grads = torch.autograd.grad(plain.sum(), (q, k, v))
        register_sdpa()
        torch.nn.attention.activate_flash_attention_impl("stackwise")
        try:
            ours = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            mine = torch.autograd.grad(ours.sum(), (q, k, v))
        finally:
            torch.nn.attention.restore_flash_attention_impl()
    bound = 2 * (plain.double().cpu() - exact).abs().max() + 1e-3
    assert (ours.double().cpu() - exact).abs().max() <= bound
    for ours_part, theirs in zip(mine, grads, strict=True):
        assert (ours_part - theirs).abs().max() <= 0.05 * theirs.abs().max() + 1e-2
