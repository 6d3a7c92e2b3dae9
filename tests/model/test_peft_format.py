"""Adapters in PEFT's format: round trips, PEFT itself both ways, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stackwise.model.adapters import adapters, add_lora
from stackwise.model.peft_format import load_adapter, save_adapter
from stackwise.model.quantized import quantize_model
from tests.model.test_adapters import trained


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(12).view(2, 6) * 5 % 61


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
@pytest.mark.parametrize("format", [None, "nvfp4"])
def test_round_trip(format: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    if format:
        quantize_model(model, format)
    twin = copy.deepcopy(model)
    add_lora(model, ("q_proj", "down_proj"), rank=3, alpha=5, **options)
    trained(model)
    save_adapter(model, tmp_path / "adapter", "some/base")
    names = load_adapter(twin, tmp_path / "adapter")
    assert sorted(names) == sorted(adapters(model))
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_peft_loads_what_we_save_and_we_load_what_it_saves(
    options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = llama()
    ours = copy.deepcopy(base)
    add_lora(ours, ("q_proj", "v_proj", "up_proj"), rank=4, alpha=8, **options)
    trained(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs.eval()(IDS).logits, ours(IDS).logits)

    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["k_proj", "gate_proj"], rank_pattern={"gate_proj": 5},
        alpha_pattern={"layers.1.self_attn.k_proj": 2}, init_lora_weights=False,
        **{f"use_{name}": value for name, value in options.items()},
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits)


def saved(folder: Path) -> nn.Module:
    model = llama()
    add_lora(model, "q_proj", rank=2)
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "got peft_type 'IA3'; accepted: 'LORA'"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
        ({"r": 3}, "the config says rank 3, the weights have 2"),
        ({"use_dora": True}, "use_dora is True, but the weights say otherwise"),
        ({"lora_alpha": None}, "lora_alpha is None; accepted: a number"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = llama()
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(model, tmp_path)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_missing_broken_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("adapter_config.json is missing")):
        load_adapter(llama(), tmp_path)
    saved(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(llama(), tmp_path)
    saved(tmp_path)
    other = nn.ModuleDict({"mlp": nn.Linear(4, 4)})
    with pytest.raises(
        ValueError, match=re.escape("has no module model.layers.0.self_attn.q_proj")
    ):
        load_adapter(other, tmp_path)


def test_only_unmerged_adapters_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no adapters to save"):
        save_adapter(llama(), tmp_path)
    model = saved(tmp_path)
    next(iter(adapters(model).values())).merge()
    with pytest.raises(ValueError, match="is merged"):
        save_adapter(model, tmp_path)
