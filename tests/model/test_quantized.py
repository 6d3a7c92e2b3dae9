"""Quantised models: conversion, memory, casting, files, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_bytes
from stackwise.kernels.formats import FORMATS
from stackwise.model.quantized import QuantizedLinear, dequantize_model, quantize_model
from stackwise.model.quantized_file import load_quantized, resident_bytes, save_quantized
from stackwise.runs.errors import RunError


def llama(layers: int = 2, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_converted_model_computes_with_the_dequantised_weights(format: str) -> None:
    model = llama()
    reference = copy.deepcopy(model)
    report = quantize_model(model, format)
    assert len(report.errors) == 14
    assert report.skipped == ["lm_head"]
    for name, part in model.named_modules():
        if isinstance(part, QuantizedLinear):
            reference.get_submodule(name).weight.data = part.weight.dequantize()
            expected = reference.get_submodule(name).weight
            assert torch.equal(part.dequantized().weight, expected)
    ids = torch.randint(0, 97, (2, 11))
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)


def test_gpt2_layers_are_converted_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).eval()
    ids = torch.randint(0, 50, (1, 7))
    before = model(ids).logits
    quantize_model(model, "fp8_row")
    assert type(model.transformer.h[0].mlp.c_fc) is QuantizedLinear
    assert (model(ids).logits - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize(
    ("format", "bits", "options"),
    [("nvfp4", 4.5, {}), ("nf4", 4.5, {}), ("nf4", 4.127, {"double_quantization": True}),
     ("mxfp4", 4.25, {}), ("fp8_block", 8.0, {})],
)  # fmt: skip
def test_resident_bytes_follow_the_formula(
    format: str, bits: float, options: dict[str, Any]
) -> None:
    model = nn.Sequential(*(nn.Linear(512, 1024, bias=False) for _ in range(3)))
    weights = sum(p.numel() for p in model.parameters())
    quantize_model(model, format, **options)
    assert resident_bytes(model) == pytest.approx(weights * bits / 8, rel=0.02)


def test_conversion_needs_less_than_one_layer_beside_the_result() -> None:
    """Beyond what is resident before: originals go as results come, one layer at a time."""
    models = []

    def prepare() -> Any:
        models.append(nn.Sequential(*(nn.Linear(4096, 2048, bias=False) for _ in range(3))))
        return lambda: quantize_model(models[0], "nvfp4", progress=False)

    layer = 4096 * 2048 * 4
    assert peak_bytes(prepare, torch.device("cpu")) < layer
    assert resident_bytes(models[0]) < 3 * layer / 7


def test_casting_leaves_scales_and_codes_alone() -> None:
    for format in FORMATS:
        layer = QuantizedLinear.from_linear(nn.Linear(64, 32), format)
        expected = layer.weight.dequantize(torch.float32)
        for dtype in (torch.bfloat16, torch.float64, torch.float16):
            layer.to(dtype)
            assert torch.equal(layer.weight.dequantize(torch.float32), expected)
        assert layer.bias is not None
        assert layer.bias.dtype == torch.float16
        assert torch.equal(layer.float().half().weight.dequantize(torch.float32), expected)
        assert layer.to("meta").weight_data.is_meta


def test_state_dict_round_trip_and_back_to_linear() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64))
    quantize_model(model, "nf4", double_quantization=True)
    twin = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64))
    quantize_model(twin, "nf4", double_quantization=True)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(twin(x), model(x))
    assert dequantize_model(model) == ["0", "2"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("tied", [False, True])
def test_file_round_trip(format: str, tied: bool, tmp_path: Path) -> None:
    model = llama(layers=1, tied=tied).bfloat16()
    quantize_model(model, format)
    save_quantized(model, tmp_path / "model")
    with torch.device("meta"):
        empty = llama(layers=1, tied=tied).bfloat16()
    loaded = load_quantized(empty, tmp_path / "model")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, tensor in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name
    part = loaded.get_submodule("model.layers.0.mlp.up_proj")
    assert part.weight.dtype == torch.bfloat16


def damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(bytes(data))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [damaged, truncated])
def test_a_damaged_file_is_refused(harm: Any, tmp_path: Path) -> None:
    model = llama(layers=1)
    quantize_model(model, "nvfp4")
    save_quantized(model, tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(RunError, match="damaged"):
        load_quantized(llama(layers=1), tmp_path / "model")


def test_a_model_of_another_shape_is_refused_and_left_alone(tmp_path: Path) -> None:
    small = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    quantize_model(small, "nvfp4")
    save_quantized(small, tmp_path / "model")
    other = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 17))
    with pytest.raises(ValueError, match=re.escape("model.1: is Linear (17, 32)")):
        load_quantized(other, tmp_path / "model")
    assert type(other[0]) is nn.Linear
    longer = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16), nn.LayerNorm(16))
    with pytest.raises(ValueError, match=re.escape("lacks 2.bias, 2.weight")):
        load_quantized(longer, tmp_path / "model")
    assert type(longer[0]) is nn.Linear


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 32))


def test_fused_experts_are_refused_aloud() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Experts())
    message = "would stay unquantised: 1.gate_up_proj (4, 16, 32)"
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_model(model, "nvfp4")
    assert type(model[0]) is nn.Linear
    quantize_model(model, "nvfp4", skip=("gate_up_proj", "router"))
    assert type(model[0]) is QuantizedLinear
    assert type(model[1].router) is nn.Linear


def test_shared_weights_and_wrong_names_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=re.escape("0.weight and 1.weight are one tensor")):
        quantize_model(model, "nvfp4")
    with pytest.raises(ValueError, match="skip: got 'q_proj', which no module is called"):
        quantize_model(nn.Sequential(nn.Linear(8, 8)), "nvfp4", skip=("q_proj",))
    with pytest.raises(ValueError, match="without a linear layer"):
        quantize_model(nn.LayerNorm(4), "nvfp4")


def test_a_quantised_model_compiles_whole_and_trains_what_is_before_it() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    quantize_model(model, "nvfp4", skip=("0",))
    x = torch.randn(4, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].weight.grad is not None
    assert all(p.grad is None for p in model[2].parameters() if not p.requires_grad)


def test_report_reads_well() -> None:
    report = quantize_model(nn.Sequential(nn.Linear(1024, 1024)), "nvfp4")
    assert re.fullmatch(
        r"1 linear layers to nvfp4: 4\.2 MB to 0\.6 MB, relative error at most 0\.1\d\d\d; "
        r"0 left as they are",
        str(report),
    )
