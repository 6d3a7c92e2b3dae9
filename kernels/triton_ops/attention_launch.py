"""Which tiles the attention kernels use: a pure function of shape, dtype and architecture.

No GPU has run these kernels yet: the tiles are the largest that compile without spills, with every
option of the kernels, and fit the shared memory of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .launch import power_of_two

LEAST_WIDTH, MAX_WIDTH = 16, 256
LEAST_BLOCK = 16

# Bytes of keys and values whose heads may be in flight together: half of an H100's L2 cache.
CACHED_BYTES = 25 << 20

# Rows per program of the kernel that computes Δ: their outputs fill the memory system.
DELTA_ROWS, DELTA_WARPS = 32, 4

# Per thread, what the instruction set can name.
MAX_REGISTERS = 255

# The largest distance to a window's edge; positions plus this stay below 2³¹.
MAX_DISTANCE = 1 << 30


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for: head dimensions in pieces, and the options in use."""

    width: tuple[int, int]  # queries and keys
    v_width: tuple[int, int]
    group: int = 1
    varlen: bool = False
    left: bool = False
    right: bool = False
    bias: bool = False
    cap: bool = False
    exact: bool = False  # float32 products

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "WIDTH_0": self.width[0],
            "WIDTH_1": self.width[1],
            "WIDTH_V0": self.v_width[0],
            "WIDTH_V1": self.v_width[1],
            "D0": block(self.width[0]),
            "D1": block(self.width[1]),
            "V0": block(self.v_width[0]),
            "V1": block(self.v_width[1]),
            "GROUP": self.group,
            "VARLEN": self.varlen,
            "HAS_LEFT": self.left,
            "HAS_RIGHT": self.right,
            "HAS_BIAS": self.bias,
            "HAS_CAP": self.cap,
            "PRECISION": "ieee" if self.exact else "tf32",
        }

    @property
    def columns(self) -> tuple[int, int]:
        """Columns of the tiles of q and k, and of v."""
        return sum(map(block, self.width)), sum(map(block, self.v_width))


@dataclass(frozen=True)
class Tiles:
    """``block_m`` query rows by ``block_n`` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    all_registers: bool = False

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @property
    def options(self) -> dict[str, int]:
        """Of the launch. Without ``all_registers`` the assembler may spill a few values in order to
        fit one more block on a multiprocessor, as it does with some of float32's small tiles."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": MAX_REGISTERS} if self.all_registers else {})


@dataclass(frozen=True)
class AttentionPlan:
    """``forward`` and ``queries`` (dq) walk the keys, ``keys`` (dk and dv) walks the queries.

    With ``values``, dv has a launch of its own: both accumulators do not fit the registers.
    """

    forward: Tiles
    keys: Tiles
    queries: Tiles
    values: Tiles | None = None


def split_width(width: int) -> tuple[int, int]:
    """``width`` as one piece, or, where that leaves fewer columns without use, as the power of two
    below it and the rest: 192 = 128 + 64, 80 = 64 + 16, but 112 is one piece in a tile of 128."""
    below = power_of_two(width) // 2
    split = width > LEAST_BLOCK and below + block(width - below) < block(width)
    return (below, width - below) if split else (width, 0)


def block(width: int) -> int:
    """Columns of the tile of a piece; 0 for none."""
    return max(LEAST_BLOCK, power_of_two(width)) if width else 0


_Row = tuple[int, int, AttentionPlan]
_Sizes = tuple[int, int, int, int] | tuple[int, int, int, int, bool]


def _row(
    width: int,
    v_width: int,
    forward: _Sizes,
    keys: _Sizes,
    queries: _Sizes,
    values: _Sizes | None = None,
) -> _Row:
    last = None if values is None else Tiles(*values)
    return width, v_width, AttentionPlan(Tiles(*forward), Tiles(*keys), Tiles(*queries), last)


