"""Samples follow the model's distribution, keep what is given and stop where they should."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from stackwise.config import GenerationConfig, ModelConfig
from stackwise.generation import generate
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config


def decoder_for(markov, *, shift: bool = False, mode: str = "bidirectional", **options) -> Decoder:
    torch.manual_seed(0)
    settings = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "init_std": 0.5}
    config = ModelConfig(**(settings | {"attention_mode": mode} | options))
    return Decoder(resolve_model_config(config, vocab_size=markov.VOCAB, seq_len=32), shift=shift)


def chi_square(texts: list[str], expected: dict[str, float]) -> float:
    counts = dict.fromkeys(expected, 0)
    for text in texts:
        counts[text] += 1
    n = len(texts)
    return sum((counts[t] - n * p) ** 2 / (n * p) for t, p in expected.items())


def source_distribution(markov, length: int) -> dict[str, float]:
    first, transition = markov.stationary(markov.TRANSITION), markov.TRANSITION
    result = {}
    for states in itertools.product(range(4), repeat=length):
        p = float(first[states[0]])
        for a, b in itertools.pairwise(states):
            p *= float(transition[a, b])
        result["".join("abcd"[s] for s in states)] = p
    return result


def test_diffusion_samples_follow_the_joint_distribution(markov):
    config = GenerationConfig(max_new_tokens=3)
    texts = generate(markov.PosteriorModel(), markov.FakeTokenizer(), "", config, n_samples=20_000)
    assert chi_square(texts, source_distribution(markov, 3)) < 110  # 63 degrees, p = 2e-4


def test_all_tokens_in_one_step_lose_the_dependence(markov):
    """The control of the test above: it does see a sampler that is not exact."""
    config = GenerationConfig(max_new_tokens=3, steps=1)
    texts = generate(markov.PosteriorModel(), markov.FakeTokenizer(), "", config, n_samples=20_000)
    assert chi_square(texts, source_distribution(markov, 3)) > 1000
    p = markov.stationary(markov.TRANSITION)
    independent = {
        "".join("abcd"[s] for s in states): float(p[states[0]] * p[states[1]] * p[states[2]])
        for states in itertools.product(range(4), repeat=3)
    }
    assert chi_square(texts, independent) < 110


def test_semi_autoregressive_blocks_follow_it_too(markov):
    config = GenerationConfig(max_new_tokens=3, block_length=2)
    texts = generate(markov.PosteriorModel(), markov.FakeTokenizer(), "", config, n_samples=20_000)
    assert chi_square(texts, source_distribution(markov, 3)) < 110


def test_causal_samples_follow_the_joint_distribution(markov):
    whole = source_distribution(markov, 3)
    given = {t: p / sum(q for u, q in whole.items() if u[0] == "c") for t, p in whole.items()}
    expected = {text: p for text, p in given.items() if text[0] == "c"}
    model = markov.PosteriorModel(shift=True)
    texts = generate(
        model,
        markov.FakeTokenizer(),
        "c",
        GenerationConfig(max_new_tokens=2),
        n_samples=20_000,
        mode="causal",
    )
    assert chi_square(texts, expected) < 45  # 15 degrees, p = 8e-5


def test_infilling_follows_the_posterior_of_both_sides(markov):
    t = markov.TRANSITION
    weight = {x: float(t[0, x] * t[x, 2]) for x in range(4)}
    expected = {"a" + "abcd"[x] + "c": w / sum(weight.values()) for x, w in weight.items()}
    for model in (markov.PosteriorModel(), markov.PosteriorModel(shift=True)):
        texts = generate(
            model,
            markov.FakeTokenizer(),
            "a[MASK]c",
            GenerationConfig(),
            n_samples=20_000,
            mode="diffusion",
        )
        assert chi_square(texts, expected) < 22  # 3 degrees, p = 7e-5


def test_infilling_keeps_the_given_text_and_lengths(markov):
    prompt = "ab[MASK:3]cd<|mask|>b[MASK]"
    texts = generate(
        decoder_for(markov),
        markov.FakeTokenizer(),
        prompt,
        GenerationConfig(temperature=1.5),
        n_samples=20,
    )
    for text in texts:
        assert len(text) == 10
        assert (text[:2], text[5:7], text[8]) == ("ab", "cd", "b")
        assert set(text) <= set("abcd")
    assert len(set(texts)) > 10


@pytest.mark.parametrize("mode", ["diffusion", "causal"])
def test_seeds_decide_and_samples_do_not_depend_on_their_number(markov, mode):
    model = decoder_for(markov, mode="causal" if mode == "causal" else "bidirectional")
    config = GenerationConfig(max_new_tokens=10)

    def texts(**options) -> list[str]:
        return generate(model, markov.FakeTokenizer(), "ab", config, mode=mode, **options)

    assert texts(n_samples=3) == texts(n_samples=3)
    assert texts(n_samples=1) == texts(n_samples=3)[:1]
    assert texts(n_samples=3) != texts(n_samples=3, seed=1)
    assert all(text.startswith("ab") for text in texts(n_samples=3))


class SpecialLover(torch.nn.Module):
    """A model that wants nothing more than MASK and PAD, then EOS from position 5 on."""

    def __init__(self, markov) -> None:
        super().__init__()
        self.markov, self.shift, self.attention_mode = markov, False, "bidirectional"
        # A table padded beyond the tokenizer: its extra ids must not be drawn either.
        self.config = SimpleNamespace(
            vocab_size=markov.VOCAB + 2, max_position_embeddings=None, use_rope=True
        )

    def set_attention_mode(self, mode: str) -> None:
        self.attention_mode = mode

    def forward(self, input_ids, *, rows):
        logits = torch.zeros(rows.numel(), self.markov.VOCAB + 2)
        logits[:, [self.markov.MASK, self.markov.PAD, self.markov.VOCAB + 1]] = 50.0
        late = rows % input_ids.shape[1] >= 4
        logits[:, self.markov.EOS] = torch.where(late, 30.0, -30.0)
        return SimpleNamespace(logits=logits)


def test_special_tokens_are_never_generated_but_eos_ends_causal_text(markov):
    tokenizer, model = markov.FakeTokenizer(), SpecialLover(markov)
    config = GenerationConfig(max_new_tokens=12)
    for text in generate(model, tokenizer, "ab", config, n_samples=20, mode="diffusion"):
        assert len(text) == 14
        assert set(text) <= set("abcd")
    for text in generate(model, tokenizer, "ab", config, n_samples=20, mode="causal"):
        assert len(text) == 5  # the fifth token's successor is EOS
        assert set(text) <= set("abcd")


def test_causal_samples_end_at_their_own_eos(markov):
    model = decoder_for(markov, mode="causal", init_std=0.1)
    config = GenerationConfig(max_new_tokens=20, temperature=1.0)
    lengths = {
        len(text) for text in generate(model, markov.FakeTokenizer(), "a", config, n_samples=30)
    }
    assert len(lengths) > 4
    assert max(lengths) <= 21


class Uncached(torch.nn.Module):
    """A decoder whose forward takes no cache."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, self.config, self.shift = decoder, decoder.config, decoder.shift
        self.attention_mode = "causal"
        self.lengths: list[int] = []

    def set_attention_mode(self, mode: str) -> None:
        self.decoder.set_attention_mode(mode)

    def forward(self, input_ids, *, rows):
        self.lengths.append(input_ids.shape[1])
        return self.decoder(input_ids, rows=rows)


