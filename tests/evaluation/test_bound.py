"""The likelihood bound against exhaustive enumeration and against a source of known entropy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from stackwise.config import EvaluationConfig, ModelConfig, ObjectiveConfig, StackWiseConfig
from stackwise.evaluation import evaluate
from stackwise.evaluation.documents import Documents
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config
from stackwise.objectives import DiffusionObjective, MaskPlan, MaskSampler


def config_for(samples: int = 4, objective: str = "diffusion", **options) -> StackWiseConfig:
    settings = {"mask_rates": (), "batch_size": 8} | options
    return StackWiseConfig(
        objective=ObjectiveConfig(type=objective),
        evaluation=EvaluationConfig(samples=samples, **settings),
    )


def tiny_decoder(markov, length: int, shift: bool = False, mode: str = "bidirectional") -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16, n_layers=2, n_heads=2, d_ff=32, init_std=0.5, attention_mode=mode
    )
    resolved = resolve_model_config(config, vocab_size=markov.VOCAB, seq_len=length)
    return Decoder(resolved, shift=shift).double()


def exhaustive_nelbo(model: Decoder, document: list[int], markov, shift: bool) -> float:
    """The bound of one document by the sum over all subsets of its tokens, in nats."""
    ids = torch.tensor(document)
    tokens = [i for i, token in enumerate(document) if token not in markov.SPECIAL]
    tokens = [i for i in tokens if i > 0] if shift else tokens
    n = len(tokens)
    by_size: dict[int, list[float]] = {size: [] for size in range(1, n + 1)}
    for size in by_size:
        for subset in itertools.combinations(tokens, size):
            at = torch.tensor(subset)
            logits = model(ids.index_fill(0, at, markov.MASK)[None]).logits[0]
            log_p = logits.log_softmax(-1)[at - int(shift)]
            by_size[size].append(-log_p.gather(1, ids[at][:, None]).sum().item() * n / size)
    return sum(sum(values) / len(values) for values in by_size.values()) / n


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
def test_bound_agrees_with_enumeration_over_all_masks(markov, shift):
    rows = markov.source_rows(5, seq_len=14)
    rows.rows = [[document[:7] for document in row] for row in rows.rows]  # at most 2^7 subsets
    rows = markov.FakeRows(rows.rows, 14)
    model = tiny_decoder(markov, 14, shift)
    with torch.no_grad():
        exact = sum(exhaustive_nelbo(model, d, markov, shift) for d in rows.documents)
    results = [
        evaluate(model, rows, markov.FakeTokenizer(), config_for(3), seed=s, progress=False)
        for s in range(60)
    ]
    exact /= results[0]["tokens"]
    values = torch.tensor([result["nats_per_token"] for result in results], dtype=torch.float64)
    error = values.std().item() / 60**0.5
    assert values.mean().item() == pytest.approx(exact, abs=4 * error)
    assert error < 0.02 * exact
    inside = sum(
        result["nats_per_token_low"] <= exact <= result["nats_per_token_high"] for result in results
    )
    assert inside >= 55


def test_training_losses_average_to_the_same_bound(markov):
    rows = markov.FakeRows([[[4, 3, 5, 6, 6], [3, 3, 4, 5, 6]]], 10)
    model = tiny_decoder(markov, 10)
    with torch.no_grad():
        exact = sum(exhaustive_nelbo(model, d, markov, False) for d in rows.documents) / 10
    batch = rows.batch([0])
    layout = Layout.from_batch(batch)
    objective = DiffusionObjective(markov.MASK, weighting="inverse_t", sampler=MaskSampler())
    losses = []
    with torch.no_grad():
        for draw in range(3000):
            corrupted = objective.corrupt(batch, MaskPlan(0.0, 1.0), seed=0, draw=draw)
            if not corrupted.rows.numel():
                losses.append(0.0)
                continue
            hidden = model.run_blocks(
                model.embed(corrupted.input_ids, layout), layout, rows=corrupted.rows
            )
            total = model.loss(hidden, corrupted.targets, token_weight=corrupted.weights)
            losses.append(total.item() / corrupted.normalizer)
    values = torch.tensor(losses, dtype=torch.float64)
    error = values.std().item() / 3000**0.5
    assert error < 0.05 * exact
    assert values.mean().item() == pytest.approx(exact, abs=4 * error)


def test_exact_posterior_reaches_the_entropy_and_the_likelihood(markov):
    rows = markov.source_rows(400)
    model = markov.PosteriorModel()
    result = evaluate(model, rows, markov.FakeTokenizer(), config_for(8), progress=False)
    likelihood = -sum(markov.log_likelihood(document) for document in rows.documents)
    assert result["nats_per_token"] == pytest.approx(likelihood / rows.n_tokens, rel=0.01)
    first = markov.entropy(markov.stationary(markov.TRANSITION))
    n = len(rows.documents)
    entropy = (n * first + (rows.n_tokens - n) * markov.entropy_rate()) / rows.n_tokens
    width = result["nats_per_token_high"] - result["nats_per_token_low"]
    assert result["nats_per_token"] == pytest.approx(entropy, abs=width)  # four standard errors
    assert width < 0.1 * entropy
    assert result["is_bound"]
    assert not result["exact"]


@pytest.mark.parametrize("temper", [0.0, 0.5, 2.0])
def test_every_other_model_lies_above_the_entropy(markov, temper):
    rows = markov.source_rows(400)
    wrong = markov.TRANSITION**temper
    model = markov.PosteriorModel(wrong / wrong.sum(1, keepdim=True))
    best = evaluate(
        markov.PosteriorModel(), rows, markov.FakeTokenizer(), config_for(4), progress=False
    )
    result = evaluate(model, rows, markov.FakeTokenizer(), config_for(4), progress=False)
    assert result["nats_per_token"] > best["nats_per_token"] * 1.05
    assert result["nats_per_token_low"] > best["nats_per_token"]


def test_every_count_is_equally_likely_and_the_draws_are_spread(markov):
    rows = markov.FakeRows([[[3, 4, 5, 6, 3]], [[3, 4, 5]]], 6)
    batch = rows.batch([0, 1])
    drawn = []
    for seed in range(600):
        documents = Documents.of(batch, batch.maskable, seed)
        assert documents.sizes.tolist() == [5, 0, 3, 0]
        drawn.append(torch.stack([documents.stratified_counts(k, 5) for k in range(5)]))
    counts = torch.stack(drawn)  # (seeds, draws, documents)
    assert (counts[..., 0].sort(1).values == torch.arange(1, 6)).all()  # each of 1..5 once
    share = torch.bincount(counts[:, 0, 2].flatten(), minlength=4)[1:] / 600
    assert share.tolist() == pytest.approx([1 / 3] * 3, abs=0.08)
    assert not counts[..., [1, 3]].any()


def test_other_mask_ranges_are_not_bounds(markov):
    rows = markov.source_rows(30)
    tokenizer = markov.FakeTokenizer()
    model = markov.PosteriorModel()
    light = evaluate(model, rows, tokenizer, config_for(), mask_range=(0.0, 0.3), progress=False)
    heavy = evaluate(model, rows, tokenizer, config_for(), mask_range=(0.7, 1.0), progress=False)
    assert not light["is_bound"]
    assert not heavy["is_bound"]
    assert light["nats_per_token"] < heavy["nats_per_token"]
    uniform = evaluate(
        markov.UniformModel(), rows, tokenizer, config_for(), mask_range=(0.2, 0.5), progress=False
    )
    assert uniform["nats_per_token"] == pytest.approx(math.log(4))


def test_documents_do_not_depend_on_their_neighbours(markov):
    """A document's draws are fixed by its place, so the sum over rows is that of single rows."""
    rows = markov.source_rows(9)
    model = tiny_decoder(markov, 16)
    tokenizer = markov.FakeTokenizer()

    def value(batch_size: int) -> float:
        config = config_for(batch_size=batch_size)
        return evaluate(model, rows, tokenizer, config, progress=False)["nats_per_token"]

    assert value(1) == pytest.approx(value(4), abs=1e-12)
    assert value(1) == pytest.approx(value(9), abs=1e-12)


