"""LLaMA checkpoints (``LlamaForCausalLM``): LLaMA 1 to 3, SmolLM2, TinyLlama and relatives."""

from __future__ import annotations

from typing import Any

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_llama_layout import (
    BASE_PREFIX,
    ignored,
    llama_placements,
    read_llama_like,
    width_faults,
    write_llama_like,
)
from stackwise.model.bridge_registry import ConfigReader, Family, register


def _read(reader: ConfigReader) -> ModelConfig:
    bias = bool(reader.get("attention_bias", False))
    mlp_bias = bool(reader.get("mlp_bias", False))
    return read_llama_like(reader, qkv_bias=bias, out_bias=bias, ffn_bias=mlp_bias)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_llama_like(config),
        "attention_bias": bool(config.qkv_bias),
        "mlp_bias": bool(config.ffn_bias),
    }


register(
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        describes="LLaMA, SmolLM2, TinyLlama",
        base_prefix=BASE_PREFIX,
        read=_read,
        write=_write,
        placements=llama_placements,
        ignored=ignored,
        faults=width_faults,
    )
)
