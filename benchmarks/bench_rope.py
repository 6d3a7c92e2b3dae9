"""rope of queries and keys (half-split, all dimensions) beside torch, torch.compile and peers.

eager is the function of Transformers' LLaMA, in our layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, Work, random, short, size
from benchmarks.providers import bind, compiled, peer, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import rope

# (B, L, Hq, Hk, D): LLaMA-135M, 1B and 8B; on a CPU the first, shorter.
SHAPES = ((8, 2048, 9, 3, 64), (8, 2048, 32, 8, 64), (4, 4096, 32, 8, 128))
CPU_SHAPES = ((2, 1024, 9, 3, 64),)


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None, :], sin[:, None, :]
    return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def liger(module: Any) -> Any:
    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        turned = module.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None])
        return tuple(x.transpose(1, 2) for x in turned)

    return run


def quack(module: Any) -> Any:
    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        half = cos.shape[-1] // 2
        return tuple(module.apply_rotary_emb(x, cos[:, :half], sin[:, :half]) for x in (q, k))

    return run


def cases(options: Options) -> Sequence[Case]:
    cpu = options.device.type == "cpu"
    shapes = ((1, 32, 3, 1, 16),) if options.quick else CPU_SHAPES if cpu else SHAPES
    dtypes = (torch.bfloat16, torch.float32) if cpu and not options.quick else (torch.bfloat16,)
    return [case(*shape, dtype) for dtype in dtypes for shape in shapes]


def case(batch: int, length: int, heads: int, kv: int, width: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Tensors:
        draw = random(heads, device, dtype)
        rates = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
        angles = torch.outer(torch.arange(length, device=device), rates).repeat(1, 2)
        return {
            "q": draw(batch, length, heads, width),
            "k": draw(batch, length, kv, width),
            "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype),
        }

    both = size(dtype, batch, length, heads + kv, width)
    return Case(
        series=short(dtype),
        x=("HD", "query heads · head dim", heads * width),
        dtype=dtype,
        shape={"B": batch, "L": length, "Hq": heads, "Hk": kv, "D": width},
        make=make,
        wanted=("q", "k"),
        # q and k are read and written once, their gradients too; the tables are small.
        work=Work(2 * both, 2 * both),
    )


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    device = tensors["q"].device
    yield Provider("eager", eager)
    yield compiled(eager)
    yield from stackwise_variants("rope", rope, tensors, {})
    # Liger turns q and k in place.
    yield peer("liger", "liger_kernel.transformers.functional", liger, device, overwrites=True)
    yield peer("quack", "quack.rotary", quack, device)


BENCH = Bench(
    name="rope",
    cases=cases,
    reference=bind(rope, impl="reference"),
    providers=providers,
)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
