"""geglu (tanh approximation, the form that Liger has) beside torch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import Bench, Case, Options, Provider, Tensors
from benchmarks.gated_cases import gated_cases
from benchmarks.providers import bind, compiled, peer, skip, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import geglu


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def liger(module: Any) -> Any:
    return lambda gate, up: module.liger_geglu(gate, up)


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    device = tensors["gate"].device
    yield Provider("eager", eager)
    yield compiled(eager)
    yield from stackwise_variants("geglu", geglu, tensors, case.options)
    # Liger writes the gradients into gate and up.
    yield peer("liger", "liger_kernel.transformers.functional", liger, device, overwrites=True)
    yield skip("quack", "has the product only inside its matrix products")


BENCH = Bench(
    name="geglu",
    cases=lambda options: gated_cases(options, {"approximate": "tanh"}),
    reference=bind(geglu, impl="reference"),
    providers=providers,
)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
