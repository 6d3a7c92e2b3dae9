"""A patched model under real adapters of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stackwise.patching import patch

from .conftest import largest_error, tokens

peft = pytest.importorskip("peft")


def adapted(model: nn.Module, **options: Any) -> Any:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], **options
    )
    wrapped = peft.get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, "loss": loss.detach()}


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["lm_head", "norm"]])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_lora_step_equals_unpatched(
    kind: str, saved: list[str] | None, tiny: Callable[..., Any]
) -> None:
    model = adapted(tiny(kind), modules_to_save=saved)
    theirs = step(model)
    with patch(model) as handle:
        ours = step(model)
        assert handle.replaced["linear_cross_entropy"] == 1
    error, name = largest_error(ours, theirs)
    assert error <= 2e-5, (name, error)
    assert any("lora_A" in name for name in ours)


def test_adapter_around_the_head_is_refused(tiny: Callable[..., Any]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match="as lm_head"):
        patch(model)
    patch(model, linear_cross_entropy=False).revert()
