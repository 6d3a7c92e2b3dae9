"""Loss and gradients of packed rows equal those of their documents alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from stackwise.config import ModelConfig
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config
from stackwise.objectives import CLMObjective, DiffusionObjective, MaskPlan, MLMObjective

PAD, EOS, MASK = 0, 1, 2
VOCAB = 24


def gradients(model: Decoder) -> list[torch.Tensor]:
    result = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return result


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("objective", "mode"),
    [
        (DiffusionObjective(MASK, weighting="inverse_t"), "bidirectional"),
        (DiffusionObjective(MASK, shift=True), "bidirectional"),
        (DiffusionObjective(MASK), "causal"),
        (MLMObjective(MASK, VOCAB, (PAD, EOS, MASK)), "bidirectional"),
        (CLMObjective(EOS), "causal"),
    ],
    ids=["diffusion", "diffusion-shift", "diffusion-causal", "mlm", "clm"],
)
def test_packed_equals_alone(text_batch, architecture, objective, mode):
    torch.manual_seed(0)
    config = ModelConfig(
        architecture=architecture, d_model=16, n_layers=2, n_heads=2, d_ff=32, attention_mode=mode
    )
    model = Decoder(resolve_model_config(config, vocab_size=VOCAB, seq_len=32))
    batch = text_batch(3)
    corrupted = objective.corrupt(batch, MaskPlan(0.3, 0.9), seed=0, draw=0)
    assert corrupted.rows.numel() > 20
    layout = Layout.from_batch(batch)
    hidden = model.run_blocks(model.embed(corrupted.input_ids, layout), layout, rows=corrupted.rows)
    packed = model.loss(hidden, corrupted.targets, token_weight=corrupted.weights)
    packed = packed / corrupted.normalizer
    packed.backward()
    packed_gradients = gradients(model)

    alone = 0.0
    flat = corrupted.input_ids.flatten()
    bounds = batch.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        inside = (corrupted.rows >= start) & (corrupted.rows < stop)
        if not inside.any():
            continue
        hidden = model(flat[None, start:stop]).hidden[0, corrupted.rows[inside] - start]
        weights = None if corrupted.weights is None else corrupted.weights[inside]
        loss = model.loss(hidden, corrupted.targets[inside], token_weight=weights)
        (loss / corrupted.normalizer).backward()
        alone += loss.item() / corrupted.normalizer
    assert packed.item() == pytest.approx(alone, abs=1e-6)
    for ours, theirs in zip(packed_gradients, gradients(model), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
