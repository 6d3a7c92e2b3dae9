"""The machine code of every Triton kernel, without a GPU: no spills, shared memory within limits,
the planned instructions present. benchmarks/results/machine_code.csv is the record of all of it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from benchmarks import machine_code as record
from stackwise.kernels.triton_ops import machine_code
from stackwise.kernels.triton_ops.machine_code import Case, Report

# Compilations that `make test` has time for; `make test-old-triton` takes a larger sample.
SAMPLE, CHANGED = int(os.environ.get("STACKWISE_MACHINE_CODE_SAMPLE", "3")), 12


@functools.cache
def all_cases() -> tuple[Case, ...]:
    return tuple(machine_code.cases())


def spread(cases: list[Case], count: int) -> list[Case]:
    """``count`` of them at equal distances, so that every module and architecture has its turn."""
    return cases[:: max(1, -(-len(cases) // count))]


def faults_of(cases: list[Case]) -> list[str]:
    return [fault for case in cases for fault in machine_code.faults(machine_code.inspect(case))]


def find(kernel: str, arch: int, *words: str) -> Case:
    return next(
        case
        for case in all_cases()
        if case.arch == arch and case.name.startswith(kernel) and all(w in case.name for w in words)
    )


def test_every_architecture_has_every_kernel_once() -> None:
    cases = all_cases()
    assert len({case.digest for case in cases}) == len(cases)
    assert len({(c.name, c.arch, c.num_warps) for c in cases}) == len(cases)
    names = {arch: {c.name for c in cases if c.arch == arch} for arch in machine_code.ARCHITECTURES}
    kernels = {arch: {name.split("[")[0] for name in names[arch]} for arch in names}
    assert all(kernels[arch] == kernels[90] for arch in names)
    assert {"gated_forward_kernel", "rope_kernel", "column_sum_kernel"} <= kernels[90]


def test_what_changed_since_the_record_has_no_faults() -> None:
    """A few changes are compiled here; a record that lags behind has to be brought up to date."""
    changed, gone = record.differences(all_cases(), record.read_records())
    remedy = "run `python -m benchmarks.machine_code`"
    assert len(changed) <= CHANGED, f"{len(changed)} configurations are not recorded: {remedy}"
    assert changed or not gone, f"{len(gone)} recorded configurations are no more: {remedy}"
    assert not faults_of(changed)


def test_a_sample_has_no_faults() -> None:
    cases = list(all_cases())
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        # The tiles are chosen with the newest Triton. With 3.6 some attention kernels that carry
        # every option at once spill a few values on sm_90, and some kernels elsewhere.
        cases = [c for c in cases if c.arch == 90 and "attention" not in c.kernel.fn.__module__]
    assert not faults_of(spread(cases, SAMPLE))


def test_plain_training_attention_spills_with_no_triton() -> None:
    """What a model without window, bias and softcap runs on Hopper."""
    plain = [
        case
        for case in all_cases()
        if case.arch == 90
        and case.name.startswith("attention_")
        and "bf16" in case.name
        and not case.constants.get("HAS_BIAS", False)
        and not case.constants.get("HAS_CAP", False)
    ]
    assert len(plain) >= 3
    assert not faults_of(spread(plain, max(3, SAMPLE // 4)))


def test_the_record_has_no_faults_and_says_so() -> None:
    rows = record.read_records().values()
    assert len(rows) > 100
    for row in rows:
        assert row["spills"] == "0", row
        assert row["missing"] == "", row
        assert int(row["shared"]) <= machine_code.SHARED_LIMIT[int(row["arch"])], row


def test_a_spilling_configuration_is_caught() -> None:
    case = find("gated_backward_kernel", 90, "bf16", "BLOCK_R=2")
    assert not machine_code.faults(machine_code.inspect(case))
    starved = machine_code.inspect(dataclasses.replace(case, options={"maxnreg": 24}))
    assert starved.registers <= 24
    assert starved.spills > 0
    assert "spill instructions" in machine_code.faults(starved)[0]


def test_a_missing_instruction_is_caught() -> None:
    case = find("gated_forward_kernel", 80, "bf16", "BLOCK_R=2")
    report = machine_code.inspect(dataclasses.replace(case, aligned=()))
    assert report.vector_loads == 0
    assert "no instruction matches" in machine_code.faults(report)[0]


@pytest.mark.parametrize("arch", machine_code.ARCHITECTURES)
def test_too_much_shared_memory_is_caught(arch: int) -> None:
    blank = {field.name: 0 for field in dataclasses.fields(Report)} | {"kernel": "k", "missing": ""}
    limit = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}[arch] * 1024
    within = Report(**blank | {"arch": arch, "shared": limit})
    assert machine_code.faults(within) == []
    beyond = dataclasses.replace(within, shared=limit + 1)
    assert "bytes of shared memory" in machine_code.faults(beyond)[0]


def test_the_digest_follows_source_and_launch() -> None:
    case = find("gated_forward_kernel", 90, "fp32")
    digests = {
        case.digest,
        dataclasses.replace(case, arch=80).digest,
        dataclasses.replace(case, num_warps=8).digest,
        dataclasses.replace(case, aligned=()).digest,
        find("gated_backward_kernel", 90, "fp32").digest,
    }
    assert len(digests) == 5
    sources = machine_code._sources(case.kernel)
    assert {"_gated_forward_kernel", "_forward_tile", "activate", "load_tile"} <= sources.keys()
    assert sources["_CUBIC"] == "0.044715"


def test_the_record_is_written_and_read_back(tmp_path: Path) -> None:
    report = machine_code.inspect(find("column_sum_kernel", 90))
    record.write_records([machine_code.as_record(report)], tmp_path / "new" / "record.csv")
    (row,) = record.read_records(tmp_path / "new" / "record.csv").values()
    assert row == {key: str(value) for key, value in machine_code.as_record(report).items()}
    assert report.instructions > 50
    assert report.registers > 10
    assert record.to_report(row) == report


def test_differences_between_cases_and_record() -> None:
    first, second, third = all_cases()[:3]
    rows = {
        case.digest: {"kernel": case.name, "arch": case.arch, "digest": case.digest}
        for case in (first, second)
    }
    assert record.differences([first, second], rows) == ([], [])
    changed, gone = record.differences([first, third], rows)
    assert changed == [third]
    assert gone == [f"{second.name} on sm_{second.arch}"]


def test_only_what_changed_is_compiled_and_faults_stay_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = all_cases()[:2]
    file = tmp_path / "record.csv"
    monkeypatch.setattr(record, "FILE", file)
    monkeypatch.setattr(record.read_records, "__defaults__", (file,))
    monkeypatch.setattr(record.write_records, "__defaults__", (file,))
    monkeypatch.setattr(machine_code, "cases", lambda: iter([first]))
    assert record.main(["--check"]) == 1
    assert record.main([]) == 0
    assert record.main(["--check"]) == 0
    monkeypatch.setattr(machine_code, "cases", lambda: iter([first, second]))
    assert record.main([]) == 0
    assert "1 compiled, 2 recorded" in capsys.readouterr().out
    spilling = file.read_text().replace(",0,,", ",0,LDG,", 1)
    assert spilling != file.read_text()
    file.write_text(spilling)
    assert record.main([]) == 1
    assert "no instruction matches LDG" in capsys.readouterr().out
