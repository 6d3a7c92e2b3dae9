"""linear_cross_entropy (mean, no bias) beside full logits, torch's own, Liger, CCE and QuACK.

Several compute gradients during the forward pass, ours among them: compare the full mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, Work, random, short, size
from benchmarks.providers import bind, compiled, peer, skip, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import linear_cross_entropy

# (N, H, V): GPT-2's head, LLaMA-2's and LLaMA-3's; on a CPU fewer rows.
SHAPES = ((8192, 768, 50304), (8192, 4096, 32000), (8192, 4096, 128256))
CPU_SHAPES = ((512, 512, 8192), (512, 512, 32000))
GATE_ROWS = 1024  # float64 logits of all rows would not fit beside the rest


def eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight).float(), target)


def torch_own(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(input, linear_weight, target, options=options)


def liger(module: Any) -> Any:
    # float32 accumulation of dW, as every other provider here has it.
    return lambda input, linear_weight, target: module.liger_fused_linear_cross_entropy(
        input, linear_weight, target, accum_dtype=torch.float32
    )


def cce(filter_eps: str | None) -> Any:
    return lambda module: (
        lambda input, linear_weight, target: module.linear_cross_entropy(
            input, linear_weight, target, filter_eps=filter_eps
        )
    )


def quack(module: Any) -> Any:
    return lambda input, linear_weight, target: module.chunked_linear_cross_entropy(
        input, linear_weight, target
    )


def cases(options: Options) -> Sequence[Case]:
    cpu = options.device.type == "cpu"
    shapes = ((64, 32, 211),) if options.quick else CPU_SHAPES if cpu else SHAPES
    dtypes = (torch.bfloat16, torch.float32) if cpu and not options.quick else (torch.bfloat16,)
    return [case(*shape, dtype) for dtype in dtypes for shape in shapes]


def case(rows: int, width: int, classes: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device, n: int = rows) -> Tensors:
        draw = random(classes, device, dtype)
        generator = torch.Generator(device).manual_seed(n)
        return {
            "input": draw(n, width),
            "linear_weight": draw(classes, width, scale=2 / width**0.5),
            "target": torch.randint(0, classes, (n,), generator=generator, device=device),
        }

    product = 2.0 * rows * width * classes
    once = size(dtype, rows, width) + size(dtype, classes, width)
    return Case(
        series=short(dtype),
        x=("V", "vocabulary", classes),
        dtype=dtype,
        shape={"rows": rows, "H": width},
        make=make,
        wanted=("input", "linear_weight"),
        # One product forward, two backward; x and W are read, dx and dW written.
        work=Work(once, 2 * once, product, 2 * product),
        gate=lambda device: make(device, min(rows, GATE_ROWS)),
    )


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    device, op = tensors["input"].device, linear_cross_entropy
    yield Provider("eager", eager)
    yield compiled(eager)
    yield from stackwise_variants("linear_cross_entropy", op, tensors, {})
    if hasattr(nn, "LinearCrossEntropyOptions"):
        yield Provider("F.linear_cross_entropy", torch_own)
    else:
        yield skip("F.linear_cross_entropy", f"torch {torch.__version__}; exists from 2.13")
    yield peer("liger", "liger_kernel.transformers.functional", liger, device)
    yield peer("cce", "cut_cross_entropy", cce("high"), device)
    yield peer("cce-exact", "cut_cross_entropy", cce(None), device)
    yield peer("quack", "quack.linear_cross_entropy", quack, device)


BENCH = Bench(
    name="linear_cross_entropy",
    cases=cases,
    reference=bind(linear_cross_entropy, impl="reference"),
    providers=providers,
)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
