"""LoRA, rsLoRA and DoRA on plain and quantised layers: formulas, gradients, merging, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.model.adapters import (
    LoRALinear,
    adapter_parameters,
    adapters,
    add_lora,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from stackwise.model.quantized import QuantizedLinear, quantize_model


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False))


def trained(model: nn.Module) -> nn.Module:
    """Adapters that do something: B is no longer zero."""
    with torch.no_grad():
        for part in adapters(model).values():
            part.lora_b.normal_(0, 0.3)
            if part.magnitude is not None:
                part.magnitude.mul_(torch.rand_like(part.magnitude) + 0.5)
    return model


def formula(part: LoRALinear, x: Tensor) -> Tensor:
    """Dense, in float64."""
    weight = part.base.weight
    dense = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float64)
    delta = part.scaling * part.lora_b.double() @ part.lora_a.double()
    total = dense.double() + delta
    if part.magnitude is not None:
        total = total * (part.magnitude.double() / total.norm(dim=1).detach())[:, None]
    bias = part.base.bias
    return F.linear(x.double(), total, None if bias is None else bias.double())


@pytest.mark.parametrize("format", [None, "nvfp4", "nf4", "fp8_block"])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_forward_and_gradients_follow_the_formula(
    format: str | None, options: dict[str, Any]
) -> None:
    model = network()
    if format:
        quantize_model(model, format)
    assert add_lora(model, rank=4, alpha=6, **options) == ["0", "2"]
    trained(model)
    x = torch.randn(9, 24)
    part = model[0]
    assert part.scaling == pytest.approx(6 / 2 if options.get("rslora") else 6 / 4)
    trainable = [p for p in (part.lora_a, part.lora_b, part.magnitude) if p is not None]
    upstream = torch.randn(9, 40)
    ours = torch.autograd.grad(part(x), trainable, upstream)
    exact = torch.autograd.grad(formula(part, x), trainable, upstream.double())
    torch.testing.assert_close(part(x).double(), formula(part, x), rtol=1e-4, atol=1e-5)
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", [None, "nvfp4"])
def test_a_fresh_adapter_changes_nothing(format: str | None, dora: bool) -> None:
    model = network()
    if format:
        quantize_model(model, format)
    x = torch.randn(5, 24)
    before = model(x)
    add_lora(model, rank=2, dora=dora)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_only_the_adapters_train() -> None:
    model = network()
    add_lora(model, rank=2, dora=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.{name}" for i in (0, 2) for name in ("lora_a", "lora_b", "magnitude")
    }
    assert len(adapter_parameters(model)) == 6


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    add_lora(model, rank=4, dropout=0.5)
    x = torch.randn(20, 32)
    fresh = model.train()(x)
    assert torch.equal(fresh, model.train()(x))  # B is zero: nothing to drop
    trained(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x).double(), formula(model[0], x), rtol=1e-5, atol=1e-6)
    model.train()
    mean = torch.stack([model(x) for _ in range(4000)]).mean(0)
    spread = torch.stack([model(x) for _ in range(200)]).std(0)
    assert ((mean - model.eval()(x)).abs() < 6 * spread / 4000**0.5).all()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", [None, "fp8_row", "nf4"])
def test_merge_and_unmerge(format: str | None, dora: bool) -> None:
    model = network()
    if format:
        quantize_model(model, format, double_quantization=format == "nf4")
    add_lora(model, rank=4, alpha=2, dora=dora)
    trained(model)
    x = torch.randn(6, 24)
    before = model(x)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    errors = merge_lora(model)
    assert set(errors) == {"0", "2"}
    worst = max(errors.values())
    assert worst < {None: 1e-6, "fp8_row": 0.03, "nf4": 0.12}[format]
    assert (format is None) or worst > 0.01
    assert (model(x) - before).norm() <= (0.001 + 2 * worst) * before.norm()
    assert merge_lora(model) == dict.fromkeys(errors, 0.0)
    unmerge_lora(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_remove_puts_the_base_layers_back() -> None:
    for merge in (True, False):
        model = network()
        add_lora(model, rank=2)
        plain = model[0].base.weight.detach().clone()
        trained(model)
        errors = remove_lora(model, merge=merge)
        assert [type(part) for part in model] == [nn.Linear, nn.GELU, nn.Linear]
        assert bool(errors) is merge
        assert torch.equal(model[0].weight, plain) is not merge


def test_nothing_dense_is_made_for_dora(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    quantize_model(model, "nvfp4")
    add_lora(model, rank=2, dora=True)

    def refuse(*args: Any) -> None:
        raise AssertionError("a dense weight was made")

    monkeypatch.setattr("stackwise.kernels.QuantizedTensor.dequantize", refuse)
    model(torch.randn(3, 64)).sum().backward()


def test_bfloat16_models_with_float32_adapters() -> None:
    model = network().bfloat16()
    add_lora(model, rank=2)
    out = model(torch.randn(3, 24).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(
        p.grad.dtype == torch.float32 for p in adapter_parameters(model) if p.grad is not None
    )


def test_targets_by_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    quantize_model(model, "nvfp4", skip=("lm_head", "v_proj"))
    names = add_lora(model, ("q_proj", "model.layers.1.self_attn.v_proj"), rank=2)
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert type(model.model.layers[0].self_attn.q_proj.base) is QuantizedLinear
    assert type(model.model.layers[1].self_attn.v_proj.base) is nn.Linear
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, "k_proj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_proj",)}, "targets: got 'q_proj'; accepted: all-linear, whole module"),
        ({"rank": 0}, "rank: got 0"),
        ({"alpha": -1.0}, "alpha: got -1.0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"skip": ("0", "2")}, "no linear layer is left"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=re.escape(message)):
        add_lora(model, **changes)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_compiles_whole() -> None:
    model = network()
    quantize_model(model, "nvfp4")
    add_lora(model, rank=2)
    trained(model)
    x = torch.randn(4, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
