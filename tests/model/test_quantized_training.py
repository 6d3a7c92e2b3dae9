"""A tiny LLaMA with a quantised base and adapters trains as the composition of plain layers does.

The composition: dequantised weights in ``F.linear`` plus ``F.linear(F.linear(x, A), B) * scaling``,
in float64 for the exact curve and in float32 for the size of rounding. The error rule: our largest
distance from the exact curve is at most twice that of the composition, plus one rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.model.adapters import LoRALinear, adapter_parameters, adapters, add_lora
from stackwise.model.quantized import quantize_model

STEPS = 50


class PlainLoRA(nn.Module):
    """The composition of a dequantised weight and an adapter, from a :class:`LoRALinear`."""

    def __init__(self, part: LoRALinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(part.base.weight.dequantize(dtype), requires_grad=False)
        self.lora_a = nn.Parameter(part.lora_a.detach().to(dtype, copy=True))
        self.lora_b = nn.Parameter(part.lora_b.detach().to(dtype, copy=True))
        self.scaling = part.scaling

    def forward(self, x: Tensor) -> Tensor:
        return (
            F.linear(x, self.weight)
            + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scaling
        )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def composition(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, part in adapters(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, PlainLoRA(part, dtype))
    return twin.to(dtype)


def losses(model: Any, parameters: list[nn.Parameter]) -> Tensor:
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 61, (2, 8), generator=generator)  # to be memorised
    curve = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach().double())
    return torch.stack(curve)


@pytest.mark.parametrize("format", ["nvfp4", "nf4", "fp8_block"])
def test_fifty_steps_follow_the_composition(format: str) -> None:
    model = llama()
    quantize_model(model, format)
    add_lora(model, rank=4, alpha=8)
    exact_model, plain_model = composition(model, torch.float64), composition(model, torch.float32)

    def trainable(twin: nn.Module) -> list[nn.Parameter]:
        return [p for p in twin.parameters() if p.requires_grad]

    exact = losses(exact_model, trainable(exact_model))
    plain = losses(plain_model, trainable(plain_model))
    ours = losses(model, adapter_parameters(model))
    assert exact[-5:].mean() < 0.9 * exact[0], "nothing was learnt"
    bound = 2 * (plain - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.max()
    # Fifty steps amplify rounding: where float32 happens to be lucky, a floor.
    assert (ours - exact).abs().max() <= bound.clamp(min=1e-4)


def test_fifty_steps_compiled_whole() -> None:
    model = llama()
    quantize_model(model, "nvfp4")
    add_lora(model, rank=4, alpha=8)
    twin = copy.deepcopy(model)
    eager = losses(model, adapter_parameters(model))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        losses(compiled, adapter_parameters(twin)), eager, rtol=1e-4, atol=1e-4
    )
