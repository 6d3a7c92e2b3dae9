"""Quantised weights as other libraries store them.

| layout | tensors beside each other | what it is |
|---|---|---|
| bitsandbytes | weight, weight.absmax, weight.quant_map, weight.quant_state.* (JSON) | nf4 |
| compressed-tensors-nvfp4 | weight_packed, weight_scale, weight_global_scale | nvfp4 |
| compressed-tensors-fp8 | weight, weight_scale | fp8_row, fp8_tensor |
| modelopt-nvfp4 | weight, weight_scale, weight_scale_2 | nvfp4 |
| gpt-oss | *_blocks, *_scales | mxfp4, of experts (E, N, K) too |
| deepseek | weight, weight_scale_inv | fp8_block |

Names are relative to the module that owns the weight. The packed bits are kept as they are (nibbles
swapped for bitsandbytes, which puts the even column into the high one); nothing is requantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .formats import FORMATS, NESTED_BLOCK, table
from .quantized_tensor import QuantizedTensor

Tensors = Mapping[str, Tensor]
_BNB_STATE = "weight.quant_state.bitsandbytes__nf4"
_E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Layout:
    """``required``: the names that tell it; ``optional``: others that belong to the weight."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    formats: tuple[str, ...]
    read: Callable[[Tensors, torch.dtype], QuantizedTensor]
    write: Callable[[QuantizedTensor], dict[str, Tensor]]


