"""DeepSeek-V2 and V3 checkpoints: multi-head latent attention, dense or mixture-of-experts.

The two differ in their router (softmax, or sigmoid with a bias that balances the load), in V3's
choice of rotary layout, and in the biases that only V2's dense feed-forward can have. Models
without experts are V3 checkpoints whose every layer is dense.
"""

from __future__ import annotations

from typing import Any

from stackwise.config.schema import ModelConfig, MoEConfig
from stackwise.model.bridge_llama_layout import (
    BASE_PREFIX,
    ignored,
    linear,
    mlp_placements,
    norm_placements,
    outer_placements,
    read_llama_like,
    width_faults,
    write_llama_like,
)
from stackwise.model.bridge_registry import ConfigReader, Family, register
from stackwise.model.bridge_weights import Placement, one

_V2, _V3 = "deepseek_v2", "deepseek_v3"
_SCORING = {_V2: "softmax", _V3: "sigmoid"}
_GROUPED = "group_limited_greedy"


def _read(reader: ConfigReader) -> ModelConfig:
    v2 = reader.model_type == _V2
    heads = reader.get("num_attention_heads")
    if reader.get("num_key_value_heads") not in (None, heads):
        reader.refuse("num_key_value_heads", reader.get("num_key_value_heads"), str(heads))
    bias = bool(reader.get("attention_bias", False))
    nope = reader.integer("qk_nope_head_dim", 128)
    config = read_llama_like(
        reader,
        head_dim=nope,
        attention_type="mla",
        mla_form="deepseek",
        mla_q_rank=_read_q_rank(reader),
        mla_kv_rank=reader.integer("kv_lora_rank", 512),
        mla_nope_dim=nope,
        mla_rope_dim=reader.integer("qk_rope_head_dim", 64),
        mla_v_dim=reader.integer("v_head_dim", 128),
        rope_interleaved=v2 or bool(reader.get("rope_interleave", True)),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=v2 and bool(reader.get("mlp_bias", False)),
        moe=_read_moe(reader),
    )
    if config.moe is not None and config.ffn_bias:
        reader.refuse("mlp_bias", True, "false in models with experts")
    return config


def _read_q_rank(reader: ConfigReader) -> int | None:
    if "q_lora_rank" in reader.values and reader.get("q_lora_rank") is None:
        return None
    return reader.integer("q_lora_rank", 1536)


