"""Kernel attention of a decoder: every form against its formula, its bandwidth and its features."""

from __future__ import annotations

import math

import pytest
import torch

from stackwise import kernels
from stackwise.config import ConfigError, ModelConfig, StackWiseConfig
from stackwise.config.kernel_pairs import PAIRS
from stackwise.model.attention import Attention
from stackwise.model.kernel_forms import kernel_form, map_to_cosines
from stackwise.model.kv_cache import KVCache
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config
from stackwise.training.feature_redraw import redraw_features
from stackwise.training.stages import build_stages


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
    config = ModelConfig(attention_type="kernel", kernel_type=kernel_type, kernel_dim=4000)
    drawn = kernel_form(config).draw(8, seed=1)
    assert math.isclose(drawn.std(), spread, rel_tol=0.02)
    assert abs(drawn.mean()) < 0.02


@pytest.mark.parametrize("distance", ["euclidean", "l1"])
def test_the_distance_of_the_laplacian_chooses_its_spectrum(distance) -> None:
    config = ModelConfig(
        attention_type="kernel", kernel_type="laplacian", kernel_dim=1 << 15,
        kernel_distance=distance,
    )  # fmt: skip
    phases = kernel_form(config).draw(3, seed=2) @ torch.tensor([0.6, -0.3, 0.2])
    exact = 0.7 if distance == "euclidean" else 1.1
    assert abs(phases.cos().mean() - math.exp(-exact)) <= 5 / 2**7.5


# Form, kernel, and what else the pair needs.
NEW_FORMS = [
    ("exact", "gaussian", {}),
    ("exact", "laplacian", {}),
    ("linear", "gaussian", {}),
    ("linear", "linear", {"kernel_feature_map": "elu"}),
    ("linear", "linear", {"kernel_feature_map": "relu"}),
    ("linear", "linear", {"kernel_feature_map": "exp"}),
]


def weights_of(layer: Attention, q: torch.Tensor, k: torch.Tensor, sigma: torch.Tensor):
    """Unnormalised weights (B, H, L, L) of q, k (B, H, L, D) and sigma (H, 1, 1)."""
    form, kernel, name = layer.form.form, layer.form.kernel, layer.form.feature_map
    if form == "exact":
        distance = torch.cdist(q, k)
        return torch.exp(
            -distance.square() / (2 * sigma**2) if kernel == "gaussian" else -distance / sigma
        )
    if kernel == "linear":
        maps = {"elu": lambda x: torch.nn.functional.elu(x) + 1, "relu": torch.relu}
        phi_q, phi_k = (maps.get(name, torch.exp)(x) for x in (q, k))
    else:
        # exp(w.x - |x|^2) exp(w.y - |y|^2) has the mean exp(-|x - y|^2 / 2).
        phi_q, phi_k = (
            torch.exp(x / sigma @ layer.features.mT - (x / sigma).square().sum(-1, keepdim=True))
            for x in (q, k)
        )
    return phi_q @ phi_k.mT


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("form", "kernel", "fields"), NEW_FORMS, ids=str)
def test_exact_and_linear_forms_follow_their_formula(form, kernel, fields, causal, trainable):
    layer = attention(
        kernel_form=form, kernel_type=kernel, kernel_bandwidth=1.5,
        kernel_bandwidth_trainable=trainable and kernel != "linear", **fields,
    )  # fmt: skip
    sigma = torch.full((4, 1, 1), 1.5, dtype=torch.float64)
    if layer.log_bandwidth is not None:
        with torch.no_grad():
            layer.log_bandwidth.add_(torch.tensor([0.3, -0.2]))
        sigma = layer.log_bandwidth.exp().repeat_interleave(2).view(4, 1, 1)
    with torch.no_grad():
        layer.q_proj.bias.add_(0.3)
        layer.k_proj.bias.add_(0.3)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q = layer.q_proj(x).view(2, 9, 4, 6).transpose(1, 2)
    k, v = (
        proj(x).view(2, 9, 2, 6).transpose(1, 2).repeat_interleave(2, 1)
        for proj in (layer.k_proj, layer.v_proj)
    )
    weights = weights_of(layer, q, k, sigma)
    weights = weights.tril() if causal else weights
    weights = weights / weights.sum(-1, keepdim=True)
    expected = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    result = layer(x, Layout.dense(2, 9), causal=causal)
    assert (result - expected).abs().max() <= 1e-6
    if layer.log_bandwidth is not None:
        theirs, ours = (
            torch.autograd.grad(out.square().sum(), layer.log_bandwidth)[0]
            for out in (expected, result)
        )
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert theirs.abs().min() > 0


