"""Prompts, token draws and step plans."""

from __future__ import annotations

import pytest
import torch

from stackwise.generation.diffusion import step_counts
from stackwise.generation.prompts import encode_prompt
from stackwise.generation.sampling import TokenSampler, keep_top_k, keep_top_p


def sampler_for(n_samples: int = 1, **options) -> TokenSampler:
    settings = {"seed": 0, "temperature": 1.0, "top_k": None, "top_p": None, "banned": ()}
    return TokenSampler(n_samples, **(settings | options), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "ids", "fill"),
    [
        ("ab", [3, 4], [0, 0]),
        ("[MASK]", [2], [1]),
        ("a[MASK:3]b", [3, 2, 2, 2, 4], [0, 1, 1, 1, 0]),
        ("<|mask|>a[MASK]", [2, 3, 2], [1, 0, 1]),
        ("[MASK:2][MASK]", [2, 2, 2], [1, 1, 1]),
        ("", [], []),
    ],
)
def test_prompt_spans(markov, text, ids, fill):
    assert encode_prompt(text, markov.FakeTokenizer()) == (ids, [bool(f) for f in fill])


def test_prompt_errors(markov):
    tokenizer = markov.FakeTokenizer()
    with pytest.raises(ValueError, match=r"'\[MASK:0\]' must ask for 1 to"):
        encode_prompt("a[MASK:0]", tokenizer)
    tokenizer.mask_id = None
    assert encode_prompt("ab", tokenizer)[0] == [3, 4]
    with pytest.raises(ValueError, match="no MASK token"):
        encode_prompt("a[MASK]", tokenizer)


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0])
    for temperature in (0.5, 1.0, 2.0):
        sampler = sampler_for(temperature=temperature, banned=[4])
        draws = sampler.draw(logits.expand(1, 40_000, 5))[0]
        share = torch.bincount(draws, minlength=5) / 40_000
        expected = torch.softmax(logits[:4] / temperature, 0)
        assert share[4] == 0
        assert share[:4].tolist() == pytest.approx(expected.tolist(), abs=0.011)


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Float32 Gumbel noise would never reach far enough into the tail."""
    logits = torch.tensor([0.0, -11.0]).expand(1, 400_000, 2)
    rare = int(sampler_for().draw(logits).sum())
    expected = 400_000 * torch.sigmoid(torch.tensor(-11.0)).item()  # 6.7
    assert 0 < rare < expected + 5 * expected**0.5


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[[0.0, 3.0, 2.0], [9.0, 1.0, 8.0]]])
    assert sampler_for(temperature=0.0, banned=[0]).draw(logits).tolist() == [[1, 2]]


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert keep_top_k(logits, 2).isfinite().tolist() == [False, True, True, False]
    assert keep_top_k(logits, 9).equal(logits)
    assert keep_top_p(logits, 0.75).isfinite().tolist() == [False, True, True, True]
    assert keep_top_p(logits, 0.69).isfinite().tolist() == [False, True, True, False]
    assert keep_top_p(logits, 0.01).isfinite().tolist() == [False, True, False, False]
    assert keep_top_p(logits, 1.0).equal(logits)
    kept = keep_top_p(logits, 0.69)
    assert torch.equal(kept[1:3], logits[1:3])


def test_top_k_limits_the_draws():
    logits = torch.zeros(1, 2000, 10)
    logits[..., 3] = logits[..., 7] = 0.5
    draws = sampler_for(top_k=2).draw(logits)
    assert set(draws.flatten().tolist()) == {3, 7}


def test_samples_do_not_depend_on_how_many_there_are():
    logits = torch.randn(3, 20, 50)
    three = sampler_for(3).draw(logits)
    assert torch.equal(sampler_for(1).draw(logits[:1]), three[:1])
    assert torch.equal(sampler_for(3).draw(logits), three)
    same = logits[:1].expand(3, 20, 50)
    rows = sampler_for(3).draw(same)
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(sampler_for(3, seed=1).draw(same), rows)


def test_confidence_ignores_banned_tokens():
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 3.0, 0.0]]])
    confidence = sampler_for(banned=[0]).confidence(logits)[0]
    expected = [torch.tensor(0.5).log(), torch.tensor(3.0).sigmoid().log()]
    assert confidence.tolist() == pytest.approx([float(x) for x in expected])


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [
        ((5, None, None), [[1, 1, 1, 1, 1]]),
        ((5, 2, None), [[3, 2]]),
        ((5, 99, None), [[1, 1, 1, 1, 1]]),
        ((6, None, 4), [[1, 1, 1, 1], [1, 1]]),
        ((8, 4, 4), [[2, 2], [2, 2]]),
        ((8, 1, 4), [[4], [4]]),
        ((0, None, None), []),
    ],
)
def test_step_plans(arguments, plan):
    assert step_counts(*arguments) == plan
