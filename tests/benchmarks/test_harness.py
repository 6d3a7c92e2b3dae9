"""The harness on operations made up for it: who is timed, what is written, and what is said."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import pytest
import torch
from torch import Tensor

from benchmarks import harness, records, roofline, runner, timing
from benchmarks.cases import Bench, Case, Options, OutOfTime, Provider, Work
from benchmarks.providers import peer, skip, stackwise_variants
from stackwise.kernels import dispatch, swiglu

ROWS = (3, 5)


def double(x: Tensor) -> Tensor:
    return 2 * x


def case(rows: int) -> Case:
    return Case(
        series="plain",
        x=("rows", "rows", rows),
        dtype=torch.float32,
        shape={"D": 4},
        make=lambda device: {"x": torch.linspace(-1, 1, rows * 4).view(rows, 4)},
        wanted=("x",),
        work=Work(8.0 * rows, 8.0 * rows, 4.0 * rows),
    )


def bench(*providers: Provider) -> Bench:
    return Bench(
        "made_up", lambda options: [case(n) for n in ROWS], double, lambda *_: iter(providers)
    )


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def options(notes: list[str], tmp_path) -> Options:
    return Options(quick=True, note=notes.append, folder=tmp_path)


def figures(rows, **wanted) -> list[records.Row]:
    return [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]


def test_a_correct_provider_gets_every_figure(options: Options) -> None:
    rows = list(harness.run(bench(Provider("stackwise-torch", double)), options))
    for n in ROWS:
        mine = figures(rows, kernel_provider="stackwise-torch", x_value=n)
        found = {(r.kernel_operation_mode, r.metric_name, r.metric_unit) for r in mine}
        times = {(m, "speed", "ms") for m in ("forward", "backward", "full")}
        assert times < found
        assert ("gate", "correctness", "error / bound") in found
        assert {("forward", "memory", "MB"), ("full", "memory", "MB")} < found
        assert ("full", "bandwidth", "% of copy") in found
        assert ("full", "tflops", "% of bf16 matmul") in found
        assert ("backward", "tflops", "TFLOP/s") not in found, "no operations were declared"
        (speed,) = (
            r for r in mine if r.metric_name == "speed" and r.kernel_operation_mode == "full"
        )
        (rate,) = (r for r in mine if r.metric_unit == "GB/s" and r.kernel_operation_mode == "full")
        assert rate.y_value_50 == pytest.approx(16.0 * n / speed.y_value_50 * 1e-6)
        extra = json.loads(speed.extra_benchmark_config_str)
        assert extra == {"series": "plain", "dtype": "fp32", "D": 4}
    memory = figures(rows, metric_name="memory", kernel_operation_mode="forward", x_value=3)
    output = 3 * 4 * 4
    assert output <= 1e6 * memory[0].y_value_50 < output + 32, "the output, and the factor 2"
    assert not runner.failures(rows)


def test_a_wrong_variant_of_ours_is_reported_and_not_timed(options, notes) -> None:
    wrong = Provider("stackwise-cuda", lambda x: 2.001 * x)
    rows = list(harness.run(bench(Provider("eager", double), wrong), options))
    assert {r.metric_name for r in figures(rows, kernel_provider="stackwise-cuda")} == {
        "correctness"
    }
    assert figures(rows, kernel_provider="eager", metric_name="speed")
    assert len(runner.failures(rows)) == len(ROWS)
    assert any("stackwise-cuda failed: out0" in note for note in notes)


def test_a_peer_far_off_is_not_timed_and_does_not_fail_the_run(options, notes) -> None:
    rows = list(harness.run(bench(Provider("eager", lambda x: 3 * x)), options))
    assert not figures(rows, metric_name="speed")
    assert not runner.failures(rows)
    assert any("eager failed" in note for note in notes)


def test_a_peer_slightly_off_is_timed_with_a_note(options, notes) -> None:
    rows = list(harness.run(bench(Provider("eager", lambda x: x * (2 + 8e-7))), options))
    assert figures(rows, metric_name="speed")
    assert figures(rows, metric_name="correctness")[0].y_value_50 > 1
    assert any("outside the error rule" in note for note in notes)


def test_reasons_for_skipping_are_printed(options, notes) -> None:
    providers = [
        Provider("eager", double),
        skip("quack", "has no such operation"),
        Provider("torch.compile", double, compiles=True),
        peer("absent", "no_such_package_here.sub", lambda module: double, torch.device("cpu")),
        peer("cuda-only", "json", lambda module: double, torch.device("cpu")),
    ]
    rows = list(harness.run(bench(*providers), dataclasses.replace(options, peers=True)))
    assert {r.kernel_provider for r in rows} == {"roofline", "eager"}
    text = "\n".join(notes)
    assert "quack skipped: has no such operation" in text
    assert "torch.compile skipped: --quick" in text
    assert "absent skipped: no_such_package_here is not installed" in text
    assert "cuda-only skipped: runs on CUDA devices" in text


def test_peers_run_on_demand_only(options) -> None:
    provider = Provider("liger", double, peer=True)
    rows = list(harness.run(bench(Provider("eager", double), provider), options))
    assert not figures(rows, kernel_provider="liger")


def test_variants_come_from_dispatch_with_the_reason_of_those_that_do_not_fit() -> None:
    tensors = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3)}
    found = {p.name: p for p in stackwise_variants("swiglu", swiglu, tensors, {})}
    assert set(found) == {f"stackwise-{v}" for v in dispatch.available()["swiglu"]} - {
        "stackwise-reference"
    }
    assert torch.equal(found["stackwise-torch"].function(**tensors), swiglu(**tensors))
    assert "on cpu" in found["stackwise-triton"].skipped


def test_time_that_is_over_leaves_cases_out(options) -> None:
    late = dataclasses.replace(options, seconds=0.0)
    with pytest.raises(OutOfTime, match="2 of 2 cases"):
        list(harness.run(bench(Provider("eager", double)), late))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """``made-up`` as a bench that the runner finds."""
    found = types.SimpleNamespace(bench=bench(Provider("stackwise-torch", double)))
    found.run = lambda options: harness.run(found.bench, options)
    monkeypatch.setattr(runner.importlib, "import_module", lambda name: found)
    monkeypatch.setattr(runner, "names", lambda: ["made-up"])
    monkeypatch.setattr(harness, "LEAST", 2)
    monkeypatch.setattr(harness, "SECONDS", 0.0)
    monkeypatch.setattr(
        harness.timing, "clock_for", lambda device, quick: timing.CpuClock(flush=False)
    )
    small = functools.partial(roofline.measure, quick=True)
    monkeypatch.setattr(
        harness.roofline, "measure", lambda device, clock, quick: small(device, clock)
    )
    monkeypatch.setattr(records, "_git_sha", lambda: "sha")
    return found


def test_a_run_that_is_killed_keeps_its_rows_and_is_resumed(module, tmp_path, notes) -> None:
    options = Options(folder=tmp_path, note=notes.append)
    calls: list[int] = []

    def dies_in_the_second_case(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(x) == ROWS[1] and calls.count(ROWS[1]) > 4:
            raise KeyboardInterrupt
        return 2 * x

    module.bench = bench(Provider("stackwise-torch", dies_in_the_second_case))
    with pytest.raises(KeyboardInterrupt):
        runner.run_bench("made-up", options)
    partial = tmp_path / "made_up.csv.partial"
    kept = figures(records.read_csv(partial), x_value=ROWS[0])
    assert figures(kept, metric_name="speed", kernel_operation_mode="full")
    assert not (tmp_path / "made_up.csv").exists()
    with partial.open("a") as handle:
        handle.write("made_up,stackwise-torch,full,spe")  # a line cut off

    calls.clear()
    module.bench = bench(Provider("stackwise-torch", lambda x: calls.append(len(x)) or 2 * x))
    rows = runner.run_bench("made-up", Options(folder=tmp_path, resume=True, note=notes.append))
    assert set(calls) == {ROWS[1]}, "the first case was complete"
    assert records.read_csv(tmp_path / "made_up.csv") == rows
    assert not partial.exists()
    for n in ROWS:
        assert len(figures(rows, metric_name="speed", x_value=n)) == 3
    assert figures(rows, x_value=ROWS[0], metric_name="speed")[0] in kept


def test_another_commit_is_not_resumed(module, tmp_path, notes, monkeypatch) -> None:
    runner.run_bench("made-up", Options(folder=tmp_path, note=notes.append))
    (tmp_path / "made_up.csv").rename(tmp_path / "made_up.csv.partial")
    monkeypatch.setattr(records, "_git_sha", lambda: "other")
    rows = runner.run_bench("made-up", Options(folder=tmp_path, resume=True, note=notes.append))
    assert {row.git_sha for row in rows} == {"other"}


def test_out_of_time_keeps_what_there_is_and_what_resumes_it(module, tmp_path, notes) -> None:
    rows = runner.run_bench("made-up", Options(folder=tmp_path, seconds=0.0, note=notes.append))
    assert {row.kernel_provider for row in rows} == {"roofline"}
    assert (tmp_path / "made_up.csv").exists()
    assert (tmp_path / "made_up.csv.partial").exists()
    assert any("out of time" in note for note in notes)


def test_the_exit_code_is_that_of_our_variants(module, tmp_path, capsys) -> None:
    assert runner.main(["made_up", "--results", str(tmp_path)]) == 0
    module.bench = bench(Provider("stackwise-cuda", lambda x: 3 * x))
    assert runner.main(["made_up", "--results", str(tmp_path)]) == 1
    assert "not correct: made_up stackwise-cuda" in capsys.readouterr().err


def test_json_has_only_rows_on_standard_output(module, tmp_path, capsys) -> None:
    module.bench = bench(Provider("eager", lambda x: 3 * x), skip("quack", "reason"))
    assert runner.main(["made-up", "--json", "--quick", "--peers"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert all(list(row) == records.COLUMNS for row in rows)
    assert "quack skipped: reason" in err
    assert not list(tmp_path.iterdir()), "a quick run leaves no file"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="warp_drive"):
        runner.run_bench("warp_drive")
