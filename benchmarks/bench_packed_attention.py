"""packed_attention: rows of packed documents, bidirectional, beside SDPA without ``cu_seqlens``.

sdpa-bool-mask, sdpa-float-mask   one call with a (B, 1, L, L) mask, built ahead of the clock
sdpa-per-document                 one call for each document
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.attention_peers import sdpa
from benchmarks.bench_attention import attention_work
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, random, short
from benchmarks.providers import bind, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import attention

MEANS = (128, 512)  # tokens in a document, on average
ROWS, LENGTH, HEADS, WIDTH = 2, 2048, 8, 64
GPU_ROWS, GPU_HEADS = 16, 12


def cases(options: Options) -> Sequence[Case]:
    if options.quick:
        return [case(2, 96, 12, 2, 16, torch.float32)]
    if options.device.type == "cuda":
        return [case(GPU_ROWS, LENGTH, mean, GPU_HEADS, WIDTH, torch.bfloat16) for mean in MEANS]
    dtypes = (torch.float32, torch.bfloat16)
    return [case(ROWS, LENGTH, mean, HEADS, WIDTH, dtype) for dtype in dtypes for mean in MEANS]


def case(rows: int, length: int, mean: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    """Documents of 1 to 2 · mean - 1 tokens, cut off at the end of each row."""
    generator = torch.Generator().manual_seed(mean)
    lengths: list[int] = []
    for _ in range(rows):
        left = length
        while left:
            drawn = int(torch.randint(1, 2 * mean, (), generator=generator))
            lengths.append(min(left, drawn))
            left -= lengths[-1]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = rows * length

    def make(device: torch.device) -> Tensors:
        draw = random(mean, device, dtype)
        tensors = {name: draw(total, heads, width) for name in ("q", "k", "v")}
        return tensors | {"cu_seqlens_q": ends.to(device)}

    pairs = heads * sum(n * n for n in lengths)
    return Case(
        series=f"{short(dtype)}, d{width}, rows of {length}",
        x=("mean", "tokens per document", mean),
        dtype=dtype,
        shape={"B": rows, "L": length, "H": heads, "D": width, "documents": len(lengths)},
        make=make,
        wanted=("q", "k", "v"),
        work=attention_work(pairs, total * heads, width, width, dtype),
    )


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    length, ends = case.shape["L"], tensors["cu_seqlens_q"]
    total, device = tensors["q"].shape[0], ends.device
    document = torch.repeat_interleave(
        torch.arange(len(ends) - 1, device=device), ends.diff(), output_size=total
    ).view(-1, 1, length)
    mask = document[..., :, None] == document[..., None, :]
    added = torch.zeros(mask.shape, dtype=case.dtype, device=device).masked_fill(~mask, -torch.inf)
    yield Provider("sdpa-bool-mask", _in_rows(length, mask))
    yield Provider("sdpa-float-mask", _in_rows(length, added))
    yield Provider("sdpa-per-document", _one_by_one(ends.tolist()))
    yield from stackwise_variants("attention", attention, tensors, case.options)


def _in_rows(length: int, mask: Tensor) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, length)) for x in (q, k, v))
        return sdpa(q, k, v, mask=mask, causal=False).flatten(0, 1)

    return run


def _one_by_one(ends: list[int]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor) -> Tensor:
        parts = [
            sdpa(q[None, a:b], k[None, a:b], v[None, a:b], mask=None, causal=False)[0]
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts)

    return run


BENCH = Bench("packed_attention", cases, bind(attention, impl="reference"), providers, slack=2.0)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
