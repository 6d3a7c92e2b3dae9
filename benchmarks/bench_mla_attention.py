"""mla_attention at DeepSeek-V2's widths (192/128), beside the expansion followed by SDPA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.attention_peers import composed, sdpa
from benchmarks.bench_attention import GATE_HEADS, GATE_LENGTH
from benchmarks.cases import Bench, Case, Options, Provider, Tensors, Work, random, short, size
from benchmarks.providers import bind, stackwise_variants
from benchmarks.records import Row
from stackwise.kernels import mla_attention

NOPE, ROPE, VALUE = 128, 64, 128
# (B, L, H, r); on a CPU fewer heads and a narrower latent.
SHAPES = ((8, 2048, 16, 512), (4, 4096, 16, 512), (2, 8192, 16, 512))
CPU_SHAPES = ((1, 512, 4, 256),)


def cases(options: Options) -> Sequence[Case]:
    cpu = options.device.type == "cpu"
    shapes = ((1, 40, 2, 24),) if options.quick else CPU_SHAPES if cpu else SHAPES
    dtype = torch.float32 if cpu else torch.bfloat16
    return [case(*shape, dtype) for shape in shapes]


def case(batch: int, length: int, heads: int, latent: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device, b: int = batch, n: int = length, h: int = heads) -> Tensors:
        draw = random(length, device, dtype)
        return {
            "q_nope": draw(b, n, h, NOPE),
            "q_rope": draw(b, n, h, ROPE),
            "kv_latent": draw(b, n, latent),
            "k_rope": draw(b, n, ROPE),
            "w_uk": draw(h * NOPE, latent, scale=latent**-0.5),
            "w_uv": draw(h * VALUE, latent, scale=latent**-0.5),
        }

    tokens, pairs = batch * length, batch * heads * length * (length + 1) // 2
    expand = 2.0 * tokens * latent * heads * (NOPE + VALUE)
    width = NOPE + ROPE
    moved = size(dtype, tokens, heads * (width + VALUE) + latent + ROPE)
    return Case(
        series=f"{short(dtype)}, d{width}/{VALUE}, causal",
        x=("L", "length", length),
        dtype=dtype,
        shape={"B": batch, "H": heads, "r": latent},
        make=make,
        wanted=("q_nope", "q_rope", "kv_latent", "k_rope", "w_uk", "w_uv"),
        # The expansion of the latent, then attention's two products; twice and five backward.
        work=Work(
            moved,
            2 * moved,
            expand + 2.0 * pairs * (width + VALUE),
            2 * expand + 2.0 * pairs * (3 * width + 2 * VALUE),
        ),
        options={"causal": True},
        gate=lambda device: make(device, 1, min(length, GATE_LENGTH), min(heads, GATE_HEADS)),
    )


def expanded(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keys and values of every head in memory, then ``attend(q, k, v)``."""

    def run(
        q_nope: Tensor,
        q_rope: Tensor,
        kv_latent: Tensor,
        k_rope: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
    ) -> Tensor:
        heads = q_nope.shape[2]
        k_nope = F.linear(kv_latent, w_uk).unflatten(-1, (heads, -1))
        v = F.linear(kv_latent, w_uv).unflatten(-1, (heads, -1))
        shared = k_rope[:, :, None].expand(*k_nope.shape[:-1], -1)
        return attend(torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, shared], -1), v)

    return run


def providers(case: Case, tensors: Tensors) -> Iterator[Provider]:
    yield Provider("eager", expanded(functools.partial(composed, keep=None, causal=True)))
    yield Provider("sdpa", expanded(functools.partial(sdpa, mask=None, causal=True)))
    yield from stackwise_variants("mla_attention", mla_attention, tensors, case.options)


BENCH = Bench("mla_attention", cases, bind(mla_attention, impl="reference"), providers, slack=2.0)


def run(options: Options) -> Iterator[Row]:
    return harness.run(BENCH, options)