def test_a_trainable_bandwidth_scales_the_inputs_of_the_published_features() -> None:
    fixed = attention(kernel_bandwidth=1.5)
    layer = attention(kernel_bandwidth=1.5, kernel_bandwidth_trainable=True)
    assert layer.log_bandwidth.shape == (2,)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    outs = [part(x, Layout.dense(2, 9), causal=True) for part in (fixed, layer)]
    assert (outs[0] - outs[1]).abs().max() <= 1e-6
    (grad,) = torch.autograd.grad(outs[1].square().sum(), layer.log_bandwidth)
    assert grad.abs().min() > 0


@pytest.mark.parametrize(("form", "kernel", "fields"), NEW_FORMS, ids=str)
def test_documents_rows_and_padding_change_nothing_for_a_token(
    build_decoder, form, kernel, fields
) -> None:
    model = build_decoder("kernel", kernel_form=form, kernel_type=kernel, **fields)
    ids = torch.randint(0, 37, (1, 20))
    for mode in ("bidirectional", "causal"):
        model.set_attention_mode(mode)
        packed = model(ids, cu_seqlens=torch.tensor([0, 7, 20])).logits
        alone = model(ids[:, 7:]).logits
        assert (packed[:, 7:] - alone).abs().max() <= 2e-5
        padded = torch.cat([ids[:, 7:], torch.zeros(1, 4, dtype=torch.int64)], 1)
        mask = torch.arange(17)[None] < 13
        assert (model(padded, attention_mask=mask).logits[:, :13] - alone).abs().max() <= 2e-5
        rows = torch.tensor([1, 8, 19])
        some = model(ids, cu_seqlens=torch.tensor([0, 7, 20]), rows=rows).logits
        assert (some - packed[0, rows]).abs().max() <= 2e-5


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("form", "kernel", "fields"), NEW_FORMS, ids=str)
@torch.no_grad()
def test_a_cache_of_keys_continues_every_form(build_decoder, form, kernel, fields, trainable):
    model = build_decoder(
        "kernel", seq_len=40, kernel_form=form, kernel_type=kernel, attention_mode="causal",
        kernel_bandwidth_trainable=trainable, **fields,
    )  # fmt: skip
    ids = torch.randint(0, 37, (2, 30))
    cache, parts, start = KVCache(), [], 0
    for step in (20, 1, 1, 8):
        parts.append(model(ids[:, start : start + step], cache=cache).logits)
        start += step
    assert (torch.cat(parts, 1) - model(ids).logits).abs().max() <= 2e-5


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian"])
def test_every_parameter_of_a_trainable_bandwidth_gets_a_gradient(build_decoder, kernel) -> None:
    for form in (f for f in PAIRS if kernel in PAIRS[f]):
        model = build_decoder(
            "mlgka", attention_preset=None, attention_type="kernel", kernel_low_rank=True,
            kernel_form=form, kernel_type=kernel, kernel_bandwidth_trainable=True,
        )  # fmt: skip
        model(torch.randint(0, 37, (2, 20))).logits.square().sum().backward()
        assert model.blocks[0].attention.log_bandwidth.grad.abs().min() > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(torch.randint(0, 37, (2, 20))).logits.isfinite().all()


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


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "uniform", "linear"])
@pytest.mark.parametrize("form", ["features", "exact", "linear"])
def test_pairs_without_a_meaning_are_refused(form, kernel) -> None:
    if kernel in PAIRS[form]:
        assert attention(kernel_form=form, kernel_type=kernel).form.form == form
        return
    message = f"kernel_form: got '{form}', which the {kernel} kernel has not; accepted: features"
    with pytest.raises(ConfigError, match=message):
        attention(kernel_form=form, kernel_type=kernel)
    config = ModelConfig(attention_type="kernel", kernel_form=form, kernel_type=kernel)
    with pytest.raises(ValueError, match=message):
        kernel_form(config)