# Columns of q and k, columns of v, plan: the first row that is wide enough for both. Narrower
# tiles than wgmma's serve mma.sync, whose operands pass through registers, within 99 KB, and the
# smallest ones float32, whose products are sums of single multiplications.
_WGMMA = (
    _row(64, 64, (128, 128, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    _row(128, 128, (128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    _row(192, 128, (128, 64, 8, 3), (32, 128, 8, 2), (128, 32, 8, 2), (64, 128, 8, 2)),
    _row(256, 256, (64, 32, 8, 2), (32, 128, 8, 2), (64, 16, 8, 2), (32, 128, 8, 2)),
)
# The accumulators of sm_100 lie in memory of their own, but pass through registers.
_TCGEN = (_row(64, 64, (128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)), *_WGMMA[1:])
_MMA = (
    _row(64, 64, (128, 64, 8, 3), (64, 64, 8, 2), (128, 64, 8, 2)),
    _row(128, 128, (128, 32, 8, 3), (32, 64, 8, 2), (64, 32, 4, 2)),
    _row(192, 128, (128, 32, 8, 2), (16, 64, 4, 2), (32, 32, 4, 2)),
    _row(256, 256, (64, 32, 8, 2), (16, 64, 8, 2), (32, 16, 8, 2), (16, 64, 8, 2)),
)
_MMA_89 = (
    _MMA[0],
    _row(128, 128, (128, 32, 8, 3), (16, 64, 8, 2), (64, 32, 4, 2)),
    _row(192, 128, (128, 32, 8, 2), (16, 32, 4, 2), (32, 16, 4, 2)),
    _MMA[3],
)
# The same instructions with more registers for addresses.
_MMA_120 = (
    _row(64, 64, (128, 32, 8, 3), (64, 64, 8, 2), (128, 64, 8, 2)),
    _row(128, 128, (128, 32, 8, 3), (16, 64, 8, 2), (32, 16, 8, 2), (16, 64, 8, 2)),
    _MMA[3],
)
_EXACT = (
    _row(64, 64, (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2, True)),
    _row(128, 128, (32, 32, 8, 2), (16, 32, 8, 2), (32, 16, 8, 2, True)),
    _row(192, 128, (16, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2, True), (16, 16, 8, 2)),
    _row(256, 256, (16, 16, 8, 2, True), (16, 32, 8, 2), (16, 16, 8, 2, True), (16, 32, 8, 2)),
)
# Where the assemblers of two architectures differ from the others'.
_EXACT_80 = (
    *_EXACT[:3],
    _row(
        192, 256, (16, 16, 8, 2, True), (16, 32, 8, 2, True), (16, 16, 8, 2, True), (16, 32, 8, 2)
    ),
    _EXACT[3],
)
_EXACT_89 = (
    *_EXACT[:2],
    _row(192, 128, (16, 32, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2, True), (16, 16, 8, 2)),
    _EXACT[3],
)
_HALF = {80: _MMA, 89: _MMA_89, 90: _WGMMA, 100: _TCGEN, 120: _MMA_120}


def plan_attention(form: Form, arch: int) -> AttentionPlan:
    """The plan of ``arch``, one of ``launch.ARCHITECTURES``."""
    width, v_width = form.columns
    exact = {80: _EXACT_80, 89: _EXACT_89}.get(arch, _EXACT)
    rows = exact if form.exact else _HALF[arch]
    return next(plan for most, v_most, plan in rows if width <= most and v_width <= v_most)


def heads_per_section(heads: int, head_bytes: int, ordered: bool) -> int:
    """Heads whose tiles are launched together: those whose keys and values fit the cache where the
    order of tiles matters, else one after the other."""
    return max(1, min(heads, CACHED_BYTES // max(1, head_bytes))) if ordered else 1


def not_covered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> str | None:
    """Why the kernels do not take a case of attention, or None."""
    for name, x in (("q", q), ("v", v)):
        if not LEAST_WIDTH <= x.shape[-1] <= MAX_WIDTH:
            return (
                f"{name} has head dimension {x.shape[-1]}; accepted: {LEAST_WIDTH} to {MAX_WIDTH}"
            )
    return _options_not_covered(**options)


def mla_not_covered(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    **options: Any,
) -> str | None:
    """Why the kernels do not take a case of mla_attention, or None."""
    width, v_width = (q_nope.shape[-1], q_rope.shape[-1]), w_uv.shape[0] // q_nope.shape[-2]
    if sum(map(block, width)) > MAX_WIDTH or v_width > MAX_WIDTH or 0 in (*width, v_width):
        return (
            f"head dimensions {width[0]} + {width[1]} and {v_width}; accepted: 1 to {MAX_WIDTH} "
            "for both, with each part rounded up to a power of two"
        )
    return _options_not_covered(**options)


def _options_not_covered(
    mask: Tensor | None = None, scale: float | None = None, **others: Any
) -> str | None:
    if mask is not None:
        return "a dense mask; accepted: causal, window, key_bias and cu_seqlens"
    if scale is not None and scale < 0:
        return f"scale {scale}; accepted: 0 or more"
    return None
