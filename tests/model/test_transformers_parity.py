"""One block, attention layer or expert layer against Transformers' own, weights copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stackwise.config import ModelConfig, MoEConfig
from stackwise.model.block import Block
from stackwise.model.layout import Layout
from stackwise.model.mla import LatentAttention
from stackwise.model.moe import MoEFeedForward
from stackwise.model.resolve import resolve_model_config
from stackwise.model.rotary import RotaryTables

TOLERANCE = 1e-5


def scatter_weights(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def load(ours: nn.Module, named: dict[str, torch.Tensor]) -> None:
    ours.load_state_dict(named, strict=True)


def causal_mask(length: int) -> torch.Tensor:
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=["default", "linear", "llama3", "yarn"],
)
def test_llama_block_equals_transformers(kv_heads: int, scaling: dict | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    parameters = {"rope_theta": 5000.0, **(scaling or {"rope_type": "default"})}
    theirs_config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        vocab_size=10,
        max_position_embeddings=64,
        rope_parameters=parameters,
        attn_implementation="eager",
    )
    theirs = LlamaDecoderLayer(theirs_config, 0).eval()
    scatter_weights(theirs)
    config = resolve_model_config(
        ModelConfig(
            vocab_size=10,
            d_model=32,
            d_ff=40,
            n_heads=4,
            n_kv_heads=kv_heads,
            rope_theta=5000.0,
            rope_scaling=scaling,
            max_position_embeddings=64,
        )
    )
    ours = Block(config)
    renamed = {"self_attn": "attention", "o_proj": "out_proj", "mlp": "feed_forward"}
    renamed |= {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
    }
    load(
        ours,
        {
            ".".join(renamed.get(part, part) for part in name.split(".")): value
            for name, value in theirs.state_dict().items()
        },
    )
    x = torch.randn(2, 20, 32)
    layout = Layout.dense(2, 20)
    cos_sin = LlamaRotaryEmbedding(theirs_config)(x, torch.arange(20)[None])
    expected = theirs(x, attention_mask=causal_mask(20), position_embeddings=cos_sin)
    expected = expected[0] if isinstance(expected, tuple) else expected
    result = ours(x, layout, causal=True, rope=RotaryTables(config)(layout, x.dtype))
    assert (result - expected).abs().max() <= TOLERANCE


def test_gpt2_block_equals_transformers() -> None:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    theirs = GPT2Block(
        GPT2Config(n_embd=32, n_head=4, n_inner=56, attn_implementation="eager"), 0
    ).eval()
    scatter_weights(theirs)
    config = resolve_model_config(
        ModelConfig(architecture="gpt2", vocab_size=10, d_model=32, d_ff=56, n_heads=4, n_layers=1),
        seq_len=32,
    )
    state = theirs.state_dict()
    named = {}
    for kind in ("weight", "bias"):
        joint = state[f"attn.c_attn.{kind}"]
        for name, part in zip("qkv", joint.split(32, dim=-1), strict=True):
            named[f"attention.{name}_proj.{kind}"] = part.T if kind == "weight" else part
        for mine, other in (
            ("attention.out_proj", "attn.c_proj"),
            ("feed_forward.up_proj", "mlp.c_fc"),
            ("feed_forward.down_proj", "mlp.c_proj"),
        ):
            value = state[f"{other}.{kind}"]
            named[f"{mine}.{kind}"] = value.T if kind == "weight" else value
        named[f"attention_norm.{kind}"] = state[f"ln_1.{kind}"]
        named[f"feed_forward_norm.{kind}"] = state[f"ln_2.{kind}"]
    ours = Block(config)
    load(ours, named)
    x = torch.randn(2, 20, 32)
    expected = theirs(x, attention_mask=causal_mask(20))
    expected = expected[0] if isinstance(expected, tuple) else expected
    result = ours(x, Layout.dense(2, 20), causal=True)
    assert (result - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("q_rank", [None, 24])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    ],
    ids=["default", "yarn-mscale"],
)
def test_latent_attention_equals_deepseek_v3(
    q_rank: int | None, interleaved: bool, scaling: dict | None
) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    theirs_config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank,
        kv_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=6,
        v_head_dim=10,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})},
        rope_interleave=interleaved,
        attention_bias=True,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(theirs_config, 0).eval()
    scatter_weights(theirs)
    config = resolve_model_config(
        ModelConfig(
            vocab_size=10,
            d_model=32,
            n_heads=4,
            attention_type="mla",
            mla_q_rank=q_rank,
            mla_kv_rank=12,
            mla_rope_dim=8,
            mla_nope_dim=6,
            mla_v_dim=10,
            qkv_bias=True,
            out_bias=True,
            rope_interleaved=interleaved,
            rope_scaling=scaling,
            max_position_embeddings=64,
        )
    )
    names = {
        "q_a_proj": "q_down_proj",
        "q_a_layernorm": "q_norm",
        "q_b_proj": "q_up_proj",
        "kv_a_proj_with_mqa": "kv_down_proj",
        "kv_a_layernorm": "kv_norm",
        "o_proj": "out_proj",
    }
    named = {}
    for name, value in theirs.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if module == "kv_b_proj":
            keys, values = value.unflatten(0, (4, 16)).split([6, 10], dim=1)
            named["k_up_proj.weight"] = keys.flatten(0, 1)
            named["v_up_proj.weight"] = values.flatten(0, 1)
        else:
            named[f"{names.get(module, module)}.{kind}"] = value
    ours = LatentAttention(config, 0)
    load(ours, named)
    x = torch.randn(2, 20, 32)
    layout = Layout.dense(2, 20)
    cos_sin = DeepseekV3RotaryEmbedding(theirs_config)(x, torch.arange(20)[None])
    expected, _ = theirs(x, position_embeddings=cos_sin, attention_mask=causal_mask(20))
    result = ours(x, layout, causal=True, rope=RotaryTables(config)(layout, x.dtype))
    assert (result - expected).abs().max() <= TOLERANCE


def copy_experts(ours: MoEFeedForward, theirs: nn.Module) -> None:
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.weight)
        for index, expert in enumerate(ours.experts):
            gate, up = theirs.experts.gate_up_proj[index].chunk(2)
            expert.gate_proj.weight.copy_(gate)
            expert.up_proj.weight.copy_(up)
            expert.down_proj.weight.copy_(theirs.experts.down_proj[index])
        assert ours.shared_experts is not None
        ours.shared_experts.load_state_dict(theirs.shared_experts.state_dict())


@pytest.mark.parametrize(("groups", "used"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_experts_equal_deepseek_v3(groups: int, used: int, normalize: bool) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=16,
            moe_intermediate_size=12,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=groups,
            topk_group=used,
            norm_topk_prob=normalize,
            routed_scaling_factor=2.5,
            experts_implementation="eager",
        )
    ).eval()
    scatter_weights(theirs)
    # Large enough to change which experts are chosen, which the weights must not show.
    theirs.gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    ours = MoEFeedForward(
        16,
        MoEConfig(
            n_routed_experts=8,
            n_shared_experts=2,
            experts_per_token=3,
            d_ff=12,
            scoring="sigmoid",
            n_groups=groups,
            groups_per_token=used,
            normalize_weights=normalize,
            routed_scaling=2.5,
        ),
    )
    copy_experts(ours, theirs)
    ours.router.correction_bias.copy_(theirs.gate.e_score_correction_bias)
    x = torch.randn(2, 11, 16)
    assert (ours(x) - theirs(x)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("groups", "used"), [(1, 1), (4, 2)])
def test_experts_equal_deepseek_v2(groups: int, used: int) -> None:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    theirs = DeepseekV2Moe(
        DeepseekV2Config(
            num_attention_heads=4,
            hidden_size=16,
            moe_intermediate_size=12,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=3,
            n_group=groups,
            topk_group=used,
            topk_method="greedy" if groups == 1 else "group_limited_greedy",
            routed_scaling_factor=1.5,
            experts_implementation="eager",
        )
    ).eval()
    scatter_weights(theirs)
    ours = MoEFeedForward(
        16,
        MoEConfig(
            n_routed_experts=8,
            experts_per_token=3,
            d_ff=12,
            scoring="softmax",
            n_groups=groups,
            groups_per_token=used,
            normalize_weights=False,
            routed_scaling=1.5,
        ),
    )
    copy_experts(ours, theirs)
    x = torch.randn(2, 11, 16)
    assert (ours(x) - theirs(x)).abs().max() <= TOLERANCE
