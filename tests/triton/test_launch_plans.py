"""Launch plans, pure functions of shape, element size and architecture: what they must satisfy."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from stackwise.kernels.triton_ops import bias_gelu, launch, reduction, rope, tiles

SIZES = (1, 63, 113, 239, 1000, 4096, 11008)
ROWS = (1, 7, 1000, 65536)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["gapless", "rows apart"])
def test_tiles_cover_the_rows_and_are_compiled_ones(dtype: torch.dtype, contiguous: bool) -> None:
    compiled = tiles.tile_configurations(dtype)
    for rows, columns in itertools.product(ROWS, SIZES):
        plan = tiles.plan_tiles(rows, columns, dtype.itemsize, contiguous)
        assert plan.rows * plan.columns == rows * columns
        assert plan.constants in compiled
        covered = plan.programs * plan.block_rows * plan.block_columns
        assert covered >= rows * columns
        assert plan.block_rows * plan.block_columns * dtype.itemsize == tiles.TILE_BYTES
        if contiguous:
            assert covered - rows * columns < plan.block_columns


def test_tiles_of_more_than_2_to_the_31_elements() -> None:
    plan = tiles.plan_tiles(1 << 20, 11008, 2, True)
    assert plan.columns == 11008 << 20
    assert plan.programs * plan.block_columns == plan.columns
    assert plan.programs < 1 << 31


@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_bias_gelu_ranges_cover_the_rows_and_fill_the_gpu_once(arch: int, itemsize: int) -> None:
    for rows, columns in itertools.product(ROWS, SIZES):
        plan = bias_gelu.plan_backward(rows, columns, itemsize, False, arch)
        assert plan.walk % plan.block_rows == 0
        assert plan.ranges * plan.walk >= rows > (plan.ranges - 1) * plan.walk
        most = launch.MULTIPROCESSORS[arch] * reduction.PROGRAMS_PER_MULTIPROCESSOR
        assert plan.ranges * plan.column_blocks <= max(most, plan.column_blocks)
    large = bias_gelu.plan_backward(65536, 4096, itemsize, False, arch)
    assert large.ranges * large.column_blocks > 0.8 * most


def test_bias_gelu_without_bias_has_one_tile_per_program() -> None:
    plan = bias_gelu.plan_backward(1000, 239, 2, True, 90)
    assert (plan.rows, plan.columns, plan.walk, plan.ranges) == (1, 239000, 1, 1)
    assert plan.column_blocks == 117


def test_rope_tiles() -> None:
    assert rope.plan_rope(32, 64, 0, 2) == rope.Plan(4, 8, 64, 0)
    assert rope.plan_rope(32, 64, 0, 4) == rope.Plan(2, 8, 64, 0)
    assert rope.plan_rope(12, 32, 0, 2) == rope.Plan(8, 8, 32, 0)
    assert rope.plan_rope(1, 32, 192, 2) == rope.Plan(32, 1, 32, 256)
    assert rope.plan_rope(9, 48, 0, 2).block_pairs == 64
    assert rope.plan_rope(128, 4096, 0, 2).block_tokens == 1
    # 12 and 3 heads: two blocks of eight for the queries, one for the keys.
    assert rope.plan_rope(12, 32, 0, 2).programs(100, 12, 3) == 13 * 3


def test_rows_are_views_where_one_exists() -> None:
    x = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    half = x.chunk(2, dim=-1)[1]
    assert launch.as_rows(half).data_ptr() == half.data_ptr()
    assert launch.as_rows(half).stride() == (8, 1)
    for copied in (x.transpose(0, 1), x.transpose(1, 2), x[..., ::2]):
        rows = launch.as_rows(copied)
        assert torch.equal(rows, copied.reshape(-1, copied.shape[-1]))
        assert rows.stride(1) == 1
    assert launch.as_rows(x[0, 0]).shape == (1, 8)
    assert launch.as_rows(x[:0]).shape == (0, 8)


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(n: int, power: int) -> None:
    assert launch.power_of_two(n) == power


def test_the_interpreter_counts_as_hopper() -> None:
    assert launch.architecture(torch.device("cpu")) == 90
