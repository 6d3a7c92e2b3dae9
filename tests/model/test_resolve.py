"""A configuration with nulls and presets becomes the exact shape of a decoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stackwise.config import ConfigError, ModelConfig, MoEConfig, TokenizerEmbeddingConfig
from stackwise.model.attention import Attention, LowRankAttention
from stackwise.model.decoder import Decoder
from stackwise.model.mla import LatentAttention
from stackwise.model.resolve import ATTENTION_PRESETS, resolve_model_config


def resolve(**fields: object) -> ModelConfig:
    config = ModelConfig(**({"vocab_size": 100} | fields))  # type: ignore[arg-type]
    return resolve_model_config(config, seq_len=64)


def test_llama_conventions_fill_the_nulls() -> None:
    config = resolve(d_model=256, n_heads=4)
    expected = {
        "n_kv_heads": 4, "head_dim": 64, "d_ff": 704, "use_rope": True, "norm": "rms_norm",
        "norm_eps": 1e-6, "ffn": "swiglu", "qkv_bias": False, "out_bias": False, "ffn_bias": False,
        "max_position_embeddings": 64,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_gpt2_conventions_fill_the_nulls() -> None:
    config = resolve(architecture="gpt2", d_model=256, n_heads=4)
    expected = {
        "d_ff": 1024, "use_rope": False, "norm": "layer_norm", "norm_eps": 1e-5, "ffn": "gelu",
        "qkv_bias": True, "out_bias": True, "ffn_bias": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_explicit_fields_stay_and_the_input_is_untouched() -> None:
    config = ModelConfig(architecture="gpt2", norm="rms_norm", ffn="geglu", use_rope=True)
    before = dataclasses.asdict(config)
    resolved = resolve_model_config(config, vocab_size=9, seq_len=8)
    assert dataclasses.asdict(config) == before
    assert (resolved.norm, resolved.ffn, resolved.use_rope) == ("rms_norm", "geglu", True)
    assert resolved.norm_eps == 1e-6
    assert resolved.vocab_size == 9


@pytest.mark.parametrize("preset", [*ATTENTION_PRESETS, None])
def test_resolving_twice_changes_nothing(preset) -> None:
    once = resolve(attention_preset=preset, n_heads=8)
    assert resolve_model_config(once, vocab_size=5, seq_len=3) == once


# preset: (attention class, mode, key/value heads of 8, kernel of the random features)
PRESETS = {
    "gpt_style": (Attention, "causal", 8, None),
    "bert_style": (Attention, "bidirectional", 8, None),
    "efficient_gqa": (Attention, "bidirectional", 2, None),
    "kernel_attention": (Attention, "bidirectional", 8, "uniform"),
    "mla_attention": (LatentAttention, "bidirectional", 8, None),
    "full_featured": (LowRankAttention, "bidirectional", 2, "uniform"),
    "mlgka": (LowRankAttention, "bidirectional", 2, "laplacian"),
    "custom": (Attention, "causal", 8, None),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_by_name(preset) -> None:
    kind, mode, kv_heads, kernel = PRESETS[preset]
    config = resolve(
        attention_preset=preset,
        attention_mode="causal",
        d_model=64,
        n_layers=1,
        n_heads=8,
        mla_kv_rank=16,
        mla_rope_dim=8,
        kernel_type="uniform",
        kernel_dim=12,
    )
    model = Decoder(config)
    attention = model.blocks[0].attention
    assert type(attention) is kind
    assert model.attention_mode == mode
    assert config.n_kv_heads == kv_heads
    features = getattr(attention, "features", None)
    assert (features is not None) == (kernel is not None)
    if kernel is not None:
        assert config.kernel_type == kernel
        assert features.shape == (12, 8)
    assert model(torch.randint(0, 100, (1, 5))).logits.shape == (1, 5, 100)


def test_every_published_preset_is_there() -> None:
    assert set(PRESETS) == set(ATTENTION_PRESETS)


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 3), (6, 1), (10, 2), (14, 2), (1, 1)])
def test_grouped_heads_are_a_quarter_or_the_next_divisor(heads, kv_heads) -> None:
    assert resolve(attention_type="gqa", d_model=840, n_heads=heads).n_kv_heads == kv_heads


def test_latent_attention_turns_rotary_positions_on_for_gpt2() -> None:
    config = resolve(architecture="gpt2", attention_type="mla")
    assert config.use_rope is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": None}, "vocab_size is null"),
        ({"d_model": 100, "n_heads": 3}, r"n_heads: got 3; accepted: a divisor of .*=100"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads: got 3"),
        ({"d_model": 36, "n_heads": 4}, "rotary positions rotate pairs, got 9"),
        (
            {"attention_type": "kernel", "kernel_form": "exact", "kernel_type": "uniform"},
            "kernel_form: got 'exact', which the uniform kernel has not; accepted: features",
        ),
        (
            {"attention_type": "kernel", "kernel_form": "linear", "sliding_window": 8},
            "sliding_window: got 8; accepted: null for model.kernel_form 'linear'",
        ),
        ({"attention_type": "mla", "use_rope": False}, "use_rope: got false"),
        ({"attention_type": "mla", "n_kv_heads": 2}, "n_kv_heads: got 2"),
        ({"d_model": -8, "head_dim": 4, "d_ff": 4}, "d_model: got -8"),
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"attention_preset": "bert"}, "attention_preset: got 'bert'; accepted: gpt_style"),
        ({"moe": MoEConfig(), "ffn": "gelu"}, "model.ffn 'gelu'"),
        ({"moe": MoEConfig(n_groups=3)}, "n_groups: got 3"),
        ({"moe": MoEConfig(n_groups=4, groups_per_token=5)}, "groups_per_token: got 5"),
        ({"moe": MoEConfig(n_groups=4, experts_per_token=3)}, "experts_per_token: got 3"),
    ],
)
def test_contradictions_are_refused(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**fields)


def test_learned_positions_need_a_length() -> None:
    config = ModelConfig(architecture="gpt2", vocab_size=10)
    with pytest.raises(ConfigError, match="max_position_embeddings is null"):
        resolve_model_config(config)


def test_unresolved_configuration_is_refused_by_the_decoder() -> None:
    with pytest.raises(ConfigError, match=r"not resolved .*n_kv_heads.*resolve_model_config"):
        Decoder(ModelConfig(vocab_size=10))
    with pytest.raises(ConfigError, match=r"not resolved .attention_preset"):
        Decoder(dataclasses.replace(resolve(), attention_preset="gpt_style"))


def test_tying_across_an_adapter_is_refused() -> None:
    source = TokenizerEmbeddingConfig(family="anything", width=48)
    config = resolve(tie_embeddings=True, tokenizer_embedding=source)
    with pytest.raises(ConfigError, match="tie_embeddings: got true with embeddings of width 48"):
        Decoder(config, initialize=False)
