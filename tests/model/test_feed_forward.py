"""Feed-forward layers and norms against their formulas; routing against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stackwise.config import MoEConfig
from stackwise.model.feed_forward import GegluFFN, GeluFFN, SwiGLUFFN
from stackwise.model.moe import MoEFeedForward
from stackwise.model.norms import StackwiseLayerNorm, StackwiseRMSNorm

X = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "activation"), [(SwiGLUFFN, F.silu), (GegluFFN, F.gelu)], ids=["swiglu", "geglu"]
)
def test_gated_layers_activate_the_gate(layer, activation, bias) -> None:
    ffn = layer(16, 24, bias=bias).double()
    expected = ffn.down_proj(activation(ffn.gate_proj(X)) * ffn.up_proj(X))
    assert (ffn(X) - expected).abs().max() <= 1e-14
    assert (ffn.gate_proj.bias is not None) == bias


@pytest.mark.parametrize("bias", [True, False])
def test_plain_layer_is_tanh_gelu(bias) -> None:
    ffn = GeluFFN(16, 24, bias=bias).double()
    expected = ffn.down_proj(F.gelu(ffn.up_proj(X), approximate="tanh"))
    assert (ffn(X) - expected).abs().max() <= 1e-14


def test_frozen_up_projection_still_passes_gradients_to_its_input() -> None:
    frozen, free = SwiGLUFFN(16, 24, freeze_up_proj=True), SwiGLUFFN(16, 24)
    free.load_state_dict(frozen.state_dict())
    inputs = [X.float().requires_grad_() for _ in range(2)]
    for ffn, x in zip((frozen, free), inputs, strict=True):
        ffn(x).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert frozen.up_proj.weight.grad is None
    assert torch.equal(frozen.gate_proj.weight.grad, free.gate_proj.weight.grad)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(StackwiseRMSNorm, torch.nn.RMSNorm), (StackwiseLayerNorm, torch.nn.LayerNorm)],
)
@pytest.mark.parametrize("affine", [True, False])
def test_norms_equal_their_torch_parents(ours, theirs, residual, affine) -> None:
    mine, other = (
        kind(16, eps=1e-3, elementwise_affine=affine).double() for kind in (ours, theirs)
    )
    if affine:
        torch.nn.init.normal_(mine.weight)
    other.load_state_dict(mine.state_dict(), strict=True)
    add = torch.randn_like(X)
    if residual:
        normed, summed = mine(X, add)
        assert torch.equal(summed, X + add)
        assert (normed - other(X + add)).abs().max() <= 1e-13
    else:
        assert (mine(X) - other(X)).abs().max() <= 1e-13


def test_norms_of_several_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"normalized_shape: got \(4, 4\)"):
        StackwiseRMSNorm((4, 4))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_experts_are_the_weighted_sum_of_the_best(scoring) -> None:
    torch.manual_seed(0)
    config = MoEConfig(n_routed_experts=6, experts_per_token=2, d_ff=8, scoring=scoring)
    moe = MoEFeedForward(16, config).double()
    torch.nn.init.normal_(moe.router.weight)
    x = X.flatten(0, 1)
    logits = x @ moe.router.weight.T
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    expected = torch.stack([moe.shared_experts(row) for row in x])
    for token, row in enumerate(x):
        best = scores[token].topk(2)
        for weight, expert in zip(best.values, best.indices, strict=True):
            expected[token] += weight / best.values.sum() * moe.experts[expert](row)
    assert (moe(X).flatten(0, 1) - expected).abs().max() <= 1e-13


def test_correction_bias_changes_the_choice_but_not_the_weights() -> None:
    torch.manual_seed(0)
    config = MoEConfig(n_routed_experts=6, experts_per_token=2, d_ff=8, normalize_weights=False)
    moe = MoEFeedForward(16, config).double()
    moe.router.correction_bias[4] = 10.0
    weights, chosen = moe.router(X.flatten(0, 1))
    assert (chosen == 4).any(-1).all()
    scores = (X.flatten(0, 1) @ moe.router.weight.T).sigmoid()
    assert (weights - scores.gather(-1, chosen)).abs().max() <= 1e-15


def test_groups_limit_the_choice() -> None:
    torch.manual_seed(0)
    config = MoEConfig(n_routed_experts=8, experts_per_token=2, d_ff=8, n_groups=4)
    router = MoEFeedForward(16, config).router.double()
    torch.nn.init.normal_(router.weight)
    _, chosen = router(torch.randn(50, 16, dtype=torch.float64))
    assert torch.equal(chosen[:, 0] // 2, chosen[:, 1] // 2)


def test_router_decides_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    moe = MoEFeedForward(16, MoEConfig(n_routed_experts=6, experts_per_token=2, d_ff=8))
    torch.nn.init.normal_(moe.router.weight)
    x = torch.randn(40, 16).bfloat16().float()
    weights, chosen = moe.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_weights, cast_chosen = moe.router(x.bfloat16())
    assert torch.equal(chosen, cast_chosen)
    assert torch.equal(weights, cast_weights)