def test_cached_and_uncached_causal_sampling_agree(markov):
    model = decoder_for(markov, mode="causal", shift=True)
    config = GenerationConfig(max_new_tokens=20, temperature=0.7)
    cached = generate(model, markov.FakeTokenizer(), "abc", config, n_samples=3)
    uncached = Uncached(model)
    assert generate(uncached, markov.FakeTokenizer(), "abc", config, n_samples=3) == cached
    assert uncached.lengths == list(range(3, 3 + len(uncached.lengths)))
    assert len(uncached.lengths) > 5


@pytest.mark.parametrize("mode", ["diffusion", "causal"])
def test_an_empty_prompt_starts_from_bos_or_eos(markov, mode):
    tokenizer = markov.FakeTokenizer()
    model = decoder_for(markov, shift=True, mode="causal" if mode == "causal" else "bidirectional")
    texts = generate(model, tokenizer, "", GenerationConfig(max_new_tokens=5), mode=mode)
    assert set(texts[0]) <= set("abcd")
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match="must begin with text"):
        generate(model, tokenizer, "", GenerationConfig(max_new_tokens=5), mode=mode)


def test_shifted_diffusion_can_fill_the_first_position(markov):
    model = markov.PosteriorModel(shift=True)
    texts = generate(
        model,
        markov.FakeTokenizer(),
        "[MASK:2]c",
        GenerationConfig(),
        n_samples=50,
        mode="diffusion",
    )
    assert all(len(text) == 3 and text[2] == "c" for text in texts)


