"""The figures ``evaluate`` returns, what it restores and what it refuses."""

from __future__ import annotations

import json
import math

import pytest

from stackwise.config import EvaluationConfig, ObjectiveConfig, StackWiseConfig
from stackwise.evaluation import evaluate


def config_for(objective: str = "diffusion", **options) -> StackWiseConfig:
    settings = {"mask_rates": (0.15, 0.5, 0.85), "batch_size": 8, "samples": 2} | options
    return StackWiseConfig(
        objective=ObjectiveConfig(type=objective), evaluation=EvaluationConfig(**settings)
    )


@pytest.fixture
def rows(markov):
    return markov.source_rows(40)


def test_keys_and_json(markov, rows):
    result = evaluate(
        markov.PosteriorModel(),
        rows,
        markov.FakeTokenizer(),
        config_for(),
        progress=False,
        train_rows=rows,
    )
    expected = {"objective", "perplexity_bound", "is_bound", "exact", "tokens", "context_tokens"}
    expected |= {"documents", "rows", "samples", "unigram_bits_per_byte"}
    names = ["nats_per_token", "bits_per_byte"]
    names += [f"accuracy_at_{rate}" for rate in (0.15, 0.5, 0.85)]
    expected |= {name + suffix for name in names for suffix in ("", "_low", "_high")}
    assert set(result) == expected
    assert json.loads(json.dumps(result)) == result
    assert result["objective"] == "diffusion"
    assert (result["rows"], result["documents"]) == (40, len(rows.documents))
    assert result["tokens"] == rows.n_tokens
    assert result["unigram_bits_per_byte"] == 8.0 * 40


def test_bits_per_byte_and_perplexity_follow_from_nats(markov, rows):
    result = evaluate(
        markov.PosteriorModel(), rows, markov.FakeTokenizer(), config_for(), progress=False
    )
    for suffix in ("", "_low", "_high"):
        bits = result["nats_per_token" + suffix] * rows.n_tokens / rows.n_bytes / math.log(2)
        assert result["bits_per_byte" + suffix] == pytest.approx(bits)
    assert result["perplexity_bound"] == pytest.approx(math.exp(result["nats_per_token"]))


def test_shifted_diffusion_charges_first_tokens_the_uniform_code(markov, rows):
    model = markov.UniformModel(shift=True)
    result = evaluate(model, rows, markov.FakeTokenizer(), config_for(), progress=False)
    assert result["context_tokens"] == len(rows.documents)
    assert result["tokens"] == rows.n_tokens - len(rows.documents)
    assert result["nats_per_token"] == pytest.approx(math.log(4))
    assert result["bits_per_byte"] == pytest.approx(2.0 / 2)  # two bits a token, two bytes a token


def test_shifted_and_plain_posterior_agree_given_the_first_token(markov):
    rows = markov.source_rows(300)
    shifted = evaluate(
        markov.PosteriorModel(shift=True),
        rows,
        markov.FakeTokenizer(),
        config_for(samples=8, mask_rates=()),
        progress=False,
    )
    likelihood = -sum(markov.log_likelihood(d, given_first=True) for d in rows.documents)
    assert shifted["nats_per_token"] == pytest.approx(likelihood / shifted["tokens"], rel=0.01)


def test_accuracy_of_a_uniform_guess_and_of_the_posterior(markov):
    rows = markov.source_rows(300)
    tokenizer = markov.FakeTokenizer()
    exact = evaluate(markov.PosteriorModel(), rows, tokenizer, config_for(), progress=False)
    guess = evaluate(markov.UniformModel(), rows, tokenizer, config_for(), progress=False)
    # The uniform model's ties go to the first state: its accuracy is that state's share.
    tokens = [t for d in rows.documents for t in d if t not in markov.SPECIAL]
    share = tokens.count(markov.FIRST) / len(tokens)
    for rate in (0.15, 0.5, 0.85):
        name = f"accuracy_at_{rate}"
        assert guess[name + "_low"] - 0.03 < share < guess[name + "_high"] + 0.03
        assert exact[name] > guess[name] + 0.2
        assert exact[name + "_low"] < exact[name] < exact[name + "_high"]
    assert exact["accuracy_at_0.15"] > exact["accuracy_at_0.5"] > exact["accuracy_at_0.85"]


def test_mlm_is_no_bound_and_scores_the_selected_tokens(markov):
    rows = markov.source_rows(100)
    model = markov.UniformModel()
    result = evaluate(
        model, rows, markov.FakeTokenizer(), config_for("mlm", mask_rates=()), progress=False
    )
    assert not result["is_bound"]
    assert not result["exact"]
    assert result["nats_per_token"] == pytest.approx(math.log(4))
    assert model.head_rows / (2 * rows.n_tokens) == pytest.approx(0.15, abs=0.03)


