"""linear_attention by length, and softmax attention on the same tensors beside it.

quadratic   the same weights as an L x L matrix
softmax     our ``attention``: another function, so a bench of its own, held to its own definition;
            its rows have ", softmax" in the series. Where the linear form is the faster one is read
            from the two.
fla         flash-linear-attention, causal, for the maps that it has; its normaliser is not fused
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.attention_peers import dense_providers
from benchmarks.bench_attention import attention_work
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, Work, random, short, size
from benchmarks.providers import bind, peer, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import attention, linear_attention, sample_features

HEADS, WIDTH, FEATURES = 12, 64, 128
CPU_HEADS, CPU_LENGTHS = 4, (1024, 2048, 4096, 8192)
LENGTHS = (2048, 4096, 8192, 16384, 32768)
LARGEST_MATRIX = 8192  # rows of the quadratic form that is still measured
GATE_LENGTH, GATE_HEADS = 2048, 2


def cases(options: Options) -> Sequence[Case]:
    if options.quick:
        return [case(96, 2, 16, "favor", torch.float32, causal) for causal in (False, True)]
    if options.device.type == "cpu":
        dtypes, lengths, heads = (torch.float32, torch.bfloat16), CPU_LENGTHS, CPU_HEADS
    else:
        dtypes, lengths, heads = (torch.bfloat16,), LENGTHS, HEADS
    return [
        case(length, heads, WIDTH, name, dtype, causal)
        for dtype in dtypes
        for name in ("favor", "elu")
        for causal in (False, True)
        for length in lengths
    ]


def case(length: int, heads: int, width: int, name: str, dtype: torch.dtype, causal: bool) -> Case:
    def make(device: torch.device, n: int = length, h: int = heads) -> Tensors:
        draw = random(length, device, dtype)
        tensors = {part: draw(1, n, h, width) for part in ("q", "k", "v")}
        if name == "favor":
            tensors["features"] = sample_features("gaussian", width, FEATURES).to(device)
        return tensors

    features = FEATURES if name == "favor" else width
    return Case(
        series=f"{short(dtype)}, {name}, {'causal' if causal else 'bidirectional'}",
        x=("L", "length", length),
        dtype=dtype,
        shape={"H": heads, "D": width, "m": features},
        make=make,
        wanted=("q", "k", "v"),
        work=linear_work(length * heads, width, features, name == "favor", dtype),
        options={"feature_map": name, "causal": causal},
        gate=lambda device: make(device, min(length, GATE_LENGTH), min(heads, GATE_HEADS)),
    )


def linear_work(rows: int, width: int, features: int, maps: bool, dtype: torch.dtype) -> Work:
    """The state and its use, and the products of the map where there are some; three times that
    backward, which computes the features again."""
    moved = size(dtype, rows, 4 * width)
    products = 4.0 * rows * features * (2 * width if maps else width)
    return Work(moved, 2 * moved, products, 3 * products)


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    if case.x[2] <= LARGEST_MATRIX:
        yield Provider("quadratic", bind(linear_attention, impl="reference", **case.options))
    if case.options["causal"] and case.options["feature_map"] == "elu":
        yield peer("fla", "fla.ops.linear_attn", _fla, tensors["q"].device)
    yield from stackwise_variants("linear_attention", linear_attention, tensors, case.options)


def _fla(module: Any) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        out, _ = module.chunk_linear_attn(q, k, v, scale=1.0, normalize=True)
        return out

    return run


def softmax_cases(options: Options) -> Sequence[Case]:
    """One per shape, whatever the map."""
    return [_as_softmax(c) for c in cases(options) if c.options["feature_map"] == "favor"]


def _as_softmax(linear: Case) -> Case:
    def only(make: Any) -> Any:
        return lambda device: {n: x for n, x in make(device).items() if n != "features"}

    rows, width = int(linear.x[2]) * linear.shape["H"], linear.shape["D"]
    causal = linear.options["causal"]
    pairs = rows * linear.x[2] / (2 if causal else 1)
    return replace(
        linear,
        series=linear.series.replace("favor", "softmax"),
        shape={n: x for n, x in linear.shape.items() if n != "m"},
        make=only(linear.make),
        gate=only(linear.gate),
        work=attention_work(int(pairs), rows, width, width, linear.dtype),
        options={"causal": causal},
    )


def softmax_providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    for other in dense_providers(bool(case.options["causal"]), tensors["q"].device):
        if other.name != "eager":
            yield other
    yield from stackwise_variants("attention", attention, tensors, case.options)


BENCH = Bench(
    "linear_attention", cases, bind(linear_attention, impl="reference"), providers, slack=3.0
)
SOFTMAX = Bench(
    "linear_attention", softmax_cases, bind(attention, impl="reference"), softmax_providers,
    slack=2.0,
)  # fmt: skip


def run(options: Options) -> Iterator[Row]:
    yield from harness.run(BENCH, options)
    yield from harness.run(SOFTMAX, options)
