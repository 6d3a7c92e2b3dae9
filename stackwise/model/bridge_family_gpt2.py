"""GPT-2 checkpoints (``GPT2LMHeadModel``).

Transformers keeps three dropout rates; ours is one, on the embeddings and both residual branches,
and takes ``resid_pdrop``. Attention weights have no dropout here, so ``attn_pdrop`` is dropped.
"""

from __future__ import annotations

from typing import Any

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_registry import ConfigReader, Family, register
from stackwise.model.bridge_weights import Placement, one

# Three names of 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _read(reader: ConfigReader) -> ModelConfig:
    reader.accept("activation_function", _TANH_GELU, "gelu_new")
    reader.accept("scale_attn_weights", (True,), True)
    reader.accept("scale_attn_by_inverse_layer_idx", (False,), False)
    reader.accept("add_cross_attention", (False,), False)
    width, heads = reader.integer("n_embd", 768), reader.integer("n_head", 12)
    if width % heads:
        reader.refuse("n_embd", width, f"a multiple of n_head ({heads})")
    return ModelConfig(
        architecture="gpt2",
        vocab_size=reader.integer("vocab_size", 50257),
        d_model=width,
        n_layers=reader.integer("n_layer", 12),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=reader.integer("n_inner", 4 * width),
        attention_type="standard",
        attention_mode="causal",
        dropout=float(reader.get("resid_pdrop", 0.1)),
        tie_embeddings=bool(reader.get("tie_word_embeddings", True)),
        use_rope=False,
        max_position_embeddings=reader.integer("n_positions", 1024),
        norm="layer_norm",
        norm_eps=float(reader.get("layer_norm_epsilon", 1e-5)),
        ffn="gelu",
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        init_std=float(reader.get("initializer_range", 0.02)),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": config.dropout,
        "initializer_range": config.init_std,
        "layer_norm_epsilon": config.norm_eps,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_layer": config.n_layers,
        "n_positions": config.max_position_embeddings,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }


def _placements(config: ModelConfig) -> list[Placement]:
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    placements = [
        one("transformer.wte.weight", "embeddings.token.weight", aliases=tied),
        one("transformer.wpe.weight", "embeddings.position.weight"),
        one("transformer.ln_f.weight", "final_norm.weight"),
        one("transformer.ln_f.bias", "final_norm.bias"),
    ]
    for layer in range(config.n_layers):
        placements += _layer_placements(f"transformer.h.{layer}.", f"blocks.{layer}.")
    if not config.tie_embeddings:
        placements.append(one("lm_head.weight", "head.weight"))
    return placements


def _layer_placements(theirs: str, ours: str) -> list[Placement]:
    placements = []
    for kind in ("weight", "bias"):
        transposed = kind == "weight"  # Conv1D stores (in, out)
        qkv = tuple(f"{ours}attention.{name}_proj.{kind}" for name in "qkv")
        placements += [
            one(f"{theirs}ln_1.{kind}", f"{ours}attention_norm.{kind}"),
            Placement(f"{theirs}attn.c_attn.{kind}", qkv, transposed),
            one(
                f"{theirs}attn.c_proj.{kind}",
                f"{ours}attention.out_proj.{kind}",
                transposed=transposed,
            ),
            one(f"{theirs}ln_2.{kind}", f"{ours}feed_forward_norm.{kind}"),
            one(
                f"{theirs}mlp.c_fc.{kind}",
                f"{ours}feed_forward.up_proj.{kind}",
                transposed=transposed,
            ),
            one(
                f"{theirs}mlp.c_proj.{kind}",
                f"{ours}feed_forward.down_proj.{kind}",
                transposed=transposed,
            ),
        ]
    return placements


register(
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        describes="GPT-2",
        base_prefix="transformer.",
        read=_read,
        write=_write,
        placements=_placements,
        # Causal masks that early checkpoints carry as buffers.
        ignored=lambda _: (r"(^|\.)attn\.(bias|masked_bias)$",),
    )
)