def test_blocks_are_finished_from_left_to_right(markov):
    model = decoder_for(markov)
    seen = []
    forward = model.forward
    model.forward = lambda ids, **options: seen.append(ids[0].tolist()) or forward(ids, **options)
    config = GenerationConfig(max_new_tokens=6, block_length=2)
    generate(model, markov.FakeTokenizer(), "ab", config)
    open_at = [[i for i, token in enumerate(ids) if token == markov.MASK] for ids in seen]
    assert [len(positions) for positions in open_at] == [6, 5, 4, 3, 2, 1]
    assert open_at[2] == [4, 5, 6, 7]
    assert open_at[4] == [6, 7]


def test_fewer_steps_make_fewer_calls(markov):
    model = markov.PosteriorModel()
    generate(model, markov.FakeTokenizer(), "", GenerationConfig(max_new_tokens=12, steps=3))
    assert [n for _, n in model.block_rows] == [12, 8, 4]


def test_the_most_certain_position_comes_first(markov):
    """After a long run of c the next c is the safest guess, so it is filled in first."""
    posterior = markov.PosteriorModel()
    seen = []
    run = posterior.run_blocks
    posterior.run_blocks = lambda ids, *a, **k: seen.append(ids[0].tolist()) or run(ids, *a, **k)
    generate(
        posterior,
        markov.FakeTokenizer(),
        "d[MASK:2]ccc[MASK]c",
        GenerationConfig(temperature=0.0),
    )
    assert seen[0][6] == markov.MASK
    assert seen[1][6] != markov.MASK
    assert seen[1][1] == seen[1][2] == markov.MASK


def test_modes_are_restored(markov):
    model = decoder_for(markov)
    model.train()
    generate(model, markov.FakeTokenizer(), "a", GenerationConfig(max_new_tokens=2), mode="causal")
    assert model.training
    assert model.attention_mode == "bidirectional"


def test_prompts_beyond_the_learned_positions_are_refused(markov):
    model = decoder_for(markov, architecture="gpt2", mode="causal")
    config = GenerationConfig(max_new_tokens=10)
    assert generate(model, markov.FakeTokenizer(), "a" * 22, config)
    with pytest.raises(ValueError, match=r"prompt has 23 tokens .* 32 positions.* at most 9"):
        generate(model, markov.FakeTokenizer(), "a" * 23, config)
    with pytest.raises(ValueError, match="at most 0 tokens"):
        generate(model, markov.FakeTokenizer(), "a" * 40, config)
    with pytest.raises(ValueError, match="32 positions"):
        generate(model, markov.FakeTokenizer(), "a" * 30 + "[MASK:3]", config, mode="diffusion")
    rotary = decoder_for(markov, mode="causal")
    assert generate(rotary, markov.FakeTokenizer(), "a" * 40, config)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"temperature": -1.0}, {}, r"generation\.temperature must be 0 or more, got -1"),
        ({"top_k": 0}, {}, r"generation\.top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, {}, r"generation\.top_p must lie in \(0, 1\], got 0"),
        ({"steps": 0}, {}, r"generation\.steps must be at least 1"),
        ({"max_new_tokens": 0}, {}, r"generation\.max_new_tokens must be at least 1"),
        ({"block_length": 0}, {}, r"generation\.block_length must be at least 1"),
        ({}, {"n_samples": 0}, "n_samples must be at least 1"),
        ({}, {"mode": "magic"}, "mode must be diffusion, causal or None, got 'magic'"),
    ],
)
def test_wrong_options_are_named(markov, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(
            markov.PosteriorModel(),
            markov.FakeTokenizer(),
            "a",
            GenerationConfig(**options),
            **arguments,
        )


def test_causal_models_do_not_infill(markov):
    model = markov.PosteriorModel()
    with pytest.raises(ValueError, match="cannot fill in"):
        generate(model, markov.FakeTokenizer(), "a[MASK]b", GenerationConfig(), mode="causal")
