"""The launch plan of the norms: every row in one tile, the GPU filled once, partial sums few."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from stackwise.kernels.triton_ops.launch import ceil_div
from stackwise.kernels.triton_ops.norm_plan import MAX_WIDTH, backward_plan, forward_plan, too_wide

ROWS = (1, 3, 239, 4096, 100_000)
WIDTHS = (1, 63, 64, 768, 1000, 1024, 2048, 4096, 5120, 8192)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_one_forward_program_per_tile_and_no_row_cut(rows: int, width: int) -> None:
    plan = forward_plan(rows, width, 132)
    assert width <= plan.block < 2 * max(width, 16)
    assert plan.programs == ceil_div(rows, plan.tile_rows)
    assert 8 <= plan.block * plan.tile_rows / (32 * plan.num_warps) <= 32


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_backward_programs_run_at_once_and_share_tiles_evenly(rows: int, width: int) -> None:
    plan = backward_plan(rows, width, 2, 132, True)
    tiles = ceil_div(rows, plan.tile_rows)
    assert plan.programs * plan.num_warps <= 16 * 132
    each = ceil_div(tiles, plan.programs)
    assert (each - 1) * plan.programs < tiles <= each * plan.programs
    assert plan.block * plan.tile_rows / (32 * plan.num_warps) <= 16


def test_gpt2_training_step_fills_the_gpu_with_several_rows_per_program() -> None:
    forward = forward_plan(4096, 768, 132)
    assert (forward.tile_rows, forward.programs) == (4, 1024)
    backward = backward_plan(4096, 768, 2, 132, True)
    assert (backward.tile_rows, backward.num_warps, backward.programs) == (2, 8, 256)
    # Partial sums in float32, written and read, beside three bf16 tensors of activations.
    assert 2 * 4 * backward.programs < 0.1 * 3 * 2 * 4096


def test_without_weight_gradients_every_tile_has_its_program() -> None:
    assert backward_plan(100_000, 768, 2, 132, False).programs == 50_000


def test_half_precision_loads_narrow_rows_further_ahead() -> None:
    assert backward_plan(4096, 768, 2, 132, True).num_stages == 3
    assert backward_plan(4096, 768, 4, 132, True).num_stages == 2


def test_few_rows_get_small_tiles() -> None:
    assert forward_plan(100, 768, 132).programs == 100
    assert backward_plan(100, 768, 2, 132, True).programs == 100


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        forward_plan(1, 1, 1).block = 2  # type: ignore[misc]


def test_rows_that_no_block_holds_are_refused() -> None:
    assert too_wide(torch.empty(0, MAX_WIDTH), torch.empty(MAX_WIDTH)) is None
    assert "8193 columns; accepted: up to 8192" in str(too_wide(torch.empty(0, MAX_WIDTH + 1)))
