"""What the LLaMA-like families share: configuration fields and weight names."""

from __future__ import annotations

from typing import Any

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_registry import ConfigReader
from stackwise.model.bridge_rope import read_rope, write_rope
from stackwise.model.bridge_weights import Placement, one

BASE_PREFIX = "model."
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def ignored(_: dict[str, Any]) -> tuple[str, ...]:
    """Frequencies that early checkpoints carry as buffers."""
    return (r"rotary_emb\.inv_freq$",)


def read_llama_like(reader: ConfigReader, **fields: Any) -> ModelConfig:
    """A ModelConfig of the fields all LLaMA-like families spell alike, plus ``fields``."""
    activation = reader.accept("hidden_act", tuple(_GATED), "silu")
    width = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", fields.pop("n_kv_heads", heads))
    head_dim = fields.pop("head_dim", None) or reader.integer("head_dim", width // heads)
    theta, scaling = read_rope(reader)
    if heads % kv_heads:
        reader.refuse(
            "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})"
        )
    values: dict[str, Any] = {
        "architecture": "llama",
        "vocab_size": reader.integer("vocab_size"),
        "d_model": width,
        "n_layers": reader.integer("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "d_ff": reader.integer("intermediate_size"),
        "attention_type": "standard" if kv_heads == heads else "gqa",
        "attention_mode": "causal",
        "tie_embeddings": bool(reader.get("tie_word_embeddings", False)),
        "use_rope": True,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "norm": "rms_norm",
        "norm_eps": float(reader.get("rms_norm_eps", 1e-6)),
        "ffn": _GATED[activation],
        "qkv_bias": False,
        "out_bias": False,
        "ffn_bias": False,
        "init_std": float(reader.get("initializer_range", 0.02)),
    }
    return ModelConfig(**values | fields)


def write_llama_like(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` fields all LLaMA-like families spell alike."""
    return {
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "gelu" if config.ffn == "geglu" else "silu",
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        **write_rope(config),
    }


def width_faults(config: ModelConfig) -> list[str]:
    """Transformers' LLaMA and DeepSeek classes want whole heads in the width, even where
    ``head_dim`` is given."""
    if config.d_model % config.n_heads:
        return [f"d_model {config.d_model} is not a multiple of n_heads {config.n_heads}"]
    return []


def outer_placements(config: ModelConfig) -> list[Placement]:
    """Embeddings, final norm and head."""
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    placements = [
        one("model.embed_tokens.weight", "embeddings.token.weight", aliases=tied),
        one("model.norm.weight", "final_norm.weight"),
    ]
    if not config.tie_embeddings:
        placements.append(one("lm_head.weight", "head.weight"))
    return placements


def norm_placements(theirs: str, ours: str) -> list[Placement]:
    """The two norms of a layer."""
    return [
        one(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight"),
        one(f"{theirs}post_attention_layernorm.weight", f"{ours}feed_forward_norm.weight"),
    ]


def linear(theirs: str, ours: str, bias: bool) -> list[Placement]:
    """A linear layer's weight and, where there is one, its bias."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [one(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in kinds]


def mlp_placements(theirs: str, ours: str, bias: bool) -> list[Placement]:
    """A gated feed-forward."""
    placements = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        placements += linear(f"{theirs}{name}", f"{ours}{name}", bias)
    return placements


def llama_placements(config: ModelConfig) -> list[Placement]:
    """Every tensor of a LLaMA-like checkpoint, biases as the configuration has them."""
    placements = outer_placements(config)
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        placements += norm_placements(theirs, ours)
        for name in ("q_proj", "k_proj", "v_proj"):
            placements += linear(
                f"{theirs}self_attn.{name}", f"{ours}attention.{name}", bool(config.qkv_bias)
            )
        placements += linear(
            f"{theirs}self_attn.o_proj", f"{ours}attention.out_proj", bool(config.out_bias)
        )
        placements += mlp_placements(f"{theirs}mlp.", f"{ours}feed_forward.", bool(config.ffn_bias))
    return placements
