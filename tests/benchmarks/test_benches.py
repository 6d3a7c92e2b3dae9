"""Every bench runs on a CPU with --quick, ours within the error rule; the pytest front end too."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import bench_masked_rows, runner
from benchmarks.bench_attention import dense, packed
from benchmarks.bench_linear_cross_entropy import case as loss_case
from benchmarks.cases import Options
from benchmarks.norm_cases import norm_work
from stackwise.kernels import dispatch

FOLDER = pathlib.Path(runner.__file__).parent


def module(name: str) -> types.ModuleType:
    return importlib.import_module(f"benchmarks.bench_{name.replace('-', '_')}")


OPERATIONS = [name for name in runner.names() if hasattr(module(name), "BENCH")]


@pytest.mark.parametrize("name", OPERATIONS)
def test_bench_times_us_and_eager_in_every_mode(name: str) -> None:
    notes: list[str] = []
    rows = runner.run_bench(name, Options(quick=True, peers=True, note=notes.append))
    assert not runner.failures(rows)
    op = "attention" if name == "packed-attention" else name.replace("-", "_")
    timed = {
        (row.kernel_provider, row.kernel_operation_mode)
        for row in rows
        if row.metric_name == "speed" and row.y_value_50 > 0
    }
    peers = {provider for provider, _ in timed} - {"stackwise-torch"}
    assert peers, notes
    for provider in (*peers, "stackwise-torch"):
        assert {(provider, mode) for mode in ("forward", "backward", "full")} <= timed, notes
    for row in rows:
        if row.kernel_provider != "roofline":
            assert json.loads(row.extra_benchmark_config_str)["series"]
    absent = {f"stackwise-{v}" for v in dispatch.available()[op]} - {p for p, _ in timed}
    for provider in absent - {"stackwise-reference"}:
        assert any(f"{provider} skipped: " in note for note in notes), provider


@pytest.mark.parametrize("name", OPERATIONS)
def test_cases_are_distinct_and_full_sizes_exist_for_a_gpu(name, monkeypatch) -> None:
    bench = module(name).BENCH
    on_gpu = property(lambda self: torch.device("cuda"))
    small = {(c.series, c.x[2]) for c in bench.cases(Options())}
    monkeypatch.setattr(Options, "device", on_gpu)
    cases = bench.cases(Options())
    assert len({(case.series, case.x[2]) for case in cases}) == len(cases)
    assert small != {(case.series, case.x[2]) for case in cases}
    assert all(case.dtype in (torch.bfloat16, torch.float32) for case in cases)


SHORT = (
    "attention", "bias-gelu", "geglu", "layer-norm", "linear-cross-entropy", "masked-rows",
    "mla-attention", "rms-norm", "rope", "swiglu",
)  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_a_plain_operation_is_measured_by_a_short_file(name: str) -> None:
    assert name in runner.names()
    assert len(inspect.getsource(module(name)).splitlines()) <= 120


def test_work_is_what_the_formulas_say() -> None:
    assert norm_work(3, 5, torch.bfloat16, residual=True).of("full") == (8 * 30, 0)
    assert norm_work(3, 5, torch.float32, residual=False).of("forward") == (2 * 60, 0)
    loss = loss_case(7, 4, 9, torch.float32).work
    assert loss.of("full")[1] == 3 * 2 * 7 * 4 * 9
    full = dense(2, 6, 3, 8, 4, torch.bfloat16, False).work
    assert full.of("forward")[1] == 2 * (2 * 3 * 6 * 6) * (8 + 4)
    assert full.of("backward")[1] == 2 * (2 * 3 * 6 * 6) * (3 * 8 + 2 * 4)
    causal = dense(2, 6, 3, 8, 4, torch.bfloat16, True).work
    assert causal.of("forward")[1] == 2 * (2 * 3 * 21) * (8 + 4)
    documents = packed(300, 2, 8, torch.float32, False)
    ends = documents.make(torch.device("cpu"))["cu_seqlens_q"]
    pairs = int(ends.diff().square().sum())
    assert int(ends[-1]) == 300
    assert documents.work.of("forward")[1] == 2 * 2 * pairs * 16


def test_masked_rows_are_checked_before_they_are_timed(monkeypatch) -> None:
    rows = runner.run_bench("masked-rows", Options(quick=True))
    ratios = {
        (row.kernel_operation_mode, row.x_value): row.y_value_50
        for row in rows
        if row.metric_unit == "x all rows"
    }
    assert set(ratios) == {
        (mode, share) for mode in ("loss", "last_block", "both") for share in (100, 50, 15)
    }
    assert all(ratios[mode, 100] == 1.0 for mode in ("loss", "last_block", "both"))

    def forgets_the_selection(self, rows):
        return self.model.loss(
            self.model.run_blocks(self.hidden, self.layout), self.target, reduction="mean"
        )

    monkeypatch.setattr(bench_masked_rows.Problem, "both", forgets_the_selection)
    with pytest.raises(AssertionError):
        runner.run_bench("masked-rows", Options(quick=True))


def test_the_pytest_front_end_is_not_among_the_tests() -> None:
    text = (FOLDER.parent / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in text


@pytest.mark.slow
def test_the_pytest_front_end_records_events_and_memory(tmp_path) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["benchmarks", "--benchmark-only", f"--benchmark-json={file}", "-k", "swiglu"]
    # Inside a worker of xdist pytest-benchmark would take itself for one too.
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=FOLDER.parent, env=own, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    measured = json.loads(file.read_text())["benchmarks"]
    assert len(measured) == 6, "two providers in three modes"
    for entry in measured:
        assert entry["extra_info"]["device_ms_median"] > 0
        assert entry["extra_info"]["peak_bytes"] > 0