def read_layout(
    layout: str, tensors: Tensors, dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """The weight that ``tensors`` (names of the table above, without prefix) hold.

    ``dtype`` is what ``dequantize()`` returns by default; bitsandbytes stores its own.

    Raises ValueError for an unknown layout, missing tensors, wrong shapes or dtypes, or a variant
    that has no exact counterpart here (another block size, another table).
    """
    checks.choice("layout", layout, tuple(LAYOUTS))
    spec = LAYOUTS[layout]
    missing = [name for name in spec.required if name not in tensors]
    if missing:
        checks.fail("tensors", f"{sorted(tensors)} without {missing}", list(spec.required))
    return spec.read(tensors, dtype)


def write_layout(layout: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of ``weight``; ValueError where the layout cannot hold its format."""
    checks.choice("layout", layout, tuple(LAYOUTS))
    spec = LAYOUTS[layout]
    if weight.format not in spec.formats:
        checks.fail("weight", f"format {weight.format!r}", ", ".join(spec.formats))
    return spec.write(weight)


def find_layouts(names: list[str]) -> dict[str, str]:
    """``{prefix: layout}`` of the quantised weights among a checkpoint's tensor names.

    The prefix ends before the names of the table ("model.layers.0.mlp.up_proj."; for gpt-oss the
    name of the parameter, "...experts.gate_up_proj").
    """
    known, found = set(names), {}
    for layout, spec in LAYOUTS.items():
        first, *others = spec.required
        for name in names:
            prefix = name.removesuffix(first)
            if prefix == name or prefix in found:
                continue
            if first == "weight" and prefix and not prefix.endswith("."):
                continue
            if all(prefix + other in known for other in others):
                found[prefix] = layout
    return found


def _read_bitsandbytes(tensors: Tensors, dtype: torch.dtype) -> QuantizedTensor:
    state = json.loads(bytes(tensors[_BNB_STATE].tolist()))
    n, k = shape = tuple(state.get("shape", (0, 0)))
    block = FORMATS["nf4"].block
    if state.get("quant_type") != "nf4" or state.get("blocksize") != block or k % block:
        got = f"{state.get('quant_type')} {shape}, blocks of {state.get('blocksize')}"
        checks.fail("tensors", got, f"nf4, K a multiple of {block}, blocks of {block}")
    _check_table(tensors["weight.quant_map"], "nf4", "weight.quant_map")
    packed = _sized("weight", tensors["weight"], n * k // 2, torch.uint8).reshape(n, k // 2)
    data = packed << 4 | packed >> 4
    nested = "weight.nested_absmax" in tensors
    scale_dtype = torch.uint8 if nested else torch.float32
    scale = _sized("weight.absmax", tensors["weight.absmax"], n * k // block, scale_dtype)
    made = {"data": data, "scale": scale.reshape(n, k // block)}
    if nested:
        if state.get("nested_blocksize") != NESTED_BLOCK:
            got = f"nested blocks of {state.get('nested_blocksize')}"
            checks.fail("tensors", got, f"nested blocks of {NESTED_BLOCK}")
        _check_table(tensors["weight.nested_quant_map"], "dynamic", "weight.nested_quant_map")
        made["nested_scale"] = tensors["weight.nested_absmax"].float().reshape(-1)
        made["offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32).to(data.device)
    return _rebuilt("nf4", (n, k), getattr(torch, str(state.get("dtype")), dtype), made)


def _write_bitsandbytes(weight: QuantizedTensor) -> dict[str, Tensor]:
    n, k = weight.shape[-2:]
    block = FORMATS["nf4"].block
    if weight.dim() != 2 or k % block:
        checks.fail(
            "weight", f"shape {tuple(weight.shape)}", f"(N, K) with K a multiple of {block}"
        )
    state: dict[str, object] = {
        "quant_type": "nf4", "blocksize": block, "shape": [n, k],
        "dtype": str(weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    made = {
        "weight": (weight.data << 4 | weight.data >> 4).reshape(-1, 1),
        "weight.absmax": weight.scale.reshape(-1),
        "weight.quant_map": table("nf4", weight.device),
    }
    if weight.nested_scale is not None and weight.offset is not None:
        made["weight.nested_absmax"] = weight.nested_scale
        made["weight.nested_quant_map"] = table("dynamic", weight.device)
        offset = float(weight.offset[0])
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                  "nested_offset": offset}  # fmt: skip
    made[_BNB_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return made


def _read_compressed_nvfp4(tensors: Tensors, dtype: torch.dtype) -> QuantizedTensor:
    # This layout divides by its global scale, which is 2688 / amax.
    inverse = 1 / tensors["weight_global_scale"].float()
    return _nvfp4(tensors["weight_packed"], tensors["weight_scale"], inverse, dtype)


def _write_compressed_nvfp4(weight: QuantizedTensor) -> dict[str, Tensor]:
    data, scale, factor = _unpadded_nvfp4(weight)
    return {
        "weight_packed": data,
        "weight_scale": scale,
        "weight_global_scale": (1 / factor).reshape(1),
    }


def _read_modelopt(tensors: Tensors, dtype: torch.dtype) -> QuantizedTensor:
    factor = tensors["weight_scale_2"].float()
    return _nvfp4(tensors["weight"], tensors["weight_scale"], factor, dtype)


def _write_modelopt(weight: QuantizedTensor) -> dict[str, Tensor]:
    data, scale, factor = _unpadded_nvfp4(weight)
    return {"weight": data, "weight_scale": scale, "weight_scale_2": factor.reshape(())}


def _nvfp4(data: Tensor, scale: Tensor, factor: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    shape = (*data.shape[:-1], 2 * data.shape[-1])
    made = {"data": data, "scale": scale}
    made["global_scale"] = factor.reshape(*shape[:-2], 1, 1)
    return _rebuilt("nvfp4", shape, dtype, made)


def _unpadded_nvfp4(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    if weight.shape[-1] % FORMATS["nvfp4"].block or weight.dim() != 2:
        checks.fail("weight", f"shape {tuple(weight.shape)}", "(N, K) with K a multiple of 16")
    assert weight.global_scale is not None
    return weight.data, weight.scale, weight.global_scale


def _read_compressed_fp8(tensors: Tensors, dtype: torch.dtype) -> QuantizedTensor:
    data, scale = tensors["weight"], tensors["weight_scale"].float()
    whole = scale.numel() == 1
    scale = scale.reshape((1, 1) if whole else (data.shape[0], 1))
    made = {"data": data, "scale": scale}
    return _rebuilt("fp8_tensor" if whole else "fp8_row", tuple(data.shape), dtype, made)


def _write_compressed_fp8(weight: QuantizedTensor) -> dict[str, Tensor]:
    scale = weight.scale.reshape(1) if weight.format == "fp8_tensor" else weight.scale
    return {"weight": weight.data, "weight_scale": scale}


def _read_gpt_oss(tensors: Tensors, dtype: torch.dtype) -> QuantizedTensor:
    blocks, scales = tensors["_blocks"], tensors["_scales"]
    if blocks.dtype != torch.uint8 or blocks.dim() < 3 or blocks.shape[-1] != 16:
        checks.fail("_blocks", checks.describe(blocks), "uint8 (..., N, K / 32, 16)")
    *lead, count, width = blocks.shape
    made = {"data": blocks.reshape(*lead, count * width), "scale": scales.view(_E8M0)}
    return _rebuilt("mxfp4", (*lead, count * 32), dtype, made)


def _write_gpt_oss(weight: QuantizedTensor) -> dict[str, Tensor]:
    if weight.shape[-1] % 32:
        checks.fail("weight", f"shape {tuple(weight.shape)}", "(..., N, K) with K a multiple of 32")
    blocks = weight.data.reshape(*weight.scale.shape, 16)
    return {"_blocks": blocks, "_scales": weight.scale.view(torch.uint8)}


def _read_deepseek(tensors: Tensors, dtype: torch.dtype) -> QuantizedTensor:
    made = {"data": tensors["weight"], "scale": tensors["weight_scale_inv"].float()}
    return _rebuilt("fp8_block", tuple(tensors["weight"].shape), dtype, made)


def _write_deepseek(weight: QuantizedTensor) -> dict[str, Tensor]:
    return {"weight": weight.data, "weight_scale_inv": weight.scale}


def _rebuilt(
    format: str, shape: tuple[int, ...], dtype: torch.dtype, made: dict[str, Tensor]
) -> QuantizedTensor:
    name = str(dtype).removeprefix("torch.")
    metadata = {"format": format, "shape": shape, "dtype": name}
    return QuantizedTensor.from_tensors(made, metadata)


def _sized(name: str, tensor: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    if tensor.numel() != count or tensor.dtype != dtype:
        checks.fail(name, checks.describe(tensor), f"{dtype} of {count} elements")
    return tensor


def _check_table(got: Tensor, kind: str, name: str) -> None:
    expected = table(kind, got.device)
    if got.shape != expected.shape or not torch.allclose(got.float(), expected, atol=1e-6, rtol=0):
        checks.fail(name, "another table of values", f"the {len(expected)} values of {kind}")


LAYOUTS = {
    "bitsandbytes": Layout(
        ("weight", "weight.absmax", "weight.quant_map", _BNB_STATE),
        ("weight.nested_absmax", "weight.nested_quant_map"),
        ("nf4",),
        _read_bitsandbytes,
        _write_bitsandbytes,
    ),
    "compressed-tensors-nvfp4": Layout(
        ("weight_packed", "weight_scale", "weight_global_scale"),
        ("input_global_scale",),
        ("nvfp4",),
        _read_compressed_nvfp4,
        _write_compressed_nvfp4,
    ),
    "modelopt-nvfp4": Layout(
        ("weight", "weight_scale", "weight_scale_2"),
        ("input_scale",),
        ("nvfp4",),
        _read_modelopt,
        _write_modelopt,
    ),
    "deepseek": Layout(
        ("weight", "weight_scale_inv"), (), ("fp8_block",), _read_deepseek, _write_deepseek
    ),
    "gpt-oss": Layout(("_blocks", "_scales"), (), ("mxfp4",), _read_gpt_oss, _write_gpt_oss),
    "compressed-tensors-fp8": Layout(
        ("weight", "weight_scale"),
        ("input_scale",),
        ("fp8_row", "fp8_tensor"),
        _read_compressed_fp8,
        _write_compressed_fp8,
    ),
}
