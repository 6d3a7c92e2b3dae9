"""The launch plan of the norms: whole rows in legal blocks, the GPU filled once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.emulator import build

ROWS = (1, 3, 239, 4096, 100_000, 1 << 33)
WIDTHS = (8, 64, 72, 768, 1000, 1024, 1536, 2048, 4096, 5120, 8192, 12288, 16384)
ODD_WIDTHS = (1, 3, 63, 1001, 4097, 8193, 20_001)
ANY = 0  # kAnyChunks: a loop over the row


@dataclass(frozen=True)
class Plan:
    chunk: int
    chunks_per_thread: int
    lanes: int
    teams: int
    blocks: int


Planner = Callable[..., Plan]


@pytest.fixture(scope="module")
def plans() -> tuple[Planner, Planner]:
    library = ctypes.CDLL(str(build("norm_plan", [Path(__file__).parent / "norm_plan.cu"])))
    numbers, out = [ctypes.c_int64, *[ctypes.c_int] * 3], ctypes.POINTER(ctypes.c_int64)
    library.sw_test_forward_plan.argtypes = [*numbers, out]
    library.sw_test_backward_plan.argtypes = [*numbers, ctypes.c_int, out]

    def planner(function: Callable[..., None]) -> Planner:
        def plan(*arguments: int) -> Plan:
            fields = (ctypes.c_int64 * 5)()
            function(*arguments, fields)
            return Plan(*fields)

        return plan

    return planner(library.sw_test_forward_plan), planner(library.sw_test_backward_plan)


def check_block(plan: Plan, rows: int, width: int, most_threads: int) -> None:
    """No row is cut, no block is illegal."""
    assert plan.lanes * plan.teams <= most_threads
    assert plan.lanes * plan.teams % 32 == 0
    within_a_warp = plan.lanes <= 32 and plan.lanes & (plan.lanes - 1) == 0
    assert within_a_warp or plan.lanes % 32 == 0
    if plan.chunks_per_thread != ANY:
        assert plan.lanes * plan.chunks_per_thread * plan.chunk >= width
    assert width % plan.chunk == 0


CASES = [
    *((width, item, True) for width in WIDTHS for item in (2, 4)),
    *((width, 2, False) for width in ODD_WIDTHS),
]


@pytest.mark.parametrize(("width", "item", "vector"), CASES)
def test_forward_gives_every_row_its_team(
    plans: tuple[Planner, Planner], width: int, item: int, vector: bool
) -> None:
    for rows in ROWS:
        plan = plans[0](rows, width, item, vector)
        bound = 1024 if item == 4 else 512
        check_block(plan, rows, width, bound)
        assert (plan.blocks - 1) * plan.teams < rows <= plan.blocks * plan.teams
        assert plan.teams == 1 or plan.lanes <= 32, "no named barriers in the forward pass"
        assert vector == (plan.chunks_per_thread != ANY)


@pytest.mark.parametrize(("width", "item", "vector"), CASES)
def test_backward_fills_the_gpu_once(
    plans: tuple[Planner, Planner], width: int, item: int, vector: bool
) -> None:
    for rows in ROWS:
        plan = plans[1](rows, width, item, vector, 132)
        check_block(plan, rows, width, 512)
        assert 1 <= plan.blocks <= 132
        assert plan.teams == 1 or plan.lanes <= 32 or plan.teams <= 15, "named barriers 1 to 15"
        turns = -(-rows // plan.teams)
        most = -(-turns // plan.blocks)
        assert (most - 1) * plan.blocks < turns, "no block has two turns more than another"
        if plan.chunks_per_thread != ANY:
            assert plan.chunks_per_thread * plan.chunk <= 16, "what the registers hold"


def test_gpt2_and_llama_training_steps(plans: tuple[Planner, Planner]) -> None:
    forward, backward = plans
    assert forward(4096, 768, 2, True) == Plan(8, 4, 32, 4, 1024)
    assert forward(4096, 4096, 2, True) == Plan(8, 4, 128, 1, 4096)
    gpt2 = backward(4096, 768, 2, True, 132)
    assert gpt2 == Plan(8, 2, 64, 8, 128)
    # Partial sums in float32, written and read, beside three bf16 tensors of activations.
    assert 2 * 4 * gpt2.blocks < 0.05 * 3 * 2 * 4096
    assert backward(4096, 4096, 2, True, 132) == Plan(8, 2, 256, 2, 128)
    assert backward(4096, 8192, 2, True, 132) == Plan(8, 2, 512, 1, 128)


def test_what_registers_cannot_hold_is_read_again(plans: tuple[Planner, Planner]) -> None:
    forward, backward = plans
    assert forward(9, 16384, 2, True).chunks_per_thread == 4
    assert forward(9, 16392, 2, True).chunks_per_thread == ANY
    assert backward(9, 8192, 2, True, 132).chunks_per_thread == 2
    assert backward(9, 8200, 2, True, 132).chunks_per_thread == ANY
    assert backward(9, 4096, 4, True, 132).chunks_per_thread == 2
    assert backward(9, 8192, 4, True, 132).chunks_per_thread == 4
    assert backward(9, 8196, 4, True, 132).chunks_per_thread == ANY
    assert backward(9, 4096, 2, False, 132).chunks_per_thread == 8
    assert backward(9, 4097, 2, False, 132).chunks_per_thread == ANY


def test_few_rows_are_spread_over_blocks(plans: tuple[Planner, Planner]) -> None:
    assert plans[1](100, 768, 2, True, 132).blocks == 100
    assert plans[1](1000, 768, 2, True, 132).teams == 7
