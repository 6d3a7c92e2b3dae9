"""The trainer against a loop a reader can check by eye: same tokens, same model, plain PyTorch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from stackwise.data import prepare_data
from stackwise.data.sampler import RowSampler
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config
from stackwise.training.trainers import UnifiedTrainer

STEPS = 20
PAD = 0


def test_causal_training_equals_a_hand_written_loop(make_config):
    config = make_config(
        "training.mode=end_to_end",
        "objective.type=clm",
        "model.attention_mode=causal",
        "data.packing=concatenate",
        f"training.max_steps={STEPS}",
        "training.warmup_steps=4",
        "training.lr=3e-3",
    )
    losses = []
    UnifiedTrainer(config, on_step=lambda record: losses.append(record["loss"])).train()
    np.testing.assert_allclose(losses, plain_loop(config), rtol=0, atol=1e-6)
    assert losses[-1] < losses[0] - 0.5


def plain_loop(config) -> list[float]:
    """Next-token training with torch operations only; one document attends to itself only."""
    data = prepare_data(config)
    shape = resolve_model_config(
        config.model, vocab_size=data.tokenizer.vocab_size, seq_len=config.training.seq_len
    )
    torch.manual_seed(config.run.seed)
    weights = {n: p.detach().clone().requires_grad_() for n, p in Decoder(shape).named_parameters()}
    decay = [p for n, p in weights.items() if p.ndim == 2 and "embeddings" not in n]
    rest = [p for n, p in weights.items() if p.ndim < 2 or "embeddings" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    sampler = RowSampler(len(data.train), 4, seed=config.run.seed * 1_000_003, shuffle=True)
    losses = []
    for step in range(STEPS):
        factor = (step + 1) / 4 if step < 4 else cosine((step - 4) / (STEPS - 4))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        batch = data.train.batch(sampler.batch_rows(step)[0])
        loss = next_token_loss(weights, shape, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def cosine(progress: float) -> float:
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def next_token_loss(w, shape, batch):
    """Documents one by one through a LLaMA-style decoder; mean over the tokens but the first."""
    bounds = batch.cu_seqlens.tolist()
    ids = batch.input_ids.flatten()
    total, count = torch.zeros(()), 0
    for begin, end in itertools.pairwise(bounds):
        document = ids[begin:end]
        if document[0] == PAD:
            continue
        logits = document_logits(w, shape, document)
        total = total + F.cross_entropy(logits[:-1], document[1:], reduction="sum")
        count += len(document) - 1
    return total / count


def document_logits(w, shape, ids):
    length, heads = len(ids), shape.n_heads
    dim = shape.d_model // heads
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def rotate(x):
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos + half * sin

    x = w["embeddings.token.weight"][ids]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for i in range(shape.n_layers):
        p = f"blocks.{i}."
        h = F.rms_norm(x, x.shape[-1:], w[p + "attention_norm.weight"], 1e-6)
        q, k, v = (
            (h @ w[f"{p}attention.{n}_proj.weight"].T).view(length, heads, dim) for n in "qkv"
        )
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(dim)
        weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
        x = x + out @ w[p + "attention.out_proj.weight"].T
        h = F.rms_norm(x, x.shape[-1:], w[p + "feed_forward_norm.weight"], 1e-6)
        gate, up = (h @ w[f"{p}feed_forward.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[p + "feed_forward.down_proj.weight"].T
    return F.rms_norm(x, x.shape[-1:], w["final_norm.weight"], 1e-6) @ w["head.weight"].T
