"""bias_gelu, GPT-2's feed-forward (tanh), beside torch and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, Work, random, short, size
from benchmarks.providers import bind, compiled, skip, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import bias_gelu

# (tokens, width): four times the widths of GPT-2 small, medium and XL; on a CPU the first.
SHAPES = ((16384, 3072), (16384, 4096), (16384, 6400))
CPU_SHAPES = ((2048, 3072),)


def eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def cases(options: Options) -> Sequence[Case]:
    cpu = options.device.type == "cpu"
    shapes = ((64, 96),) if options.quick else CPU_SHAPES if cpu else SHAPES
    dtypes = (torch.bfloat16, torch.float32) if cpu and not options.quick else (torch.bfloat16,)
    return [case(*shape, dtype) for dtype in dtypes for shape in shapes]


def case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Tensors:
        draw = random(width, device, dtype)
        return {"x": draw(tokens, width), "bias": draw(width, scale=0.2)}

    one = size(dtype, tokens, width)
    return Case(
        series=short(dtype),
        x=("D", "hidden width", width),
        dtype=dtype,
        shape={"tokens": tokens},
        make=make,
        wanted=("x", "bias"),
        # Forward reads x, writes y; backward reads dy and x, writes dx.
        work=Work(2 * one, 3 * one),
        options={"approximate": "tanh"},
    )


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    yield Provider("eager", eager)
    yield compiled(eager)
    yield from stackwise_variants("bias_gelu", bias_gelu, tensors, case.options)
    yield skip("liger", "has no such operation")
    yield skip("quack", "has no such operation")


BENCH = Bench(
    name="bias_gelu",
    cases=cases,
    reference=bind(bias_gelu, impl="reference"),
    providers=providers,
)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
