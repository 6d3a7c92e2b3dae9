"""The launch plan of linear_cross_entropy, and the memory it counts against what is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from stackwise.kernels.triton_ops import linear_cross_entropy as operation
from stackwise.kernels.triton_ops import linear_cross_entropy_passes as passes
from stackwise.kernels.triton_ops import linear_cross_entropy_plan as plans
from stackwise.kernels.triton_ops import machine_code, reduction
from stackwise.kernels.triton_ops.launch import ARCHITECTURES, ceil_div
from stackwise.kernels.triton_ops.linear_cross_entropy_plan import plan_passes, plan_walk

ROWS = (1, 63, 512, 513, 1228, 8192, 65536)
CLASSES = (1, 63, 1000, 32000, 50257, 128256, 256000)

# The shape that the memory is judged at: (rows, classes, width) of an 8B model's head.
HEAD = (8192, 131072, 4096)
LOGITS = 2 * HEAD[0] * HEAD[1]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", ROWS)
def test_chunks_and_tiles_cover_the_logits(rows: int, classes: int) -> None:
    for itemsize, width in ((2, 768), (2, 4096), (4, 768)):
        plan = plan_passes(rows, classes, width, itemsize, itemsize, 90)
        assert (plan.chunks - 1) * plan.chunk_rows < rows <= plan.chunks * plan.chunk_rows
        covered = [c for tile in plan.tiles for c in (tile.start, tile.stop)]
        assert covered[0] == 0
        assert covered[-1] == classes
        assert covered[1:-1:2] == covered[2:-1:2]
        assert plan.chunk_stride >= classes
        assert plan.tile_stride >= plan.tile_classes
        # 16-byte aligned rows, whatever the number of classes.
        assert plan.chunk_stride * itemsize % 16 == plan.tile_stride * itemsize % 16 == 0
        assert plan.segments * plan.segment >= classes


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", ROWS)
def test_several_chunks_are_large_and_tiles_half_of_one(rows: int, classes: int) -> None:
    plan = plan_passes(rows, classes, 4096, 2, 2, 90)
    if plan.chunks == 1:
        assert (plan.tiles, plan.products) == ([slice(0, classes)], 3.0)
        return
    assert plan.chunk_rows % plans.ROW_STEP == 0
    assert plan.chunk_rows > plans.MIN_CHUNK // 2
    assert rows - (plan.chunks - 1) * plan.chunk_rows > 0
    assert plan.tile_elements <= max(plan.chunk_elements / 2, rows * plans.CLASS_STEP)
    assert all(tile.start % plans.CLASS_STEP == 0 for tile in plan.tiles)


@pytest.mark.parametrize(("itemsize", "weight_itemsize"), [(2, 2), (2, 4), (4, 4)])
def test_stored_rows_fit_the_weight_gradient(itemsize: int, weight_itemsize: int) -> None:
    for width in (63, 768, 4096):
        plan = plan_passes(8192, 50257, width, itemsize, weight_itemsize, 90)
        for tile in plan.tiles:
            classes = tile.stop - tile.start
            assert plan.stored_rows * classes * itemsize <= classes * width * weight_itemsize
        assert plan.stored_rows == min(8192, width * weight_itemsize // itemsize)


def test_products_of_an_8b_head() -> None:
    """Half of the rows fit the weight's gradient; with half of them masked, all do."""
    assert plan_passes(*HEAD, 2, 2, 90).products == 3.5
    assert plan_passes(4096, *HEAD[1:], 2, 2, 90).products == 3.0
    # float32 parameters under autocast: twice the room.
    assert plan_passes(*HEAD, 2, 4, 90).products == 3.0
    assert plan_passes(*HEAD, 2, 0, 90).products == 4.0


def test_few_output_tiles_are_summed_in_float32_to_the_end() -> None:
    assert not plan_passes(*HEAD, 2, 2, 90).wide_product
    assert plan_passes(8192, 1000, 64, 2, 2, 90).wide_product
    assert not plan_passes(8192, 1000, 64, 4, 4, 90).wide_product


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bias_grad", [False, True])
def test_walks_cover_the_tile(arch: int, bias_grad: bool) -> None:
    for rows in (1, 37, 512, 8192):
        for columns in (1, 63, 1000, 4096, 131072):
            walk = plan_walk(rows, columns, bias_grad, arch)
            assert walk.block_rows * walk.block_columns == plans.WALK_ELEMENTS
            assert walk.walk % walk.block_rows == 0
            assert walk.ranges * walk.walk >= rows > (walk.ranges - 1) * walk.walk
            assert walk.programs == walk.ranges * ceil_div(columns, walk.block_columns)
            assert walk.programs < 1 << 31
    # The partial sums of a chunk's bias gradient: a few percent of its logits.
    assert 4 * plan_walk(512, 131072, True, arch).ranges <= 0.05 * 512 * 2


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        plan_passes(1, 1, 1, 2, 2, 90).rows = 2  # type: ignore[misc]


