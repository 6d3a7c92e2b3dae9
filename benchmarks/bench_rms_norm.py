"""rms_norm, with and without residual, beside torch, torch.compile, Liger and QuACK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import Bench, Case, Options, Provider, Tensors
from benchmarks.norm_cases import norm_cases
from benchmarks.providers import bind, compiled, peer, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import rms_norm

EPS = 1e-6


def eager(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    summed = x if residual is None else x + residual
    out = F.rms_norm(summed, summed.shape[-1:], weight, EPS)
    return out if residual is None else (out, summed)


def liger(module: Any) -> Any:
    def run(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return module.liger_rms_norm(x, weight, EPS)
        return module.liger_fused_add_rms_norm(x, residual, weight, EPS)

    return run


def quack(module: Any) -> Any:
    def run(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return module.rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=residual is not None)

    return run


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    device = tensors["x"].device
    yield Provider("eager", eager)
    yield compiled(eager)
    yield from stackwise_variants("rms_norm", rms_norm, tensors, {"eps": EPS})
    # Liger writes dx into dy.
    yield peer("liger", "liger_kernel.transformers.functional", liger, device, overwrites=True)
    yield peer("quack", "quack.rmsnorm", quack, device)


BENCH = Bench(
    name="rms_norm",
    cases=lambda options: norm_cases(options, ("weight",)),
    reference=bind(rms_norm, impl="reference", eps=EPS),
    providers=providers,
)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
