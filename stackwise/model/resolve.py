"""From a configuration with nulls and a preset to the exact shape of a decoder."""

from __future__ import annotations

import copy
import math
from typing import Any

from stackwise.config import ConfigError, ModelConfig
from stackwise.config.kernel_pairs import pair_fault

# The published presets. Ranks and feature counts stay those of the configuration; "mlgka" is
# multi-latent, grouped, kernel attention with the Laplacian kernel, "full_featured" the same with
# the configured kernel.
ATTENTION_PRESETS: dict[str, dict[str, Any]] = {
    "gpt_style": {"attention_type": "standard", "attention_mode": "causal"},
    "bert_style": {"attention_type": "standard", "attention_mode": "bidirectional"},
    "efficient_gqa": {"attention_type": "gqa", "attention_mode": "bidirectional"},
    "kernel_attention": {
        "attention_type": "kernel",
        "attention_mode": "bidirectional",
        "kernel_form": "features",
        "kernel_low_rank": False,
    },
    "mla_attention": {
        "attention_type": "mla",
        "attention_mode": "bidirectional",
        "mla_form": "deepseek",
    },
    "full_featured": {
        "attention_type": "kernel",
        "attention_mode": "bidirectional",
        "kernel_form": "features",
        "kernel_low_rank": True,
    },
    "mlgka": {
        "attention_type": "kernel",
        "attention_mode": "bidirectional",
        "kernel_type": "laplacian",
        "kernel_form": "features",
        "kernel_low_rank": True,
    },
    "custom": {},
}
_GROUPED_PRESETS = ("efficient_gqa", "full_featured", "mlgka")
# Longest sequence of a model with rotary positions when nothing says otherwise (LLaMA's default);
# its tables grow beyond it on demand.
_DEFAULT_LENGTH = 2048


def resolve_model_config(
    config: ModelConfig, vocab_size: int | None = None, seq_len: int | None = None
) -> ModelConfig:
    """A copy of ``config`` without nulls in its shape fields and with its preset applied.

    ``vocab_size`` and ``seq_len`` stand in for fields left null: the tokenizer's size and
    ``training.seq_len``. Resolving twice changes nothing. ConfigError, listing every fault, when
    the fields contradict each other or a needed one is missing.
    """
    resolved = copy.deepcopy(config)
    grouped = _apply_preset(resolved)
    _fill_architecture(resolved)
    _fill_attention(resolved, grouped)
    _fill_sizes(resolved, vocab_size, seq_len)
    faults = _faults(resolved)
    if faults:
        raise ConfigError("the model section cannot be built:\n  " + "\n  ".join(faults))
    return resolved


def _apply_preset(config: ModelConfig) -> bool:
    """Applies and clears the preset; true when it groups the key/value heads."""
    preset = config.attention_preset
    if preset is None:
        return False
    if preset not in ATTENTION_PRESETS:
        raise ConfigError(
            f"model.attention_preset: got {preset!r}; accepted: {', '.join(ATTENTION_PRESETS)}"
        )
    for name, value in ATTENTION_PRESETS[preset].items():
        setattr(config, name, value)
    # Cleared, so that resolving again does not undo a later switch of the attention mode.
    config.attention_preset = None
    return preset in _GROUPED_PRESETS


def _fill_architecture(config: ModelConfig) -> None:
    gpt2 = config.architecture == "gpt2"
    latent_rope = config.attention_type == "mla" and config.mla_form == "deepseek"
    _fill(config, "norm", "layer_norm" if gpt2 else "rms_norm")
    _fill(config, "norm_eps", 1e-6 if config.norm == "rms_norm" else 1e-5)
    _fill(config, "ffn", "gelu" if gpt2 else "swiglu")
    _fill(config, "use_rope", not gpt2 or latent_rope)
    for name in ("qkv_bias", "out_bias", "ffn_bias"):
        _fill(config, name, gpt2)


def _fill_attention(config: ModelConfig, grouped: bool) -> None:
    heads = config.n_heads
    if config.n_kv_heads is None:
        grouped = grouped or config.attention_type == "gqa"
        config.n_kv_heads = _quarter(heads) if grouped and heads > 0 else heads
    if config.head_dim is None and heads > 0:
        if config.d_model % heads:
            raise ConfigError(
                f"model.n_heads: got {heads}; accepted: a divisor of model.d_model="
                f"{config.d_model} while model.head_dim is null"
            )
        config.head_dim = config.d_model // heads
    _fill(config, "mla_nope_dim", config.head_dim)
    _fill(config, "mla_v_dim", config.head_dim)


