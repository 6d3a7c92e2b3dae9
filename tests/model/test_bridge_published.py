"""Published configurations: each gives a decoder of exactly the published number of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from stackwise.model.bridge_translate import read_description
from stackwise.model.decoder import Decoder

# The shape fields of the config.json files as published (the spelling of Transformers 4).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (
        {
            "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
            "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "layer_norm_epsilon": 1e-5, "vocab_size": 50257, "attn_pdrop": 0.1,
        },
        124_439_808,
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 576,
            "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000,
            "rope_scaling": None, "rope_interleaved": False, "tie_word_embeddings": True,
            "vocab_size": 49152, "max_position_embeddings": 8192,
        },
        134_515_008,
    ),
    "TinyLlama-1.1B": (
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 5632, "num_attention_heads": 32, "num_hidden_layers": 22,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "vocab_size": 32000, "max_position_embeddings": 2048,
        },
        1_100_048_384,
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "hidden_act": "silu", "head_dim": 64, "hidden_size": 2048,
            "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": True, "vocab_size": 128256, "max_position_embeddings": 131072,
        },
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
            "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False,
            "tie_word_embeddings": True, "vocab_size": 151936, "max_position_embeddings": 32768,
        },
        494_032_768,
    ),
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2", "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 10944, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
            "norm_topk_prob": False, "scoring_func": "softmax", "routed_scaling_factor": 1.0,
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
                "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
            },
            "vocab_size": 102400, "tie_word_embeddings": False,
            "max_position_embeddings": 163840,
        },
        15_706_484_224,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_published_number_of_parameters(name: str) -> None:
    values, parameters = PUBLISHED[name]
    description = read_description(values)
    # Frequencies are numbers, not parameters, and cannot be computed without a device.
    config = dataclasses.replace(description.config, rope_scaling=None)
    with torch.device("meta"):
        model = Decoder(config, initialize=False)
    assert model.num_parameters == parameters
    tensors = set(model.state_dict())
    placements = description.family.placements(config)
    placed = [part for placement in placements for part in placement.parts]
    assert len(placed) == len(set(placed))
    untied = tensors - ({"head.weight"} if config.tie_embeddings else set())
    assert set(placed) == untied


def test_published_settings_reach_the_config() -> None:
    def config(name: str) -> Any:
        return read_description(PUBLISHED[name][0]).config

    assert config("SmolLM2-135M").rope_theta == 100_000.0
    assert config("Mistral-7B-v0.1").sliding_window == 4096
    assert config("Qwen2.5-0.5B").sliding_window is None
    llama = config("Llama-3.2-1B")
    assert (llama.rope_scaling["rope_type"], llama.rope_scaling["factor"]) == ("llama3", 32.0)
    lite = config("DeepSeek-V2-Lite")
    assert lite.rope_scaling["mscale_all_dim"] == 0.707
    assert (lite.moe.scoring, lite.moe.normalize_weights) == ("softmax", False)


def test_quantised_release_of_deepseek_v3_is_refused_with_the_reason() -> None:
    values = PUBLISHED["DeepSeek-V2-Lite"][0] | {
        "model_type": "deepseek_v3",
        "scoring_func": "sigmoid",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    with pytest.raises(ValueError, match="quantization_config is 'fp8'; supported: weights in a"):
        read_description(values)
