"""The emulator finds what is wrong with a kernel: broken ones are reported, their twins run.

Each kernel of tests/csrc/broken is compiled twice, with its mistake and without. The report names
the kernel, the block, the thread and the place.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.emulator import build

BROKEN = Path(__file__).parent / "broken"
N = 64

# What the right twin computes of x = 1, 2, ..., 64, as an index into x or a value.
X = torch.arange(1.0, N + 1)
LANES = torch.arange(N)
COPY = X
REVERSED = X.flip(0)
HALVED = X[LANES // 2]
NEIGHBOURS = X[LANES ^ 1]
FIRST = torch.zeros(N).index_fill(0, torch.tensor([0]), float(X.sum()))
WARP_SUMS = torch.cat([X[:32].sum().expand(32), X[32:].sum().expand(32)])
PIPED = torch.cat([3 * X[:32].flip(0), torch.zeros(32)])

CASES = {
    "missing_barrier": (
        HALVED,
        r"thread 1 races on shared memory: it reads .* shared\+0x0",
    ),
    "tile_reused": (REVERSED, r"races on shared memory: it reads 4 bytes .* thread 63 wrote"),
    "shuffle_is_no_barrier": (NEIGHBOURS, r"races on shared memory: it reads .* thread \d+ wrote"),
    "unwritten_tile": (LANES.float(), r"thread 63 reads unwritten shared memory: .* shared\+0xfc"),
    "outside_shared_array": (COPY, r"thread 63 is out of bounds: elements 64 to 64 of an array"),
    "too_little_shared": (COPY, r"thread 32 is out of bounds: it writes .* asked for 128 bytes"),
    "shared_sum_without_atomic": (FIRST, r"races on shared memory"),
    "barrier_not_reached": (COPY, r"deadlock: .* 0-31 at the block barrier; 32-63 finished"),
    "divergent_barrier": (COPY, r"divergent barrier: it waits at \S+waiting.cuh:\d+, other"),
    "named_barrier_count": (
        COPY,
        r"deadlock: .* 0-31 at named barrier 3 \(32 of 64 arrived\); 32-63 finished",
    ),
    "shuffle_of_half_a_warp": (WARP_SUMS, r"deadlock: .* in shuffle_xor; 1 finished"),
    "divergent_shuffle": (NEIGHBOURS, r"divergent warp: shuffle_xor by 2, .* shuffle_xor by 1"),
    "wrong_parity": (
        PIPED,
        r"deadlock: .* 0-31 at the mbarrier at shared\+0x88 for parity 0 \(phase 0, 0 of 32",
    ),
    "parity_of_the_phase_before": (PIPED, r"unwritten shared memory|races on shared memory"),
    "late_initialisation": (PIPED, r"which thread 0 initialised without a barrier in between"),
    "read_out_of_bounds": (COPY, r"thread 63 is out of bounds: it reads .* x, 256 bytes .* 256\)"),
    "write_out_of_bounds": (COPY, r"thread 0 is out of bounds: it writes .* y, .* \(offset -4\)"),
    "write_to_input": (COPY, r"thread 0 writes 4 bytes of the read-only buffer x at offset 0"),
    "misaligned_vector": (COPY, r"thread 1 is misaligned: it reads .* no multiple of 16"),
    "write_race": (FIRST, r"races on global memory: it writes .* which thread 0 of block 0 wrote"),
    "block_reads_another": (COPY, r"block \(1, 0, 0\), thread 0 races on global memory: it reads"),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("broken", [BROKEN / "broken.cu"])))
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    library.sw_test_run.argtypes = [text, number, pointer, pointer, number]
    library.sw_test_error.restype = text
    library.sw_emu_register.argtypes = [pointer, ctypes.c_int64, number, text]
    return library


def run(library: ctypes.CDLL, name: str, broken: bool) -> tuple[str, Tensor]:
    """(the report, empty without a fault; y)"""
    # Aligned, with room on both sides that belongs to no buffer.
    storage = torch.zeros(8 * N)
    start = -storage.data_ptr() % 64 // 4
    x, y = storage[start + N : start + 2 * N], storage[start + 4 * N : start + 5 * N]
    x.copy_(X)
    library.sw_emu_register(x.data_ptr(), 4 * N, False, b"x")
    library.sw_emu_register(y.data_ptr(), 4 * N, True, b"y")
    code = library.sw_test_run(name.encode(), broken, x.data_ptr(), y.data_ptr(), N)
    library.sw_emu_clear()
    assert code in (0, 10001), f"{name}: error {code}"
    return library.sw_test_error(code).decode() if code else "", y


@pytest.mark.parametrize("name", CASES)
def test_a_broken_kernel_is_reported_and_its_twin_is_right(library: ctypes.CDLL, name: str) -> None:
    expected, report = CASES[name]
    fault, _ = run(library, name, broken=True)
    assert fault.startswith(f"{name}: block (")
    assert re.search(report, fault), fault
    fault, y = run(library, name, broken=False)
    assert fault == ""
    assert torch.equal(y, expected)


def test_a_launch_goes_on_after_one_that_was_abandoned(library: ctypes.CDLL) -> None:
    for _ in range(3):
        assert "deadlock" in run(library, "wrong_parity", broken=True)[0]
        assert run(library, "missing_barrier", broken=False)[0] == ""


def test_every_broken_kernel_has_a_case() -> None:
    text = "".join(path.read_text() for path in BROKEN.glob("*.cuh"))
    assert set(re.findall(r'kName = "(\w+)"', text)) == set(CASES)