def _fill_sizes(config: ModelConfig, vocab_size: int | None, seq_len: int | None) -> None:
    _fill(config, "vocab_size", vocab_size)
    if config.d_ff is None:
        gated = config.ffn != "gelu"
        config.d_ff = 64 * math.ceil(8 * config.d_model / 3 / 64) if gated else 4 * config.d_model
    _fill(config, "max_position_embeddings", seq_len)
    if config.use_rope:
        _fill(config, "max_position_embeddings", _DEFAULT_LENGTH)
    source = config.tokenizer_embedding
    if source.family is not None and source.width is None:
        from stackwise.model.embedding_source import EmbeddingSource

        with EmbeddingSource(source.family, source.embedding_option) as matrix:
            source.width = matrix.width


def _fill(config: ModelConfig, name: str, value: Any) -> None:
    if getattr(config, name) is None:
        setattr(config, name, value)


def _quarter(heads: int) -> int:
    """The largest divisor of ``heads`` that is at most a quarter of it, and at least 1."""
    return max(k for k in range(1, max(1, heads // 4) + 1) if heads % k == 0)


def rope_dim(config: ModelConfig) -> int:
    """Rotated dimensions of a head (0 without rotary positions)."""
    if not config.use_rope:
        return 0
    if config.attention_type == "mla" and config.mla_form == "deepseek":
        return config.mla_rope_dim
    if config.attention_type == "mla":
        assert config.mla_nope_dim is not None
        return config.mla_nope_dim
    assert config.head_dim is not None
    return config.head_dim


def _faults(config: ModelConfig) -> list[str]:
    faults = []
    for name in ("vocab_size", "max_position_embeddings"):
        if getattr(config, name) is None:
            faults.append(f"model.{name} is null and nothing else gives it: set a number")
    positive = (
        "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff",
        "max_position_embeddings", "mla_kv_rank", "mla_q_rank", "mla_nope_dim", "mla_rope_dim",
        "mla_v_dim", "kernel_dim", "kernel_bandwidth", "sliding_window",
    )  # fmt: skip
    for name in positive:
        value = getattr(config, name)
        if value is not None and value <= 0:
            faults.append(f"model.{name}: got {value}; accepted: a number above 0")
    if faults:
        return faults
    return _attention_faults(config) + _moe_faults(config)


def _attention_faults(config: ModelConfig) -> list[str]:
    assert config.head_dim is not None
    assert config.n_kv_heads is not None
    faults = []
    if config.n_heads % config.n_kv_heads:
        faults.append(
            f"model.n_kv_heads: got {config.n_kv_heads}; accepted: a divisor of "
            f"model.n_heads={config.n_heads}"
        )
    if rope_dim(config) % 2:
        faults.append(
            f"rotary positions rotate pairs, got {rope_dim(config)} dimensions: give an even "
            "model.head_dim (model.mla_rope_dim for the deepseek form)"
        )
    if config.attention_type == "kernel":
        fault = pair_fault(config.kernel_form, config.kernel_type, config.kernel_distance)
        if fault is not None:
            faults.append(f"model.{fault}")
        if config.kernel_form == "linear" and config.sliding_window is not None:
            faults.append(
                f"model.sliding_window: got {config.sliding_window}; accepted: null for "
                "model.kernel_form 'linear', whose state holds every key"
            )
    latent = config.attention_type == "mla" and config.mla_form == "deepseek"
    if latent and not config.use_rope:
        faults.append(
            "model.use_rope: got false; accepted: true for model.mla_form 'deepseek', whose "
            "positions are rotary (low_rank works without)"
        )
    if latent and config.n_kv_heads != config.n_heads:
        faults.append(
            f"model.n_kv_heads: got {config.n_kv_heads}; accepted: model.n_heads="
            f"{config.n_heads} for model.mla_form 'deepseek', which shares its latent instead"
        )
    return faults


def _moe_faults(config: ModelConfig) -> list[str]:
    moe = config.moe
    if moe is None:
        return []
    faults = []
    if config.ffn != "swiglu":
        faults.append(f"model.moe: got model.ffn {config.ffn!r}; accepted: 'swiglu' experts")
    if moe.n_groups < 1 or moe.n_routed_experts % moe.n_groups:
        faults.append(
            f"model.moe.n_groups: got {moe.n_groups}; accepted: a divisor of "
            f"n_routed_experts={moe.n_routed_experts}"
        )
        return faults
    if not 1 <= moe.groups_per_token <= moe.n_groups:
        faults.append(
            f"model.moe.groups_per_token: got {moe.groups_per_token}; accepted: 1 to "
            f"n_groups={moe.n_groups}"
        )
    reachable = moe.groups_per_token * (moe.n_routed_experts // moe.n_groups)
    if not 1 <= moe.experts_per_token <= reachable:
        faults.append(
            f"model.moe.experts_per_token: got {moe.experts_per_token}; accepted: 1 to "
            f"{reachable}, the experts of {moe.groups_per_token} groups"
        )
    return faults
