"""Qwen2 and Qwen2.5 checkpoints (``Qwen2ForCausalLM``): LLaMA with biases on q, k and v.

A window in every layer or in none is supported; Qwen2's windows in the upper layers only
(``max_window_layers`` below the number of layers) are refused.
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

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _read(reader: ConfigReader) -> ModelConfig:
    return read_llama_like(reader, qkv_bias=True, sliding_window=_read_window(reader))


def _read_window(reader: ConfigReader) -> int | None:
    if not reader.get("use_sliding_window", False):
        return None
    window = reader.get("sliding_window", 4096)
    layers = reader.get("num_hidden_layers", 0)
    first = reader.get("max_window_layers", 28)
    kinds = reader.get("layer_types") or [
        _SLIDING if layer >= first else _FULL for layer in range(layers)
    ]
    if window is None or set(kinds) == {_FULL}:
        return None
    if set(kinds) != {_SLIDING}:
        reader.refuse(
            "max_window_layers", first, f"0 or at least {layers} (the same window in every layer)"
        )
    return window


def _write(config: ModelConfig) -> dict[str, Any]:
    windowed = config.sliding_window is not None
    return {
        **write_llama_like(config),
        "layer_types": [_SLIDING if windowed else _FULL] * config.n_layers,
        "max_window_layers": 0 if windowed else config.n_layers,
        "sliding_window": config.sliding_window,
        "use_sliding_window": windowed,
    }


register(
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        describes="Qwen2, Qwen2.5",
        base_prefix=BASE_PREFIX,
        read=_read,
        write=_write,
        placements=llama_placements,
        ignored=ignored,
    )
)
