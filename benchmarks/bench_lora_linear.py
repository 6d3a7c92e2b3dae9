"""lora_linear over quantised weights beside bitsandbytes, and beside the same weight held in bf16
("eager", "torch.compile")."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, Work, random, short, size
from benchmarks.providers import compiled, skip, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import QuantizedTensor, lora_linear, quantize
from stackwise.kernels.quantized_layouts import write_layout

RANK, SCALING = 16, 2.0
# (rows, K, N): LLaMA-8B's up projection; on a CPU a square layer.
SHAPES = ((16, 4096, 14336), (256, 4096, 14336), (2048, 4096, 14336), (8192, 4096, 14336))
CPU_SHAPES = ((2048, 2048, 2048), (8192, 2048, 2048))
FORMATS = ("nvfp4", "nf4", "fp8_row")


@functools.lru_cache(maxsize=1)
def packed(n: int, k: int, format: str, device: torch.device) -> QuantizedTensor:
    return quantize(random(n, device, torch.bfloat16)(n, k, scale=k**-0.5), format)


def lora_cases(options: Options) -> Sequence[Case]:
    cpu = options.device.type == "cpu"
    shapes = ((32, 128, 96),) if options.quick else CPU_SHAPES if cpu else SHAPES
    return [lora_case(*shape, format) for format in FORMATS for shape in shapes]


def lora_case(m: int, k: int, n: int, format: str) -> Case:
    dtype = torch.bfloat16

    def make(device: torch.device) -> Tensors:
        draw = random(m, device, dtype)
        return {
            "x": draw(m, k),
            "lora_a": draw(RANK, k, scale=k**-0.5),
            "lora_b": draw(n, RANK, scale=RANK**-0.5),
        }

    flops = 2.0 * m * (n * k + RANK * (n + k))
    moved = size(dtype, m, k) + size(dtype, m, n) + n * k * 9 / 16
    return Case(
        series=f"{format} {short(dtype)}",
        x=("M", "rows of x", m),
        dtype=dtype,
        shape={"K": k, "N": n, "rank": RANK, "format": format},
        make=make,
        wanted=("x", "lora_a", "lora_b"),
        # Backward: dx as the forward product, and the adapter's four small products.
        work=Work(moved, moved, flops, flops + 4.0 * m * RANK * (n + k)),
    )


def eager_with(dense: Tensor) -> Any:
    def eager(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return F.linear(x, dense) + F.linear(F.linear(x, lora_a), lora_b) * SCALING

    return eager


def reference(x: Tensor, lora_a: Tensor, lora_b: Tensor, format: str) -> Tensor:
    weight = packed(lora_b.shape[0], x.shape[1], format, x.device)
    return lora_linear(x, weight, lora_a, lora_b, scaling=SCALING, impl="reference")


def bitsandbytes(weight: QuantizedTensor) -> Provider:
    """Its 4-bit product and a plain adapter, as PEFT composes them."""
    if weight.format != "nf4":
        return skip("bitsandbytes", f"has no {weight.format}")
    try:
        import bitsandbytes as bnb
        from bitsandbytes.functional import QuantState
    except Exception as error:  # an installation broken on this machine is skipped
        return skip("bitsandbytes", f"{type(error).__name__}: {error}")
    stored = write_layout("bitsandbytes", weight)
    codes = stored.pop("weight")
    state = QuantState.from_dict({n[7:]: t for n, t in stored.items()}, device=weight.device)

    def run(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        base = bnb.matmul_4bit(x, codes.t(), quant_state=state)
        return base + F.linear(F.linear(x, lora_a), lora_b) * SCALING

    return Provider("bitsandbytes", run, peer=True)


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    n, k, format = (case.shape[name] for name in ("N", "K", "format"))
    weight = packed(n, k, format, tensors["x"].device)
    eager = eager_with(weight.dequantize(case.dtype))
    yield Provider("eager", eager)
    yield compiled(eager)
    bound = functools.partial(lora_linear, weight=weight, scaling=SCALING)
    yield from stackwise_variants("lora_linear", bound, tensors | {"weight": weight}, {})  # type: ignore[dict-item]
    yield bitsandbytes(weight)


def bench(options: Options, format: str) -> Bench:
    return Bench(
        name="lora_linear",
        cases=lambda options: [c for c in lora_cases(options) if c.shape["format"] == format],
        reference=functools.partial(reference, format=format),
        providers=providers,
    )


def run(options: Options) -> Iterator[Row]:
    for format in FORMATS:
        for row in harness.run(bench(options, format), options):
            if format == FORMATS[0] or row.kernel_provider != "roofline":
                yield row
