"""Launch plan and packed schedule of attention: pure functions, checked without Triton or a GPU."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from stackwise.kernels.triton_ops import attention_schedule
from stackwise.kernels.triton_ops.attention_launch import (
    Form,
    block,
    heads_per_section,
    not_covered,
    plan_attention,
    split_width,
)
from stackwise.kernels.triton_ops.launch import ARCHITECTURES


def test_head_dimensions_are_cut_into_powers_of_two() -> None:
    assert split_width(64) == (64, 0)
    assert split_width(192) == (128, 64)
    assert split_width(80) == (64, 16)
    assert split_width(96) == (64, 32)
    assert [block(w) for w in split_width(72)] == [64, 16]
    assert split_width(112) == (112, 0)
    assert split_width(224) == (224, 0)
    for width in range(16, 257):
        first, second = split_width(width)
        assert first + second == width
        columns = block(first) + block(second)
        assert width <= columns < 1.5 * max(width, 22), width


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("exact", [False, True])
def test_every_head_dimension_has_tiles(arch: int, exact: bool) -> None:
    for width, v_width in itertools.product(range(16, 257, 5), range(16, 257, 7)):
        form = Form(split_width(width), split_width(v_width), exact=exact)
        plan = plan_attention(form, arch)
        for tiles in (plan.forward, plan.keys, plan.queries, plan.values or plan.keys):
            sizes = (tiles.block_m, tiles.block_n)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            assert tiles.num_warps in (4, 8)


def test_hopper_tiles_are_wgmma_tiles() -> None:
    """64 rows of the left operand: queries, but keys where the scores are transposed."""
    for width in (64, 128, 192, 256):
        plan = plan_attention(Form(split_width(width), split_width(min(width, 128))), 90)
        assert plan.forward.block_m >= 64
        assert plan.queries.block_m >= 64
        assert plan.keys.block_n >= 64


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        plan_attention(Form((64, 0), (64, 0)), 90).values = None  # type: ignore[misc]


def test_heads_share_the_cache_only_where_the_order_matters() -> None:
    assert heads_per_section(32, 1 << 20, ordered=False) == 1
    assert heads_per_section(32, 1 << 20, ordered=True) == 25
    assert heads_per_section(8, 1 << 20, ordered=True) == 8
    assert heads_per_section(8, 1 << 30, ordered=True) == 1
    assert heads_per_section(8, 0, ordered=True) == 8


def test_what_is_refused() -> None:
    def q(width: int) -> Tensor:
        return torch.empty(1, 1, 1, width)

    assert not_covered(q(64), q(64), q(64), causal=True, key_bias=torch.empty(1, 1, 1)) is None
    assert "q has head dimension 15" in str(not_covered(q(15), q(15), q(64)))
    assert "v has head dimension 257" in str(not_covered(q(64), q(64), q(257)))
    assert "dense mask" in str(not_covered(q(64), q(64), q(64), mask=torch.ones(1)))
    assert "scale -0.5" in str(not_covered(q(64), q(64), q(64), scale=-0.5))


LENGTHS_Q = (5, 1, 0, 300, 64, 65, 0, 7)
LENGTHS_K = (9, 1, 4, 40, 128, 0, 0, 200)
UNUSED = 70


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make() -> attention_schedule.Documents:
    totals = (sum(LENGTHS_Q) + UNUSED, sum(LENGTHS_K) + UNUSED)
    return attention_schedule.documents(boundaries(LENGTHS_Q), boundaries(LENGTHS_K), *totals)


def seen(position: int, lq: int, lk: int, left: int, right: int) -> set[int]:
    place = position + lk - lq
    low = 0 if left < 0 else place - left
    high = lk - 1 if right < 0 else place + right
    return set(range(max(low, 0), min(high, lk - 1) + 1))


def tiles_of(queries: bool, group: int, size: int) -> dict[tuple[int, ...], int]:
    """{entry of the schedule: document}, by counting."""
    found = {}
    starts_q, starts_k = boundaries(LENGTHS_Q).tolist(), boundaries(LENGTHS_K).tolist()
    for i, (lq, lk) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        for tile in range(-(-(lq if queries else lk) * group // size)):
            found[starts_q[i], lq, starts_k[i], lk, tile] = i
    for tile in range(-(-UNUSED * group // size)):
        lengths = (UNUSED, 0) if queries else (0, UNUSED)
        found[starts_q[-1], lengths[0], starts_k[-1], lengths[1], tile] = -1
    return found


@pytest.mark.parametrize("limits", [(-1, -1), (-1, 0), (20, 10), (3, -1)], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("queries", [True, False])
def test_every_tile_once_and_the_long_ones_first(
    queries: bool, group: int, limits: tuple[int, int]
) -> None:
    size = 64
    if queries:
        schedule = make().queries(group, size, *limits)
    else:
        group = 1
        schedule = make().keys(size, *limits)
    assert schedule.dtype == torch.int32
    expected = tiles_of(queries, group, size)
    entries = [tuple(entry) for entry in schedule.tolist()]
    used = [e for e in entries if e[1 if queries else 3] > 0]
    assert sorted(used) == sorted(expected)
    assert entries[len(used) :] == [(0,) * 5] * (len(entries) - len(used))
    total = sum(LENGTHS_Q if queries else LENGTHS_K) + UNUSED
    assert len(entries) == total * group // size + len(LENGTHS_Q) + 2

    def work(entry: tuple[int, ...]) -> int:
        _, lq, _, lk, tile = entry
        length = lq if queries else lk
        positions = range(tile * size // group, min(-(-(tile + 1) * size // group), length))
        if queries:
            together: set[int] = set().union(*(seen(p, lq, lk, *limits) for p in positions))
            return len(together)
        rows = [p for p in range(lq) if seen(p, lq, lk, *limits) & set(positions)]
        return len(rows)

    amounts = [work(entry) for entry in used]
    assert amounts == sorted(amounts, reverse=True)


def test_schedules_are_remembered_until_the_boundaries_change() -> None:
    cu = boundaries((3, 4))
    first = attention_schedule.documents(cu, None, 7, 7)
    assert attention_schedule.documents(cu, cu, 7, 7) is first
    assert first.queries(1, 64, -1, 0) is first.queries(1, 64, -1, 0)
    cu[1] = 5
    changed = attention_schedule.documents(cu, None, 7, 7)
    assert changed is not first
    assert changed.lengths_q.tolist() == [0, 5, 2, 0]
    key = (id(cu), id(cu), 0)
    assert key in attention_schedule._known
    del cu
    assert key not in attention_schedule._known


def test_boundaries_that_lie_stay_inside() -> None:
    for wrong in ([0, 60], [0, 30, 10, 40], [5, 40], [-3, 50]):
        found = attention_schedule.documents(torch.tensor(wrong), None, 40, 40)
        assert (found.lengths_q >= 0).all()
        assert int(found.lengths_q.sum()) == 40
        assert (found.starts_q + found.lengths_q <= 40).all()
