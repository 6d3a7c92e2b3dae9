"""``generate`` and steps with a cache: the tokens and logits of eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stackwise.patching  # noqa: F401  (registers the implementation)

from .conftest import padded, tokens

MODELS = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"]


def generate(model: Any, batch: dict[str, Any], new: int, **options: Any) -> Any:
    return model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
        **options,
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_with_left_padding(kind: str, cache: str, tiny: Callable[..., Any]) -> None:
    """12 tokens go past the windows. One token makes a static cache as long as the prompt."""
    batch = padded([6, 0], [0, 0])
    eager = tiny(kind)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("stackwise")
    for new in (12, 1):
        options = {"cache_implementation": "static"} if cache == "static" else {}
        theirs = generate(eager, batch, new, **options)
        mine = generate(ours, batch, new, **options)
        assert torch.equal(mine.sequences, theirs.sequences)
        error = (torch.stack(mine.logits) - torch.stack(theirs.logits)).abs().max()
        assert error <= 1e-5


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("left", [0, 6])
def test_several_tokens_after_a_cache(kind: str, left: int, tiny: Callable[..., Any]) -> None:
    """Rows stand at the end of the keys, not at their start."""
    batch = padded([left, 0], [0, 0])
    eager = tiny(kind)
    results = []
    for implementation in ("eager", "stackwise"):
        eager.set_attn_implementation(implementation)
        first = eager(
            input_ids=batch["input_ids"][:, :14],
            attention_mask=batch["attention_mask"][:, :14],
            position_ids=batch["position_ids"][:, :14],
            use_cache=True,
        )
        after = eager(
            input_ids=batch["input_ids"][:, 14:],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"][:, 14:],
            past_key_values=first.past_key_values,
        )
        results.append(after.logits)
    assert (results[0] - results[1]).abs().max() <= 1e-5
    whole = eager(**batch).logits[:, 14:]
    assert (results[1] - whole).abs().max() <= 1e-5


def test_sampling_from_a_prompt_without_mask(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "stackwise")
    out = model.generate(tokens(1), max_new_tokens=3, do_sample=False)
    ids = tokens(1)
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)