def test_max_rows_takes_a_fixed_random_subset(markov, rows):
    tokenizer = markov.FakeTokenizer()
    config = config_for(max_rows=7, mask_rates=())
    model = markov.PosteriorModel()
    first = evaluate(model, rows, tokenizer, config, progress=False)
    assert first["rows"] == 7
    assert first == evaluate(model, rows, tokenizer, config, progress=False)
    other = evaluate(model, rows, tokenizer, config, progress=False, seed=1)
    assert other["nats_per_token"] != first["nats_per_token"]
    ratio = rows.n_tokens / rows.n_bytes / math.log(2)
    assert first["bits_per_byte"] == pytest.approx(first["nats_per_token"] * ratio)


def test_seeds_change_the_masks_and_nothing_else_does(markov, rows):
    tokenizer = markov.FakeTokenizer()
    model = markov.PosteriorModel()
    one = evaluate(model, rows, tokenizer, config_for(), progress=False)
    assert one == evaluate(model, rows, tokenizer, config_for(), progress=False)
    two = evaluate(model, rows, tokenizer, config_for(), progress=False, seed=1)
    assert two["nats_per_token"] != one["nats_per_token"]
    assert two["accuracy_at_0.5"] != one["accuracy_at_0.5"]


@pytest.mark.parametrize("objective", ["diffusion", "mlm", "clm"])
def test_modes_are_set_and_restored(markov, rows, objective):
    model = markov.PosteriorModel(shift=objective == "clm")
    model.train()
    evaluate(model, rows, markov.FakeTokenizer(), config_for(objective), progress=False, n_blocks=1)
    expected = "causal" if objective == "clm" else "bidirectional"
    assert set(model.modes) == {(expected, False)}
    assert {stop for stop, _ in model.block_rows} == {1}
    assert model.training
    assert model.attention_mode == "bidirectional"


def test_modes_are_restored_after_a_failure(markov, rows):
    model = markov.PosteriorModel()
    model.train()
    model.loss = None
    with pytest.raises(TypeError):
        evaluate(model, rows, markov.FakeTokenizer(), config_for("clm"), progress=False)
    assert model.training
    assert model.attention_mode == "bidirectional"


def test_single_document_without_spread_has_no_interval(markov):
    rows = markov.FakeRows([[[3, 4, 5]]], 4)
    result = evaluate(
        markov.PosteriorModel(shift=True),
        rows,
        markov.FakeTokenizer(),
        config_for("clm"),
        progress=False,
    )
    assert result["nats_per_token_low"] is None
    assert result["bits_per_byte_high"] is None
    assert json.dumps(result)


def test_padding_only_batches_are_skipped(markov):
    good = [[4, 3, 5, 6]]
    rows = markov.FakeRows([[[markov.EOS]], good, [[markov.EOS]], good], 6)
    for objective in ("diffusion", "mlm", "clm"):
        result = evaluate(
            markov.PosteriorModel(shift=objective == "clm"),
            rows,
            markov.FakeTokenizer(),
            config_for(objective, batch_size=1, samples=20),
            progress=False,
        )
        assert result["documents"] == 2
        assert math.isfinite(result["bits_per_byte"])


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"n_blocks": 3}, "n_blocks must be 1 to 2, got 3"),
        ({}, {"n_blocks": 0}, "n_blocks must be 1 to 2, got 0"),
        ({}, {"mask_range": (0.5, 0.5)}, "mask_range must satisfy"),
        ({"samples": 0}, {}, r"evaluation\.samples must be at least 1, got 0"),
        ({"max_rows": 0}, {}, r"evaluation\.max_rows must be at least 1, got 0"),
        ({"mask_rates": (0.0,)}, {}, r"evaluation\.mask_rates must lie in \(0, 1\], got 0"),
    ],
)
def test_wrong_arguments_are_named(markov, rows, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(
            markov.PosteriorModel(),
            rows,
            markov.FakeTokenizer(),
            config_for(**options),
            progress=False,
            **arguments,
        )


def test_empty_splits_are_refused(markov):
    tokenizer = markov.FakeTokenizer()
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(
            markov.PosteriorModel(), markov.FakeRows([], 4), tokenizer, config_for(), progress=False
        )
    blank = markov.FakeRows([[[markov.EOS]]], 4)
    with pytest.raises(ValueError, match="no token to evaluate"):
        evaluate(markov.PosteriorModel(), blank, tokenizer, config_for(), progress=False)
