"""The models of Transformers that :func:`stackwise.patch` knows, and their parts."""

from __future__ import annotations

import dataclasses

from torch import nn

from .adapters import bases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Class names of a family's parts, and what its config calls the activation."""

    attention: str
    feed_forward: str
    activation: str
    rms_norm: str | None = None
    weight_offset: float = 0.0  # of the RMSNorm weights
    layer_norm: str | None = None
    causal_lm: str
    output: str  # class of its outputs


def _like_llama(
    prefix: str,
    activation: str = "hidden_act",
    weight_offset: float = 0.0,
    output: str = "CausalLMOutputWithPast",
) -> Family:
    return Family(
        attention=f"{prefix}Attention",
        feed_forward=f"{prefix}MLP",
        activation=activation,
        rms_norm=f"{prefix}RMSNorm",
        weight_offset=weight_offset,
        causal_lm=f"{prefix}ForCausalLM",
        output=output,
    )


FAMILIES = {
    "llama": _like_llama("Llama"),
    "mistral": _like_llama("Mistral"),
    "qwen2": _like_llama("Qwen2"),
    "qwen3": _like_llama("Qwen3"),
    "gemma2": _like_llama("Gemma2", activation="hidden_activation", weight_offset=1.0),
    "deepseek_v3": _like_llama("DeepseekV3", output="MoeCausalLMOutputWithPast"),
    "gpt2": Family(
        attention="GPT2Attention",
        feed_forward="GPT2MLP",
        activation="activation_function",
        layer_norm="LayerNorm",
        causal_lm="GPT2LMHeadModel",
        output="CausalLMOutputWithCrossAttentions",
    ),
}


def family_of(model: nn.Module) -> Family:
    """Raises ValueError for a model of no known family."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        got = type(model).__name__ if kind is None else f"model_type {kind!r}"
        raise ValueError(
            f"model: got {got}; accepted: a model of Transformers (or a PeftModel around one) "
            f"whose config has model_type {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def parts(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules whose class, or a base of it, has this name."""
    return [module for module in model.modules() if name in bases(module)]
