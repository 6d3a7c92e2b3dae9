"""Kernel attention is softmax(phi(q) . phi(k) / sqrt(m)) v with phi(x) = cos(W x / bandwidth)."""

from __future__ import annotations

import math

import pytest
import torch

from stackwise.config import ConfigError, ModelConfig
from stackwise.model.attention import Attention, draw_features
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config


def attention(**fields: object) -> Attention:
    torch.manual_seed(0)
    defaults = {
        "architecture": "gpt2", "vocab_size": 5, "d_model": 24, "n_heads": 4, "n_kv_heads": 2,
        "attention_type": "kernel", "kernel_dim": 10,
    }  # fmt: skip
    config = ModelConfig(**(defaults | fields))  # type: ignore[arg-type]
    return Attention(resolve_model_config(config, seq_len=16), 0).double()


def formula(layer: Attention, x: torch.Tensor, phi, scale: float, causal: bool) -> torch.Tensor:
    q = layer.q_proj(x).view(*x.shape[:2], 4, 6).transpose(1, 2)
    k = layer.k_proj(x).view(*x.shape[:2], 2, 6).transpose(1, 2).repeat_interleave(2, 1)
    v = layer.v_proj(x).view(*x.shape[:2], 2, 6).transpose(1, 2).repeat_interleave(2, 1)
    scores = phi(q) @ phi(k).mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return layer.out_proj(out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel_type", ["gaussian", "laplacian", "uniform"])
def test_features_follow_the_formula(kernel_type, causal) -> None:
    layer = attention(kernel_type=kernel_type)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    assert layer.features.shape == (10, 6)
    expected = formula(layer, x, lambda y: torch.cos(y @ layer.features.mT), 10**-0.5, causal)
    result = layer(x, Layout.dense(2, 9), causal=causal)
    assert (result - expected).abs().max() <= 1e-12


def test_linear_kernel_is_the_plain_dot_product() -> None:
    layer = attention(kernel_type="linear")
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    assert layer.features is None
    expected = formula(layer, x, lambda y: y, 6**-0.5, False)
    assert (layer(x, Layout.dense(2, 9), causal=False) - expected).abs().max() <= 1e-12


def test_bandwidth_divides_the_frequencies() -> None:
    narrow = attention(kernel_bandwidth=1.0).features
    wide = attention(kernel_bandwidth=4.0).features
    assert torch.allclose(narrow, 4.0 * wide)


@pytest.mark.parametrize(("kernel_type", "spread"), [("gaussian", 1.0), ("uniform", 3**-0.5)])
def test_frequencies_come_from_the_published_distribution(kernel_type, spread) -> None:
    torch.manual_seed(1)
    config = ModelConfig(attention_type="kernel", kernel_type=kernel_type, kernel_dim=4000)
    drawn = draw_features(config, 8)
    assert math.isclose(drawn.std(), spread, rel_tol=0.02)
    assert abs(drawn.mean()) < 0.02


def test_features_are_fixed_saved_and_different_per_layer(build_decoder) -> None:
    model, again = build_decoder("kernel"), build_decoder("kernel")
    names = [f"blocks.{layer}.attention.features" for layer in range(2)]
    state = model.state_dict()
    assert all(torch.equal(state[name], again.state_dict()[name]) for name in names)
    assert not torch.equal(state[names[0]], state[names[1]])
    assert not set(names) & {name for name, _ in model.named_parameters()}
    torch.manual_seed(5)
    other = type(model)(model.config)
    other.load_state_dict(state)
    ids = torch.randint(0, 37, (1, 8))
    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("form", ["exact", "linear"])
def test_forms_without_an_operation_are_refused(form) -> None:
    with pytest.raises(ConfigError, match=f"kernel_form: got '{form}'"):
        attention(kernel_form=form)
    config = ModelConfig(attention_type="kernel", kernel_form=form)
    with pytest.raises(ValueError, match=f"kernel_form: got '{form}'; accepted: 'features'"):
        draw_features(config, 8)


def test_phases_keep_float32_under_autocast() -> None:
    layer = attention().float()
    x = (20 * torch.randn(3, 6)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = layer._map(x, layer.features)
    assert (mapped - torch.cos(x.float() @ layer.features.mT)).abs().max() <= 1e-4
