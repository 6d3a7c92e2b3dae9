"""A decoder trained on a source of known entropy: its bound comes close and never goes below."""

from __future__ import annotations

import torch

from stackwise.config import ModelConfig, StackWiseConfig
from stackwise.evaluation import evaluate
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config
from stackwise.objectives import MaskPlan, build_objective

STEPS = 250


def trained(markov, config: StackWiseConfig) -> Decoder:
    """Mask diffusion over (0, 1] on rows of the source, a fresh draw every pass."""
    torch.manual_seed(0)
    shape = ModelConfig(d_model=32, n_layers=2, n_heads=2, init_std=0.15)
    model = Decoder(resolve_model_config(shape, vocab_size=markov.VOCAB, seq_len=16))
    objective = build_objective(config, markov.FakeTokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    rows = markov.source_rows(512, seed=1)
    for step in range(STEPS):
        batch = rows.batch(range(step * 64 % 512, step * 64 % 512 + 64))
        corrupted = objective.corrupt(batch, MaskPlan(0.0, 1.0), seed=0, draw=step // 8)
        layout = Layout.from_batch(batch)
        hidden = model.run_blocks(
            model.embed(corrupted.input_ids, layout), layout, rows=corrupted.rows
        )
        loss = model.loss(hidden, corrupted.targets) / corrupted.normalizer
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_bound_of_a_trained_model_lies_just_above_the_entropy(markov):
    config = StackWiseConfig()
    config.evaluation.samples = 8
    config.evaluation.mask_rates = ()
    held_out = markov.source_rows(400, seed=2)
    result = evaluate(
        trained(markov, config), held_out, markov.FakeTokenizer(), config, progress=False
    )
    documents = len(held_out.documents)
    first = markov.entropy(markov.stationary(markov.TRANSITION))
    later = held_out.n_tokens - documents
    entropy = (documents * first + later * markov.entropy_rate()) / held_out.n_tokens
    assert result["is_bound"]
    assert result["nats_per_token_high"] >= entropy
    assert result["nats_per_token"] >= entropy - 0.02
    assert result["nats_per_token"] < 0.5 * (entropy + first), "it learned the source's order"
