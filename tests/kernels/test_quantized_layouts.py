"""Checkpoint layouts of other libraries: their formulas, round trips, and the libraries themselves
where they are installed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.kernels import quantize
from stackwise.kernels.quantized_layouts import LAYOUTS, find_layouts, read_layout, write_layout
from tests.kernels.scalar_formats import NF4

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6.0])
BNB_STATE = "weight.quant_state.bitsandbytes__nf4"


def fp4(shape: tuple[int, ...], k: int) -> tuple[Tensor, Tensor]:
    """Random packed e2m1 (..., K / 2) and its values (..., K): low nibble first."""
    packed = torch.randint(0, 256, (*shape, k // 2), dtype=torch.uint8)
    values = torch.stack((E2M1[packed.int() & 15], E2M1[packed.int() >> 4]), -1).flatten(-2)
    return packed, values


def e4m3(*shape: int) -> Tensor:
    return (torch.rand(shape) * 200 + 1).to(torch.float8_e4m3fn)


def nvfp4_compressed() -> tuple[dict[str, Tensor], Tensor]:
    packed, values = fp4((6,), 64)
    scale, factor = e4m3(6, 4), torch.tensor([900.0])
    weight = values * scale.float().repeat_interleave(16, 1) / factor
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": factor}, weight


def nvfp4_modelopt() -> tuple[dict[str, Tensor], Tensor]:
    packed, values = fp4((6,), 64)
    scale, factor = e4m3(6, 4), torch.tensor(0.002)
    weight = values * scale.float().repeat_interleave(16, 1) * factor
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": factor}, weight


def mxfp4_experts() -> tuple[dict[str, Tensor], Tensor]:
    packed, values = fp4((3, 5), 96)
    scales = torch.randint(120, 134, (3, 5, 3), dtype=torch.uint8)
    weight = values * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    return {"_blocks": packed.view(3, 5, 3, 16), "_scales": scales}, weight


def fp8_blocks() -> tuple[dict[str, Tensor], Tensor]:
    data, scale = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.1
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    return {"weight": data, "weight_scale_inv": scale}, data.float() * wide


def fp8_rows() -> tuple[dict[str, Tensor], Tensor]:
    data, scale = torch.randn(20, 30).to(torch.float8_e4m3fn), torch.rand(20, 1).bfloat16()
    return {"weight": data, "weight_scale": scale}, data.float() * scale.float()


def fp8_whole() -> tuple[dict[str, Tensor], Tensor]:
    data = torch.randn(20, 30).to(torch.float8_e4m3fn)
    return {"weight": data, "weight_scale": torch.tensor(0.25)}, data.float() * 0.25


def nf4() -> tuple[dict[str, Tensor], Tensor]:
    codes, absmax = torch.randint(0, 16, (4, 128)), torch.rand(8) + 0.1
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8).reshape(-1, 1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 128]}
    values = torch.tensor(NF4)[codes]
    return {
        "weight": packed,
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(NF4),
        BNB_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }, values * absmax.view(4, 2).repeat_interleave(64, 1)


EXAMPLES = {
    "compressed-tensors-nvfp4": nvfp4_compressed,
    "modelopt-nvfp4": nvfp4_modelopt,
    "gpt-oss": mxfp4_experts,
    "deepseek": fp8_blocks,
    "compressed-tensors-fp8": fp8_rows,
    "bitsandbytes": nf4,
}
CASES = [*EXAMPLES.items(), ("compressed-tensors-fp8", fp8_whole)]


def test_every_layout_has_an_example() -> None:
    assert set(EXAMPLES) == set(LAYOUTS)


@pytest.mark.parametrize(("layout", "example"), CASES)
def test_reads_by_the_formula_and_writes_the_same_bits(layout: str, example: Any) -> None:
    tensors, weight = example()
    q = read_layout(layout, tensors)
    torch.testing.assert_close(q.dequantize(torch.float32), weight, rtol=3e-7, atol=0)
    again = write_layout(layout, q)
    assert again.keys() == tensors.keys()
    for name, tensor in again.items():
        if name == BNB_STATE:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(tensors[name].tolist()))
        else:
            assert tensor.shape == tensors[name].shape or tensor.numel() == 1
            exact = 0.0 if name != "weight_global_scale" else 1e-6
            torch.testing.assert_close(
                tensor.float(), tensors[name].float().reshape(tensor.shape), rtol=exact, atol=0
            )


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_our_weights_survive_the_trip(layout: str) -> None:
    for format in LAYOUTS[layout].formats:
        for double in (False, True) if format == "nf4" else (False,):
            q = quantize(torch.randn(256, 192), format, double_quantization=double)
            again = read_layout(layout, write_layout(layout, q), torch.float32)
            rtol = 3e-7 if layout == "compressed-tensors-nvfp4" else 0
            torch.testing.assert_close(again.dequantize(), q.dequantize(), rtol=rtol, atol=0)


def test_finds_the_quantised_weights_of_a_checkpoint() -> None:
    names = ["model.embed.weight", "model.norm.weight", "model.experts.up_bias"]
    prefixes = {}
    for i, layout in enumerate(LAYOUTS):
        prefix = f"model.layers.{i}.gate_up_proj" + ("" if layout == "gpt-oss" else ".")
        prefixes[prefix] = layout
        names += [prefix + name for name in LAYOUTS[layout].required]
    assert find_layouts(names) == prefixes
    assert find_layouts(["a.weight", "b.weight_scale"]) == {}


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("modelopt-nvfp4", {"weight_scale": None}, "without ['weight_scale']"),
        ("modelopt-nvfp4", {"weight_scale": e4m3(6, 3)}, "scale: got float8_e4m3fn (6, 3)"),
        ("deepseek", {"weight_scale_inv": torch.ones(2, 2)}, "scale: got float32 (2, 2)"),
        ("deepseek", {"weight": torch.ones(200, 300)}, "data: got float32"),
        ("gpt-oss", {"_blocks": torch.ones(3, 5, 3, 8)}, "_blocks: got float32"),
        ("bitsandbytes", {"weight.quant_map": torch.linspace(-1, 1, 16)}, "weight.quant_map: got"),
        ("bitsandbytes", {"weight": torch.ones(7, 1).byte()}, "weight: got uint8 (7, 1)"),
        ("gptq", {}, "layout: got 'gptq'"),
    ],
)
def test_refuses_what_does_not_fit(layout: str, changes: dict[str, Any], message: str) -> None:
    tensors = EXAMPLES.get(layout, nf4)()[0] | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        read_layout(layout, tensors)


def test_refuses_another_block_size_of_bitsandbytes() -> None:
    tensors = nf4()[0]
    state = json.loads(bytes(tensors[BNB_STATE].tolist())) | {"blocksize": 128}
    tensors[BNB_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="blocks of 64"):
        read_layout("bitsandbytes", tensors)


def test_a_layout_refuses_another_format() -> None:
    with pytest.raises(ValueError, match="weight: got format 'nf4'; accepted: nvfp4"):
        write_layout("modelopt-nvfp4", quantize(torch.randn(16, 64), "nf4"))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_itself_agrees_bit_for_bit(nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(128, 256)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    stored = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    theirs = read_layout("bitsandbytes", {"weight": packed} | stored)
    ours = quantize(weight, "nf4", double_quantization=nested)
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, theirs.tensors()[name]), name
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(theirs.dequantize(torch.float32), expected)
