"""Tiny models of Transformers, no parameter at its neutral value, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
#: Class, and what its config has beside COMMON. The windows are shorter than the rows of a batch.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "head_dim": 8, "attn_logit_softcapping": 2.0}),
    "gpt_oss": (
        "GptOss",
        {"sliding_window": 5, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}
#: Every expert takes every token, so that rounding cannot change which ones do.
ALL_EXPERTS = {
    "gpt_oss": {"num_experts_per_tok": 4},
    "deepseek_v3": {"num_experts_per_tok": 4, "n_group": 1},
}


def build(kind: str, attention: str = "eager", **fields: Any) -> nn.Module:
    """A causal language model in evaluation mode, float32, weights a function of ``kind``."""
    import transformers

    name, special = KINDS[kind]
    options = {**COMMON, **special, **fields}
    if kind in ALL_EXPERTS:
        options["experts_implementation"] = "eager"
    config = getattr(transformers, f"{name}Config")(**options)
    suffix = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name + suffix)._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.15 if parameter.dim() > 1 else 0.3) * noise)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """``tiny(kind, attention="eager", **config_fields)``: see :func:`build`."""
    return build


LENGTH = 20


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def padded(left: list[int], right: list[int]) -> dict[str, Tensor]:
    mask = torch.ones(len(left), LENGTH, dtype=torch.int64)
    for row, (before, after) in enumerate(zip(left, right, strict=True)):
        mask[row, :before] = 0
        mask[row, LENGTH - after :] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens(len(left)), "attention_mask": mask, "position_ids": positions}


def positions_of(*rows: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def with_hole() -> dict[str, Tensor]:
    batch = padded([0, 3], [0, 0])
    batch["attention_mask"][0, 8:10] = 0
    return batch


#: Inputs of a model; the keys that hold in ``attention_mask`` mark the outputs that mean something.
BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"input_ids": tokens()},
    "ones": lambda: padded([0, 0], [0, 0]),
    "left": lambda: padded([6, 0], [0, 0]),
    "right": lambda: padded([0, 0], [1, 7]),
    "both": lambda: padded([3, 19], [2, 0]),
    "hole": with_hole,
    "packed": lambda: {
        "input_ids": tokens(),
        "position_ids": positions_of([7, 1, 12], [13, 7]),
        "use_cache": False,
    },
}


@pytest.fixture(params=list(BATCHES))
def batch(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BATCHES[request.param]()


def logits_and_gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Logits of real tokens (0 elsewhere) and parameter gradients for a fixed upstream gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(**batch).logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = logits.masked_fill(~real[..., None], 0.0)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    logits.backward(upstream.to(logits.dtype))
    results = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name] = parameter.grad
    model.zero_grad(set_to_none=True)
    return results


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference of any tensor as a part of the larger of 1 and its largest value."""
    assert ours.keys() == theirs.keys()
    found = []
    for name, truth in theirs.items():
        error = float((ours[name].double() - truth.double()).abs().nan_to_num(nan=1e9).max())
        found.append((error / max(1.0, float(truth.abs().max())), name))
    return max(found)
