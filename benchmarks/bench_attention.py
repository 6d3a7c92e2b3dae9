"""attention: dense (d64, d128, 192/128, causal and not) and packed documents, beside PyTorch's.

On a CPU bench_packed_attention has the packed documents.

eager is the composition with all scores in memory; sdpa is what PyTorch chooses by itself, for
packed documents with a dense mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks import harness
from benchmarks.attention_peers import dense_providers, packed_providers
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, Work, random, short, size
from benchmarks.providers import bind, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import attention

# (Dqk, Dv, H): 2048 columns of heads, as FlashAttention's tables have; B · L = TOKENS.
WIDTHS = ((64, 64, 32), (128, 128, 16), (192, 128, 16))
TOKENS, LENGTHS = 16384, (2048, 4096, 8192, 16384, 32768)
# (rows, length, H, Dqk, Dv); on a CPU GPT-2's and MLA's widths, fewer heads.
CPU_DENSE = ((1, 512, 8, 64, 64), (1, 2048, 8, 64, 64), (1, 512, 8, 192, 128))
MEAN_DOCUMENT = 128  # tokens
PACKED = (16384, 32768)
GATE_LENGTH, GATE_HEADS = 4096, 2  # the float64 reference holds every score


def cases(options: Options) -> Sequence[Case]:
    half, single = torch.bfloat16, torch.float32
    if options.quick:
        return [dense(1, 48, 2, 16, 16, half, True), packed(96, 2, 16, half, False)]
    if options.device.type == "cpu":
        shapes = [(*shape, dtype) for shape in CPU_DENSE for dtype in (half, single)]
        dense_cases = [dense(*shape, causal) for shape in shapes for causal in (False, True)]
        return [case for case in dense_cases if case.dtype == single or not case.options["causal"]]
    return [
        dense(max(1, TOKENS // length), length, heads, dqk, dv, half, causal)
        for dqk, dv, heads in WIDTHS
        for causal in (False, True)
        for length in LENGTHS
    ] + [packed(total, 12, 64, half, causal) for causal in (False, True) for total in PACKED]


def dense(
    batch: int, length: int, heads: int, dqk: int, dv: int, dtype: torch.dtype, causal: bool
) -> Case:
    def make(device: torch.device, b: int = batch, n: int = length, h: int = heads) -> Tensors:
        draw = random(length, device, dtype)
        return {"q": draw(b, n, h, dqk), "k": draw(b, n, h, dqk), "v": draw(b, n, h, dv)}

    pairs = length * (length + 1) // 2 if causal else length**2
    width = str(dqk) if dqk == dv else f"{dqk}/{dv}"
    return Case(
        series=f"{short(dtype)}, d{width}, {'causal' if causal else 'bidirectional'}",
        x=("L", "length", length),
        dtype=dtype,
        shape={"B": batch, "H": heads, "Dqk": dqk, "Dv": dv},
        make=make,
        wanted=("q", "k", "v"),
        work=attention_work(batch * heads * pairs, batch * length * heads, dqk, dv, dtype),
        options={"causal": causal},
        gate=lambda device: make(device, 1, min(length, GATE_LENGTH), min(heads, GATE_HEADS)),
    )


def packed(total: int, heads: int, width: int, dtype: torch.dtype, causal: bool) -> Case:
    """Documents of 1 to 2 · mean tokens; ``total`` tokens in all."""
    generator = torch.Generator().manual_seed(total)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = int(torch.randint(1, 2 * MEAN_DOCUMENT, (), generator=generator))
        lengths.append(min(left, drawn))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def make(device: torch.device, h: int = heads) -> Tensors:
        draw = random(total, device, dtype)
        tensors = {name: draw(total, h, width) for name in ("q", "k", "v")}
        return tensors | {"cu_seqlens_q": ends.to(device)}

    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    return Case(
        series=f"{short(dtype)}, d{width}, packed {'causal' if causal else 'bidirectional'}",
        x=("total", "packed tokens", total),
        dtype=dtype,
        shape={"H": heads, "D": width, "documents": len(lengths)},
        make=make,
        wanted=("q", "k", "v"),
        work=attention_work(heads * pairs, total * heads, width, width, dtype),
        options={"causal": causal},
        gate=lambda device: make(device, min(heads, GATE_HEADS)),
    )


def attention_work(pairs: int, rows: int, dqk: int, dv: int, dtype: torch.dtype) -> Work:
    """Two products forward; backward five: scores again, dv, dp, dq and dk."""
    moved = size(dtype, rows, 2 * dqk + 2 * dv)
    return Work(moved, 2 * moved, 2.0 * pairs * (dqk + dv), 2.0 * pairs * (3 * dqk + 2 * dv))


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    causal = bool(case.options["causal"])
    if "cu_seqlens_q" in tensors:
        yield from packed_providers(tensors, causal)
    else:
        yield from dense_providers(causal, tensors["q"].device)
    yield from stackwise_variants("attention", attention, tensors, case.options)


BENCH = Bench("attention", cases, bind(attention, impl="reference"), providers, slack=2.0)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
