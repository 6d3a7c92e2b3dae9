"""Mistral checkpoints (``MistralForCausalLM``): LLaMA with a sliding window.

``sliding_window: W`` lets a position see W tokens, itself included, as ours does.
"""

from __future__ import annotations

from typing import Any

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_llama_layout import (
    BASE_PREFIX,
    ignored,
    llama_placements,
    read_llama_like,
    write_llama_like,
)
from stackwise.model.bridge_registry import ConfigReader, Family, register

_DEFAULT_WINDOW = 4096


def _read(reader: ConfigReader) -> ModelConfig:
    window = reader.get("sliding_window", _DEFAULT_WINDOW)
    layer_types = reader.get("layer_types")
    if layer_types and len(set(layer_types)) > 1:
        reader.refuse("layer_types", layer_types, "one kind of attention in all layers")
    # The class's default is 8 key/value heads, unlike its relatives'.
    return read_llama_like(reader, sliding_window=window, n_kv_heads=8)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_llama_like(config), "sliding_window": config.sliding_window}


register(
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        describes="Mistral",
        base_prefix=BASE_PREFIX,
        read=_read,
        write=_write,
        placements=llama_placements,
        ignored=ignored,
    )
)
