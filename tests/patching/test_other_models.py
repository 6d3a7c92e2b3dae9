"""Encoders, cross-attention and a model that needs what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import stackwise.patching  # noqa: F401  (registers the implementation)

from .conftest import VOCAB, largest_error, padded, tokens

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(name: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def bart() -> Any:
    return build(
        "Bart", vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, pad_token_id=0,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, bos_token_id=1,
        decoder_ffn_dim=48, eos_token_id=2, decoder_start_token_id=1, max_position_embeddings=64,
        forced_eos_token_id=None, dropout=0.0,
    )  # fmt: skip


def results(model: nn.Module, real: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    hidden = model(**inputs).last_hidden_state
    hidden = hidden if real.shape != hidden.shape[:2] else hidden.masked_fill(~real[..., None], 0.0)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    hidden.backward(upstream)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"hidden": hidden.detach()}


@pytest.mark.parametrize("name", ["Bert", "ModernBert", "Bart"])
def test_padding_is_not_seen(name: str) -> None:
    """Bidirectional layers, windows to both sides, and queries of one row over keys of another."""
    extra: dict[str, Any] = {"ModernBert": {"local_attention": 6}}.get(name, {})
    model = bart() if name == "Bart" else build(name, **SIZES, **extra)
    batch = padded([0, 0], [7, 1])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if name == "Bart":
        inputs["decoder_input_ids"] = tokens()[:, :9]
    real = batch["attention_mask"].bool()
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("stackwise")
    error, where = largest_error(results(ours, real, **inputs), results(model, real, **inputs))
    assert error <= 1e-5, (where, error)
    changed = inputs["input_ids"].masked_fill(~real, 1)
    assert not torch.equal(changed, inputs["input_ids"])
    first = ours(**inputs).last_hidden_state
    second = ours(**inputs | {"input_ids": changed}).last_hidden_state
    seen = slice(None) if name == "Bart" else real
    assert torch.equal(first[seen], second[seen])


def test_position_bias_is_refused() -> None:
    model = build(
        "T5", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=1,
    )  # fmt: skip
    model.set_attn_implementation("stackwise")
    with pytest.raises(ValueError, match="position_bias: got an argument"):
        model(input_ids=tokens(), decoder_input_ids=tokens())
