"""Causal sampling with a cache sees what a full forward pass sees."""

from __future__ import annotations

import pytest
import torch

from stackwise.model.kv_cache import KVCache

KINDS = ("llama", "gpt2", "gqa", "mla", "low_rank", "kernel", "mlgka", "post_norm", "window")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_with_a_cache_equal_the_full_pass(build_decoder, kind) -> None:
    model = build_decoder(kind, seq_len=100, attention_mode="causal")
    model.set_attention_mode("causal")
    ids = torch.randint(0, 37, (2, 90))
    full = model(ids).logits
    cache, parts, start = KVCache(), [], 0
    # A prompt, single tokens across the first growth of the buffers, a longer chunk.
    for step in [60, *[1] * 8, 22]:
        parts.append(model(ids[:, start : start + step], cache=cache).logits)
        start += step
    assert cache.length == 90
    assert (torch.cat(parts, 1) - full).abs().max() <= 1e-5


@torch.no_grad()
def test_left_padded_prompts_continue_with_a_mask(build_decoder) -> None:
    model = build_decoder("llama", attention_mode="causal")
    ids = torch.randint(0, 37, (1, 10))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.ones(1, 13, dtype=torch.bool)
    mask[:, :3] = False
    cache = KVCache()
    model(padded[:, :8], attention_mask=mask[:, :8], cache=cache)
    last = model(padded[:, 8:], attention_mask=mask, cache=cache).logits
    # Rotary positions are relative: the shift by the padding does not show.
    assert (last - model(ids).logits[:, 5:]).abs().max() <= 1e-5


def test_bidirectional_models_refuse_a_cache(build_decoder) -> None:
    model = build_decoder("llama")
    with pytest.raises(ValueError, match="cache: got one in bidirectional mode"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache=KVCache())


def test_packed_rows_refuse_a_cache(build_decoder) -> None:
    model = build_decoder("llama", attention_mode="causal")
    with pytest.raises(ValueError, match="cache: got one with cu_seqlens"):
        model(
            torch.zeros(1, 4, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 2, 4]),
            cache=KVCache(),
        )


def test_another_batch_size_is_refused(build_decoder) -> None:
    model = build_decoder("llama", attention_mode="causal")
    cache = KVCache()
    model(torch.zeros(2, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="holds a batch of 2 rows, got 1"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