@pytest.mark.parametrize("selected", [False, True], ids=["all rows", "selected rows"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])
def test_a_tenth_of_the_logits_is_never_needed(
    selected: bool, bias: bool, in_forward: bool
) -> None:
    plan = plan_passes(*HEAD, 2, 2 if in_forward else 0, 90)
    needs = (True, True, bias)
    count = plans.temporary_bytes(plan, 2, needs, selected=selected, in_forward=in_forward)
    assert count <= 0.08 * LOGITS
    frozen = plans.temporary_bytes(plan, 2, (True, False, False), selected=selected)
    assert frozen <= 0.08 * LOGITS


class Silent:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture
def _nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_segment_statistics", "_row_losses", "_logits_gradient"):
        monkeypatch.setattr(passes, f"{name}_kernel", Silent())
    monkeypatch.setattr(reduction, "_column_sum_kernel", Silent())
    monkeypatch.setattr(passes, "_copy", lambda out, x: None)
    monkeypatch.setattr(passes, "_multiply", lambda a, b, out: None)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)


def peak_bytes(function: Callable[[], tuple[Tensor, ...]]) -> int:
    """The most bytes that were allocated at a time, beside those of the results."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = function()
    assert profile.kineto_results is not None
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most - sum(t.numel() * t.element_size() for t in results)


@pytest.mark.usefixtures("_nothing_is_computed")
@pytest.mark.parametrize("shape", [HEAD, (1228, 32000, 2048), (2000, 50257, 768), (37, 101, 24)])
@pytest.mark.parametrize("selected", [False, True], ids=["all rows", "selected rows"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, True, False), (True, False, False)])
def test_the_count_is_what_is_allocated(
    shape: tuple[int, int, int], selected: bool, needs: plans.Needs
) -> None:
    rows, classes, width = shape
    x = torch.empty(rows, width, dtype=torch.bfloat16)
    weight = torch.empty(classes, width, dtype=torch.bfloat16)
    bias = torch.empty(classes, dtype=torch.bfloat16) if needs[2] else None
    tensors = (x, weight, torch.zeros(rows, dtype=torch.int64), bias, None)
    chosen = torch.arange(rows) if selected else None
    call: tuple[Any, ...] = (*tensors, chosen, -100, 0.0, 0.0, None)

    def forward(in_forward: bool) -> int:
        options = (True, in_forward, *needs, torch.bfloat16)
        # Losses and statistics are results of the operation, not of the function.
        return peak_bytes(lambda: operation._forward(*call, *options)[2:])

    def backward() -> int:
        stats, upstream = torch.empty(2, rows), torch.empty(rows)
        arguments = (*call[:6], stats, upstream, *call[6:], *needs[1:], torch.bfloat16)
        return peak_bytes(lambda: operation._backward(*arguments)) + stats.nbytes + upstream.nbytes

    together = plan_passes(*shape, 2, 2 if needs[1] else 0, 90)
    count = plans.temporary_bytes(together, 2, needs, selected=selected)
    assert 0.97 * count - 256 <= forward(True) <= 1.001 * count + 256
    if needs[1]:
        apart = plan_passes(*shape, 2, 0, 90)
        count = plans.temporary_bytes(apart, 2, needs, selected=selected, in_forward=False)
        assert 0.97 * count - 256 <= max(forward(False), backward()) <= 1.001 * count + 256


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_machine_code_of_the_passes_over_logits(arch: int) -> None:
    """No spills, 16-byte vectors, and registers for eight programs at a time."""
    plain = [
        case
        for case in operation.machine_code_cases(arch)
        if case.name.count("bf16") == 2
        and "HAS_SOFTCAP=False" in case.name
        and ("BLOCK_C=4096" in case.name or "BLOCK_C=1024" in case.name)
    ]
    assert len(plain) == 2
    for case in plain:
        report = machine_code.inspect(case)
        assert not machine_code.faults(report)
        assert report.registers * 32 * case.num_warps * 8 <= 65536, report
