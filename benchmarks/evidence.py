"""Writes kernels/evidence.json from results/<gpu>/: ``python -m benchmarks.evidence``.

Read are the rows that ``make gpu-check`` leaves in <bench>.csv and proofs/*.csv:

    validation   the newest proof of a variant: worst error / bound, status and dtypes
    speedup      torch's time over the variant's, per case, forward and full
    sanitizer    errors that compute-sanitizer found
    correctness  the gate of a bench, for our variants

A variant is validated on a GPU when its newest proof says so and no sanitizer or gate has turned it
down since; it is faster in a class of cases when it won every race of the class, with the sources
of the proof. The rules of winning are those of ``stackwise tune`` (kernels/oracle.py).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.records import RESULTS, Row, read_csv
from stackwise.kernels import evidence
from stackwise.kernels.oracle import MAX_MEMORY, MEMORY_SLACK, MIN_FORWARD, MIN_SPEEDUP

PREFIX = "stackwise-"

Key = tuple[str, str, str]  # GPU, operation, variant
Sourced = tuple[Row, dict[str, Any], str]  # row, its extra, file


def collect(results: pathlib.Path = RESULTS) -> dict[str, Any]:
    """The content of evidence.json."""
    gpus: dict[str, dict[str, dict[str, Any]]] = {}
    for (gpu, op, variant), rows in sorted(_by_variant(_rows(results)).items()):
        record = _record(rows)
        if record is not None:
            gpus.setdefault(gpu, {}).setdefault(op, {})[variant] = record
    return {
        "format": evidence.FORMAT,
        "generated_by": "python -m benchmarks.evidence",
        "gpus": gpus,
    }


def _rows(results: pathlib.Path) -> Iterable[Sourced]:
    wanted = {"validation", "speedup", "sanitizer", "correctness"}
    for file in sorted(results.glob("*/**/*.csv")):
        name = f"benchmarks/results/{file.relative_to(results).as_posix()}"
        for row in read_csv(file):
            ours = row.kernel_provider.startswith(PREFIX) and row.metric_name in wanted
            if ours and not row.gpu_name.startswith("CPU "):
                yield row, json.loads(row.extra_benchmark_config_str), name


def _by_variant(rows: Iterable[Sourced]) -> dict[Key, list[Sourced]]:
    """A bench's gate does not say the compute capability: that comes from the proof."""
    rows = list(rows)
    names = {
        row.gpu_name: f"{row.gpu_name} {extra['capability']}"
        for row, extra, _ in rows
        if row.metric_name == "validation"
    }
    found: dict[Key, list[Sourced]] = {}
    for row, extra, file in rows:
        if row.gpu_name in names:
            variant = row.kernel_provider.removeprefix(PREFIX)
            key = (names[row.gpu_name], row.kernel_name, variant)
            found.setdefault(key, []).append((row, extra, file))
    return found


def _record(rows: list[Sourced]) -> dict[str, Any] | None:
    """The record of one variant on one GPU; None without a proof."""
    proofs = [entry for entry in rows if entry[0].metric_name == "validation"]
    if not proofs:
        return None
    proof, extra, file = max(proofs, key=lambda entry: entry[0].timestamp)
    record = {
        "status": extra["status"],
        "dtypes": extra["dtypes"],
        "cases": int(proof.x_value),
        "worst_error": proof.y_value_50,
        "fingerprint": extra["fingerprint"],
        "file": file,
        "git_sha": proof.git_sha,
        "torch": proof.torch_version,
        "triton": proof.triton_version,
        "faster": {},
    }
    veto = _veto(rows, proof.timestamp)
    if record["status"] == evidence.VALIDATED and veto:
        record["status"] = f"failed: {veto}"
    if record["status"] == evidence.VALIDATED:
        record["faster"] = _wins(rows, extra["fingerprint"])
    return record


def _veto(rows: list[Sourced], since: str) -> str:
    """What turned the variant down since its proof; empty when nothing did."""
    for row, extra, file in rows:
        if row.timestamp < since:
            continue
        if row.metric_name == "sanitizer" and row.y_value_50 > 0:
            return f"{row.y_value_50:.0f} errors of {extra['tool']} ({file})"
        if row.metric_name == "correctness" and not row.y_value_50 <= 1.0:
            return f"the gate of {file}, {extra.get('series', '')} {row.x_name}={row.x_value:g}"
    return ""


def _wins(rows: list[Sourced], fingerprint: str) -> dict[str, dict[str, Any]]:
    races: dict[str, dict[str, dict[str, Sourced]]] = {}
    for entry in rows:
        row, extra, _ = entry
        if row.metric_name == "speedup" and extra["fingerprint"] == fingerprint:
            cases = races.setdefault(extra["case_class"], {})
            part = cases.setdefault(extra["case"], {})
            mode = row.kernel_operation_mode
            if mode not in part or part[mode][0].timestamp <= row.timestamp:
                part[mode] = entry
    return {
        key: min((_figures(parts) for parts in cases.values()), key=lambda f: f["speedup"])
        for key, cases in sorted(races.items())
        if all(_won(parts) for parts in cases.values())
    }


def _won(parts: dict[str, Sourced]) -> bool:
    if parts.keys() != {"forward", "full"}:
        return False
    row, extra, _ = parts["full"]
    memory = extra["memory"] <= MAX_MEMORY * extra["torch_memory"] + MEMORY_SLACK
    forward = parts["forward"][0].y_value_50 >= MIN_FORWARD
    return row.y_value_20 >= MIN_SPEEDUP and forward and memory


def _figures(parts: dict[str, Sourced]) -> dict[str, Any]:
    row, extra, file = parts["full"]
    return {
        "speedup": row.y_value_50,
        "forward_speedup": parts["forward"][0].y_value_50,
        "ms": extra["ms"],
        "torch_ms": extra["torch_ms"],
        "case": extra["case"],
        "file": file,
    }


def render(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Writes the file; with ``--check`` only compares it (1: it is out of date)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--output", type=pathlib.Path, default=evidence.FILE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    content = collect(options.results)
    if options.check:
        same = options.output.is_file() and options.output.read_text("utf-8") == render(content)
        print(f"{options.output}: {'up to date' if same else 'out of date'}")
        return 0 if same else 1
    options.output.write_text(render(content), encoding="utf-8")
    for gpu, ops in content["gpus"].items():
        for op, variants in ops.items():
            for variant, record in variants.items():
                print(f"{gpu}: {op} ({variant}): {record['status']}, "
                      f"faster in {len(record['faster'])} classes")  # fmt: skip
    print(f"{options.output}: {len(content['gpus'])} GPUs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
