"""kernels/evidence.json out of results files, here made-up ones; the shipped one is current."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence
from benchmarks.records import Row, make_row, write_csv

GPU, KEY = "NVIDIA H200", "NVIDIA H200 sm_90"


def row(metric: str, values: list[float], at: str = "2026-01-01", **extra: Any) -> Row:
    mode, op = extra.pop("mode", "full"), extra.pop("op", "rms_norm")
    provider = extra.pop("provider", "stackwise-triton")
    x = ("cases", "cases", 12.0)
    made = make_row(op, provider, mode, values, metric=(metric, ""), x=x, extra=extra)
    return dataclasses.replace(made, gpu_name=GPU, timestamp=at)


def proof(status: str = "validated", at: str = "2026-01-01", **changes: Any) -> Row:
    extra = {"status": status, "dtypes": ["bf16"], "fingerprint": "f1", "capability": "sm_90"}
    return row("validation", [0.8], at, **extra | changes)


def race(ratio: float, forward: float = 1.1, **changes: Any) -> list[Row]:
    extra = {
        "case": "8192x768", "dtype": "bf16", "case_class": "bf16 medium width<=1024", "ms": 2.0,
        "torch_ms": 2.0 * ratio, "memory": 100, "torch_memory": 100, "fingerprint": "f1",
    } | changes  # fmt: skip
    return [
        row("speedup", [value] * 5, mode=mode, **extra)
        for mode, value in (("full", ratio), ("forward", forward))
    ]


def collected(folder: Path, *rows: Row | list[Row]) -> dict[str, Any]:
    flat = [r for entry in rows for r in (entry if isinstance(entry, list) else [entry])]
    write_csv(flat, folder / "nvidia-h200" / "proofs" / "races.csv")
    return evidence.collect(folder)["gpus"]


def record(folder: Path, *rows: Row | list[Row]) -> dict[str, Any]:
    return collected(folder, *rows)[KEY]["rms_norm"]["triton"]


def test_the_shipped_file_is_what_the_results_say() -> None:
    assert evidence.main(["--check"]) == 0, "run `python -m benchmarks.evidence`"


def test_a_proof_and_a_won_race_make_a_verdict(tmp_path: Path) -> None:
    found = record(tmp_path, proof(), race(1.5))
    assert found["status"] == "validated"
    assert found["dtypes"] == ["bf16"]
    assert found["cases"] == 12
    assert found["worst_error"] == 0.8
    assert found["fingerprint"] == "f1"
    assert found["faster"] == {
        "bf16 medium width<=1024": {
            "speedup": 1.5,
            "forward_speedup": 1.1,
            "ms": 2.0,
            "torch_ms": 3.0,
            "case": "8192x768",
            "file": "benchmarks/results/nvidia-h200/proofs/races.csv",
        }
    }


@pytest.mark.parametrize(
    "rows",
    [
        race(1.01),
        race(1.5, forward=0.9),
        race(1.5, memory=1 << 30),
        race(1.5, fingerprint="f0"),
        [*race(1.5), *race(0.9, case="8192x1024")],
        race(1.5)[:1],
    ],
    ids=["noise", "forward slower", "memory", "other sources", "one case lost", "half a race"],
)
def test_no_verdict_about_speed(rows: list[Row], tmp_path: Path) -> None:
    found = record(tmp_path, proof(), rows)
    assert found["status"] == "validated"
    assert found["faster"] == {}


def test_without_a_proof_a_race_says_nothing(tmp_path: Path) -> None:
    assert collected(tmp_path, race(1.5)) == {}


def test_the_newest_proof_counts(tmp_path: Path) -> None:
    failed = proof("failed: 1x1 bf16: dx", at="2026-02-01")
    found = record(tmp_path, proof(), failed, race(1.5))
    assert found["status"] == "failed: 1x1 bf16: dx"
    assert found["faster"] == {}
    assert record(tmp_path, proof(at="2026-03-01"), failed, race(1.5))["status"] == "validated"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("sanitizer", [2.0], "2026-01-02", tool="memcheck"), "failed: 2 errors of memcheck"),
        (row("correctness", [1.3], "2026-01-02", series="bf16"), "failed: the gate of"),
        (row("correctness", [float("inf")], "2026-01-02", series="bf16"), "failed: the gate of"),
    ],
    ids=["sanitizer", "gate", "raised in the gate"],
)
def test_what_turned_it_down_since_its_proof_counts(bad: Row, reason: str, tmp_path: Path) -> None:
    assert record(tmp_path, proof(), race(1.5), bad)["status"].startswith(reason)
    before = dataclasses.replace(bad, timestamp="2025-12-31")
    assert record(tmp_path, proof(), race(1.5), before)["status"] == "validated"


def test_the_gates_of_the_benches_are_read_too(tmp_path: Path) -> None:
    write_csv(
        [row("correctness", [1.5], "2026-01-02", series="bf16")],
        tmp_path / "nvidia-h200" / "rms_norm.csv",
    )
    found = record(tmp_path, proof(), race(1.5))
    assert found["status"] == (
        "failed: the gate of benchmarks/results/nvidia-h200/rms_norm.csv, bf16 cases=12"
    )


def test_rows_of_peers_cpus_and_passed_gates_say_nothing(tmp_path: Path) -> None:
    others = [
        row("correctness", [2.0], "2026-01-02", provider="liger"),
        row("correctness", [0.5], "2026-01-02"),
        row("sanitizer", [0.0], "2026-01-02", tool="memcheck"),
        dataclasses.replace(proof(op="rope"), gpu_name="CPU AMD EPYC, 2 threads"),
    ]
    found = collected(tmp_path, proof(), race(1.5), others)
    assert found.keys() == {KEY}
    assert found[KEY].keys() == {"rms_norm"}
    assert found[KEY]["rms_norm"]["triton"]["status"] == "validated"


def test_the_file_is_written_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv([proof(), *race(1.5)], tmp_path / "results" / "nvidia-h200" / "any.csv")
    output = tmp_path / "evidence.json"
    arguments = ["--results", str(tmp_path / "results"), "--output", str(output)]
    assert evidence.main([*arguments, "--check"]) == 1
    assert evidence.main(arguments) == 0
    assert "rms_norm (triton): validated, faster in 1 classes" in capsys.readouterr().out
    assert evidence.main([*arguments, "--check"]) == 0
    assert json.loads(output.read_text())["gpus"].keys() == {KEY}