def test_only_masked_tokens_pass_through_the_head(markov):
    rows = markov.source_rows(12)
    model = markov.PosteriorModel()
    evaluate(model, rows, markov.FakeTokenizer(), config_for(4), progress=False)
    assert 0.4 * 4 * rows.n_tokens < model.head_rows < 0.8 * 4 * rows.n_tokens
    assert sum(n for _, n in model.block_rows) == model.head_rows


def _likelihood(model: Decoder, document: list[int], markov) -> tuple[float, int]:
    ids: Tensor = torch.tensor(document)
    log_p = model(ids[None]).logits[0].log_softmax(-1)
    picked = [
        log_p[i - 1, ids[i]].item()
        for i in range(1, len(document))
        if document[i] not in markov.SPECIAL
    ]
    return -sum(picked), len(picked)


def test_causal_perplexity_by_hand(markov):
    rows = markov.source_rows(12)
    model = tiny_decoder(markov, 16, shift=True, mode="causal")
    result = evaluate(
        model, rows, markov.FakeTokenizer(), config_for(objective="clm"), progress=False
    )
    with torch.no_grad():
        sums = [_likelihood(model, document, markov) for document in rows.documents]
    nats, tokens = (sum(part) for part in zip(*sums, strict=True))
    assert result["tokens"] == tokens
    assert result["context_tokens"] == len(rows.documents)
    assert result["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-10)
    assert result["perplexity_bound"] == pytest.approx(math.exp(nats / tokens))
    context = len(rows.documents) * math.log(4)  # uniform code over the four ordinary tokens
    bits = (nats + context) / math.log(2) / rows.n_bytes
    assert result["bits_per_byte"] == pytest.approx(bits, abs=1e-10)
    assert result["exact"]
    assert result["is_bound"]
    assert result["nats_per_token_low"] < nats / tokens < result["nats_per_token_high"]


def test_causal_posterior_reaches_the_entropy_rate(markov):
    rows = markov.source_rows(400)
    result = evaluate(
        markov.PosteriorModel(shift=True),
        rows,
        markov.FakeTokenizer(),
        config_for(objective="clm"),
        progress=False,
    )
    likelihood = -sum(markov.log_likelihood(d, given_first=True) for d in rows.documents)
    assert result["nats_per_token"] == pytest.approx(likelihood / result["tokens"], abs=1e-10)
    assert result["nats_per_token_low"] < markov.entropy_rate() < result["nats_per_token_high"]