def _read_moe(reader: ConfigReader) -> MoEConfig | None:
    v2 = reader.model_type == _V2
    dense = reader.get("first_k_dense_replace", 0 if v2 else 3) or 0
    if dense >= reader.integer("num_hidden_layers"):
        return None
    reader.accept("moe_layer_freq", (1,), 1)
    reader.accept("scoring_func", (_SCORING[reader.model_type],), _SCORING[reader.model_type])
    grouped = True
    if v2:
        # Transformers ignores this field of V2, DeepSeek's own code does not.
        reader.accept("norm_topk_prob", (False, None), False)
        grouped = reader.accept("topk_method", ("greedy", _GROUPED), "greedy") == _GROUPED
    defaults = {"groups": None, "kept": None} if v2 else {"groups": 8, "kept": 4}
    return MoEConfig(
        n_routed_experts=reader.integer("n_routed_experts", 64 if v2 else 256),
        n_shared_experts=reader.integer("n_shared_experts", 2 if v2 else 1),
        experts_per_token=reader.integer("num_experts_per_tok", None if v2 else 8),
        d_ff=reader.integer("moe_intermediate_size", 1407 if v2 else 2048),
        first_dense_layers=dense,
        scoring="softmax" if v2 else "sigmoid",
        n_groups=reader.integer("n_group", defaults["groups"]) if grouped else 1,
        groups_per_token=reader.integer("topk_group", defaults["kept"]) if grouped else 1,
        normalize_weights=not v2 and bool(reader.get("norm_topk_prob", True)),
        routed_scaling=float(reader.get("routed_scaling_factor", 1.0 if v2 else 2.5)),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    fields = write_llama_like(config)
    del fields["head_dim"]  # these classes derive it
    return {
        **fields,
        "num_key_value_heads": config.n_heads,
        "attention_bias": bool(config.qkv_bias),
        "kv_lora_rank": config.mla_kv_rank,
        "q_lora_rank": config.mla_q_rank,
        "qk_nope_head_dim": config.mla_nope_dim,
        "qk_rope_head_dim": config.mla_rope_dim,
        "v_head_dim": config.mla_v_dim,
        **_write_moe(config),
    }


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        # The classes build experts from these numbers only in layers that are not dense.
        return {"first_k_dense_replace": config.n_layers}
    return {
        "first_k_dense_replace": moe.first_dense_layers,
        "moe_intermediate_size": moe.d_ff,
        "n_group": moe.n_groups,
        "n_routed_experts": moe.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "norm_topk_prob": moe.normalize_weights,
        "num_experts_per_tok": moe.experts_per_token,
        "routed_scaling_factor": moe.routed_scaling,
        "topk_group": moe.groups_per_token,
    }


def _write_v2(config: ModelConfig) -> dict[str, Any]:
    grouped = config.moe is not None and config.moe.n_groups > 1
    return {
        **_write(config),
        "mlp_bias": bool(config.ffn_bias),
        "topk_method": _GROUPED if grouped else "greedy",
    }


def _write_v3(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write(config),
        "num_nextn_predict_layers": 0,
        "rope_interleave": config.rope_interleaved,
    }


def _faults_v3(config: ModelConfig) -> list[str]:
    moe = config.moe
    faults = width_faults(config)
    if moe is not None and moe.n_routed_experts < 2 * moe.n_groups:
        faults.append("its router wants at least two experts in a group")
    return faults


def _placements(config: ModelConfig) -> list[Placement]:
    placements = outer_placements(config)
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        placements += norm_placements(theirs, ours)
        placements += _attention_placements(config, f"{theirs}self_attn.", f"{ours}attention.")
        if config.moe is not None and layer >= config.moe.first_dense_layers:
            placements += _moe_placements(config.moe, f"{theirs}mlp.", f"{ours}feed_forward.")
        else:
            placements += mlp_placements(
                f"{theirs}mlp.", f"{ours}feed_forward.", bool(config.ffn_bias)
            )
    return placements


def _attention_placements(config: ModelConfig, theirs: str, ours: str) -> list[Placement]:
    bias = bool(config.qkv_bias)
    if config.mla_q_rank is None:
        queries = linear(f"{theirs}q_proj", f"{ours}q_proj", False)
    else:
        queries = linear(f"{theirs}q_a_proj", f"{ours}q_down_proj", bias)
        queries += linear(f"{theirs}q_a_layernorm", f"{ours}q_norm", False)
        queries += linear(f"{theirs}q_b_proj", f"{ours}q_up_proj", False)
    return [
        *queries,
        *linear(f"{theirs}kv_a_proj_with_mqa", f"{ours}kv_down_proj", bias),
        *linear(f"{theirs}kv_a_layernorm", f"{ours}kv_norm", False),
        Placement(
            f"{theirs}kv_b_proj.weight",
            (f"{ours}k_up_proj.weight", f"{ours}v_up_proj.weight"),
            groups=config.n_heads,
        ),
        *linear(f"{theirs}o_proj", f"{ours}out_proj", bool(config.out_bias)),
    ]


def _moe_placements(moe: MoEConfig, theirs: str, ours: str) -> list[Placement]:
    placements = [one(f"{theirs}gate.weight", f"{ours}router.weight")]
    if moe.scoring == "sigmoid":
        placements.append(
            one(f"{theirs}gate.e_score_correction_bias", f"{ours}router.correction_bias")
        )
    for expert in range(moe.n_routed_experts):
        placements += mlp_placements(
            f"{theirs}experts.{expert}.", f"{ours}experts.{expert}.", False
        )
    if moe.n_shared_experts:
        placements += mlp_placements(f"{theirs}shared_experts.", f"{ours}shared_experts.", False)
    return placements


def _ignored_v3(values: dict[str, Any]) -> tuple[str, ...]:
    """Also the multi-token-prediction modules, stored as layers behind the last."""
    first, count = values.get("num_hidden_layers", 0), values.get("num_nextn_predict_layers") or 0
    modules = [rf"^model\.layers\.{first + extra}\." for extra in range(count)]
    return (*ignored(values), *modules)


# V3 first: of two classes that fit a model without experts, saving takes the first.
register(
    Family(
        model_type=_V3,
        architecture="DeepseekV3ForCausalLM",
        describes="DeepSeek-V3, R1",
        base_prefix=BASE_PREFIX,
        read=_read,
        write=_write_v3,
        placements=_placements,
        ignored=_ignored_v3,
        faults=_faults_v3,
    )
)
register(
    Family(
        model_type=_V2,
        architecture="DeepseekV2ForCausalLM",
        describes="DeepSeek-V2",
        base_prefix=BASE_PREFIX,
        read=_read,
        write=_write_v2,
        placements=_placements,
        ignored=ignored,
        faults=width_faults,
    )
)
