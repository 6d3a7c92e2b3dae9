"""``attn_implementation="stackwise"`` against "eager": logits and gradients of whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stackwise.patching  # noqa: F401  (registers the implementation)

from .conftest import ALL_EXPERTS, BATCHES, largest_error, logits_and_gradients, tokens

MODELS = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"]


def other(model: nn.Module) -> Any:
    """A copy with the same weights and our attention."""
    ours: Any = copy.deepcopy(model)
    ours.set_attn_implementation("stackwise")
    return ours


@pytest.mark.parametrize("kind", MODELS)
def test_float32_equals_eager(kind: str, tiny: Callable[..., Any], batch: dict[str, Any]) -> None:
    eager = tiny(kind)
    theirs = logits_and_gradients(eager, batch)
    ours = logits_and_gradients(other(eager), batch)
    error, name = largest_error(ours, theirs)
    assert error <= 1e-5, (name, error)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", ["left", "packed"])
def test_bfloat16_is_as_close_as_eager(kind: str, tiny: Callable[..., Any], case: str) -> None:
    """The error rule on the whole of the logits and of each gradient. Exact is float32: eager
    attention gives NaN in float64 for rows that are padding."""
    batch = BATCHES[case]()
    eager = tiny(kind, **ALL_EXPERTS.get(kind, {})).to(torch.bfloat16)
    exact = logits_and_gradients(copy.deepcopy(eager).float(), batch)
    theirs = logits_and_gradients(eager, batch)
    ours = logits_and_gradients(other(eager), batch)
    for name, truth in exact.items():
        bound = 2 * distance(theirs[name], truth) + 2**-8 * float(truth.norm())
        assert distance(ours[name], truth) <= bound, name


def distance(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm())


@pytest.mark.parametrize("kind", MODELS)
def test_documents_by_boundaries_equal_documents_alone(kind: str, tiny: Callable[..., Any]) -> None:
    eager = tiny(kind)
    lengths = [7, 1, 12]
    ids = tokens(1)
    logits, start = [], 0
    upstream = torch.randn(1, 20, eager.config.vocab_size, generator=torch.Generator())
    for n in lengths:
        out = eager(input_ids=ids[:, start : start + n]).logits
        out.backward(upstream[:, start : start + n])
        logits.append(out.detach())
        start += n
    alone = {n: p.grad.clone() for n, p in eager.named_parameters() if p.grad is not None}
    eager.zero_grad(set_to_none=True)
    model = other(eager)
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    packed = model(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=12,
        max_length_k=12,
        use_cache=False,
    ).logits
    packed.backward(upstream)
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = alone | {"logits": torch.cat(logits, dim=1)}
    error, name = largest_error(ours | {"logits": packed.detach()}, theirs)
    assert error <= 1e-5, (name, error)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_bidirectional_config(kind: str, tiny: Callable[..., Any]) -> None:
    """``config.is_causal = False`` changes the mask and not the layers' own flag."""
    eager = tiny(kind)
    eager.config.is_causal = False
    for case in ("plain", "left"):
        batch = BATCHES[case]()
        theirs = logits_and_gradients(eager, batch)
        error, name = largest_error(logits_and_gradients(other(eager), batch), theirs)
        assert error <= 1e-5, (case, name, error)
        causal = tiny(kind)(**batch).logits
        assert (causal - eager(**batch).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(
    kind: str, tiny: Callable[..., Any], reentrant: bool
) -> None:
    model = tiny(kind, "stackwise").train()
    for case in ("left", "packed"):
        batch = BATCHES[case]() | {"use_cache": False}
        plain = logits_and_gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again = logits_and_gradients(model, batch)
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        assert plain.keys() == again.keys()
        for name, value in plain.items():
            assert torch.equal(value, again[name]), (case, name)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_oss"])
def test_autocast(kind: str, tiny: Callable[..., Any]) -> None:
    batch = BATCHES["left"]()
    eager = tiny(kind, **ALL_EXPERTS.get(kind, {}))
    exact = logits_and_gradients(eager, batch)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = logits_and_gradients(eager, batch)
        ours = logits_and_gradients(other(eager), batch)
    for name, truth in exact.items():
        bound = 2 * distance(theirs[name], truth) + 2**-8 * float(truth.norm())
        assert distance(ours[name], truth) <= bound, name


def test_every_way_to_ask_for_it(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """from_pretrained, from_config, and a folder that says nothing of it."""
    from transformers import AutoModelForCausalLM

    model = tiny("llama", "stackwise")
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert "stackwise" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stackwise")
    assert loaded.config._attn_implementation == "stackwise"
    assert torch.equal(loaded(tokens()).logits, expected)
    built = AutoModelForCausalLM.from_config(model.config, attn_implementation="stackwise")
    assert built.config._attn_implementation == "stackwise"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    assert (plain(tokens()).logits - expected).abs().max() <= 1e-5


def test_two_runs_are_bit_equal(tiny: Callable[..., Any]) -> None:
    model = tiny("deepseek_v3", "stackwise")
    first, second = (logits_and_gradients(model, BATCHES["packed"]()) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("case", ["plain", "left"])
def test_compiled_model(kind: str, tiny: Callable[..., Any], case: str) -> None:
    batch = BATCHES[case]() | {"use_cache": False}
    eager = tiny(kind)
    theirs = logits_and_gradients(eager, batch)
    model = other(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = logits_and_gradients(compiled, batch)
    ours = {name.removeprefix("_orig_mod."): value for name, value in ours.items()}
    error, name = largest_error(ours, theirs)
    assert error <= 1e-5, (name, error)