def test_other_settings_without_a_meaning_are_refused() -> None:
    with pytest.raises(ConfigError, match="kernel_distance: got 'l1' with kernel_form: exact"):
        attention(kernel_form="exact", kernel_type="laplacian", kernel_distance="l1")
    with pytest.raises(ConfigError, match="sliding_window: got 3; accepted: null"):
        attention(kernel_form="linear", sliding_window=3)
    windowed = attention(kernel_form="exact", sliding_window=3)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 0] += 1
    outs = [windowed(t, Layout.dense(1, 9), causal=True) for t in (x, changed)]
    assert torch.equal(outs[0][:, 3:], outs[1][:, 3:])


def test_features_are_redrawn_in_the_blocks_that_train(build_decoder) -> None:
    fields = {"kernel_redraw_steps": 10, "kernel_form": "linear"}
    model, again = (build_decoder("kernel", **fields) for _ in range(2))
    config = StackWiseConfig()
    config.model = model.config
    config.training.mode, config.training.max_steps = "layerwise", 40
    stage = build_stages(config, 1)[1]
    assert stage.trainable == range(1, 2) or list(stage.trainable) == [1]

    def features() -> list[torch.Tensor]:
        return [block.attention.features.clone() for block in model.blocks]

    first = features()
    for step in (0, 5, 11):
        redraw_features(config, model, stage, step)
        assert all(map(torch.equal, features(), first))
    redraw_features(config, model, stage, 10)
    second = features()
    assert torch.equal(second[0], first[0])
    assert not torch.equal(second[1], first[1])
    gram = second[1][:8] @ second[1][:8].mT
    assert (gram - gram.diagonal().diag()).abs().max() <= 1e-4 * gram.diagonal().max()
    redraw_features(config, model, stage, 20)
    assert not torch.equal(features()[1], second[1])
    # A run that continues from a checkpoint draws what the first one drew.
    redraw_features(config, again, stage, 10)
    assert torch.equal(again.blocks[1].attention.features, second[1])
    config.run.seed += 1
    redraw_features(config, again, stage, 10)
    assert not torch.equal(again.blocks[1].attention.features, second[1])


def test_forms_without_features_have_nothing_to_redraw() -> None:
    for fields in ({"kernel_form": "exact"}, {"kernel_type": "linear"}):
        layer = attention(**fields)
        layer.redraw_features(1)
        assert layer.features is None


def test_phases_keep_float32_under_autocast() -> None:
    layer = attention().float()
    x = (20 * torch.randn(3, 6)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = map_to_cosines(x, layer.features)
    assert (mapped - torch.cos(x.float() @ layer.features.mT)).abs().max() <= 1e-4


def test_the_linear_form_approaches_the_exact_one() -> None:
    """The same weights: many positive features of the gaussian kernel, and the kernel itself."""
    shared = {"kernel_bandwidth": 2.0, "kernel_type": "gaussian"}
    exact = attention(kernel_form="exact", **shared)
    linear = attention(kernel_form="linear", kernel_dim=1 << 14, **shared)
    linear.load_state_dict(exact.state_dict(), strict=False)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    outs = [layer(x, Layout.dense(2, 9), causal=False) for layer in (exact, linear)]
    assert (outs[0] - outs[1]).abs().max() <= 0.02 * outs[0].abs().max()
    assert kernels.available()["linear_attention"]["torch"] == "ready"
