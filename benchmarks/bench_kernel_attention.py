"""kernel_attention: exact gaussian and laplacian weights, normalised and not.

eager   the composition with all distances in memory
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.bench_attention import attention_work
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, random, short
from benchmarks.providers import bind, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import kernel_attention

HEADS, WIDTH, BANDWIDTH = 12, 64, 8.0
CPU_HEADS, CPU_LENGTHS = 4, (512, 2048)
LENGTHS = (2048, 4096, 8192, 16384)
FORMS = (("gaussian", True), ("gaussian", False), ("laplacian", True))
GATE_LENGTH, GATE_HEADS = 2048, 2
LARGEST_MATRIX = 8192


def cases(options: Options) -> Sequence[Case]:
    if options.quick:
        return [case(96, 2, 16, *form, torch.float32, True) for form in FORMS]
    if options.device.type == "cpu":
        dtypes, lengths, heads = (torch.float32, torch.bfloat16), CPU_LENGTHS, CPU_HEADS
    else:
        dtypes, lengths, heads = (torch.bfloat16,), LENGTHS, HEADS
    return [
        case(length, heads, WIDTH, *form, dtype, causal)
        for dtype in dtypes
        for form in FORMS
        for causal in (False, True)
        for length in lengths
    ]


def case(
    length: int, heads: int, width: int, kernel: str, normalize: bool, dtype: torch.dtype,
    causal: bool,
) -> Case:  # fmt: skip
    def make(device: torch.device, n: int = length, h: int = heads) -> Tensors:
        draw = random(length, device, dtype)
        return {part: draw(1, n, h, width) for part in ("q", "k", "v")}

    pairs = heads * (length * (length + 1) // 2 if causal else length**2)
    form = kernel if normalize else f"{kernel} unnormalised"
    return Case(
        series=f"{short(dtype)}, {form}, {'causal' if causal else 'bidirectional'}",
        x=("L", "length", length),
        dtype=dtype,
        shape={"H": heads, "D": width},
        make=make,
        wanted=("q", "k", "v"),
        work=attention_work(pairs, length * heads, width, width, dtype),
        options={
            "kernel": kernel,
            "normalize": normalize,
            "bandwidth": BANDWIDTH,
            "causal": causal,
        },
        gate=lambda device: make(device, min(length, GATE_LENGTH), min(heads, GATE_HEADS)),
    )


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    if case.x[2] <= LARGEST_MATRIX:
        yield Provider("eager", bind(composed, **case.options))
    yield from stackwise_variants("kernel_attention", kernel_attention, tensors, case.options)


def composed(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: str, normalize: bool, bandwidth: float, causal: bool
) -> Any:
    """Weights from torch.cdist's distances, all of them in memory."""
    distance = torch.cdist(*(x.transpose(1, 2).float() for x in (q, k)))
    exponent = -distance / bandwidth
    if kernel == "gaussian":
        exponent = -distance.square() / (2 * bandwidth**2)
    if causal:
        hidden = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        exponent = exponent.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(exponent, -1) if normalize else exponent.exp()
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


BENCH = Bench(
    "kernel_attention", cases, bind(kernel_attention, impl="reference"), providers, slack=2.0
)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
