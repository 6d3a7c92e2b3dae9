"""layer_norm, with and without residual, beside torch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import Bench, Case, Options, Provider, Tensors
from benchmarks.norm_cases import norm_cases
from benchmarks.providers import bind, compiled, peer, skip, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import layer_norm

EPS = 1e-5


def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
    summed = x if residual is None else x + residual
    out = F.layer_norm(summed, summed.shape[-1:], weight, bias, EPS)
    return out if residual is None else (out, summed)


def liger(module: Any) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
        summed = x if residual is None else x + residual
        out = module.liger_layer_norm(summed, weight, bias, EPS)
        return out if residual is None else (out, summed)

    return run


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    device = tensors["x"].device
    yield Provider("eager", eager)
    yield compiled(eager)
    yield from stackwise_variants("layer_norm", layer_norm, tensors, {"eps": EPS})
    yield peer("liger", "liger_kernel.transformers.functional", liger, device)
    yield skip("quack", "its layer norm is not connected to autograd")


BENCH = Bench(
    name="layer_norm",
    cases=lambda options: norm_cases(options, ("weight", "bias")),
    reference=bind(layer_norm, impl="reference", eps=EPS),
    providers=providers,
)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
