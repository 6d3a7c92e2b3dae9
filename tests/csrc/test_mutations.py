"""The real kernels of the norms with one barrier taken away or moved: the emulator reports each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stackwise.kernels import _cuda
from stackwise.kernels.cuda_ops import norms
from tests.csrc.compare import draw
from tests.csrc.emulator import CSRC, Emulator, build

# name: (file, what stands there, what takes its place, the report)
MUTATIONS = {
    "one_slot_for_every_row": (
        "norm_backward.cuh",
        *("base += step, turn ^= 1", "base += step"),
        r"norm_backward: .* races on shared memory: it writes .* read without a barrier",
    ),
    "teams_combined_without_a_barrier": (
        "norm_backward.cuh",
        *("if (u > 0) block_barrier();", ""),
        r"norm_backward: .* races on shared memory: it reads .* wrote without a barrier",
    ),
    "one_named_barrier_for_all_teams": (
        "teams.cuh",
        *("named_barrier(1 + team.index, team.lanes);", "named_barrier(1, team.lanes);"),
        r"norm_backward: .* (races on|reads unwritten) shared memory",
    ),
    "column_sums_read_early": (
        "norm_backward.cuh",
        *("    block_barrier();\n    if (r > 0", "    if (r > 0"),
        r"column_sum: .* reads unwritten shared memory",
    ),
    "columns_beyond_the_row_stored": (
        "norm_backward.cuh",
        *("if (column >= p.width) break;", ""),
        r"norm_backward: .* races on global memory: it writes 16 bytes of ds",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_kernel_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, right, wrong, report = MUTATIONS[name]
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    text = (csrc / file).read_text()
    assert text.count(right) == 1
    (csrc / file).write_text(text.replace(right, wrong))
    sources = [csrc / "library.cu", csrc / "norm_forward.cu", csrc / "norm_backward.cu"]
    Emulator(build("mutated", sources, csrc)).install(monkeypatch)
    # Several teams of two warps, several rows for each, and a lane beyond the row.
    tensors = (draw(40, 768).bfloat16(), draw(768), draw(768))
    x, weight, bias = (t.requires_grad_() for t in tensors)
    with pytest.raises(_cuda.CudaLibraryError, match=report):
        norms.layer_norm(x, weight, bias).square().sum().backward()


def test_the_kernels_as_they_are_break_no_rule(emulator: Emulator) -> None:
    x, weight, bias = (t.requires_grad_() for t in (draw(40, 768).bfloat16(), draw(768), draw(768)))
    norms.layer_norm(x, weight, bias).square().sum().backward()
    assert emulator.launches == ["sw_norm_forward", "sw_norm_backward"]
    assert bool(torch.isfinite(x.grad).all())
