"""Steps of ``make gpu-check`` that judge one variant, each a process of its own:

python -m benchmarks.gpu_check_proofs prove|race|memcheck|racecheck OP VARIANT --results DIR

They replace the rows of that variant in DIR/validation.csv, races.csv or sanitizer.csv, which
benchmarks/evidence.py reads. Exit code 0: nothing wrong was found, 1: something was, 77: this
machine cannot tell, 75: the time was too short.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.evidence import PREFIX
from benchmarks.gpu_check_runner import UNAVAILABLE, UNFINISHED
from benchmarks.records import Row, make_row, read_csv, write_csv
from stackwise import tuning
from stackwise.kernels import oracle, oracle_cases
from stackwise.kernels.case_classes import DTYPES
from stackwise.kernels.examiner import COMMAND, Event, Examiner
from stackwise.kernels.sources import fingerprint

SANITIZERS = ("memcheck", "racecheck")
# The tool slows kernels down a hundredfold: a few small cases, in the dtype of training.
SANITIZED_CASES, SANITIZED_DTYPE = 4, "bf16"


def prove(settings: tuning.Settings, seconds: float) -> tuple[list[Row], str]:
    """Rows of the proof of ``settings.pairs[0]``, and its status."""
    (pair,) = settings.pairs
    answers = tuning.prove_events(settings, seconds)[pair]
    record = tuning.proof_of(answers)
    rows = [
        _row(pair, "case", "error / bound", float(e["error"]), ("case", e["case"], index), e)
        for index, e in enumerate(
            e for events in answers.values() for e in events if e["event"] == "finding"
        )
    ]
    worst = record.pop("worst_error")
    x = ("cases", "cases that it covers", record["cases"])
    extra = {**record, "capability": _capability(settings.device)}
    rows.append(_row(pair, "validation", "error / bound", worst, x, extra))
    return rows, str(record["status"])


def race(settings: tuning.Settings, seconds: float) -> tuple[list[Row], str]:
    """Rows of the races of ``settings.pairs[0]``, and what happened."""
    (pair,) = settings.pairs
    with Examiner(settings.command) as examiner:
        events = tuning.race(examiner, settings, pair, seconds, seconds)
    rows = [row for event in events if event["event"] == "contest" for row in _contest(pair, event)]
    result = tuning.race_of(events, pair[1])
    return rows, str(result.get("status", f"{result['raced']} cases raced"))


def _contest(pair: tuning.Pair, event: Event) -> Iterable[Row]:
    contest, variant = tuning.contest_of(event), pair[1]
    figures = tuning.figures_of(contest, variant)
    extra = {
        "case": contest.case,
        "dtype": contest.dtype,
        "case_class": contest.case_class,
        "ms": figures["ms"],
        "torch_ms": figures["torch_ms"],
        "memory": contest.memory[variant],
        "torch_memory": contest.memory["torch"],
    }
    for part in ("forward", "full"):
        rounds = zip(contest.times["torch"][part], contest.times[variant][part], strict=True)
        ratios = [theirs / ours for theirs, ours in rounds]
        x = ("rounds", "interleaved rounds", len(ratios))
        yield _row(pair, "speedup", "x torch", ratios, x, extra, mode=part)


def sanitize(pair: tuning.Pair, tool: str, device: str) -> tuple[list[Row], str]:
    """The number of errors that compute-sanitizer's ``tool`` reports on a few small cases."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(program, os.X_OK):
        return [], "unavailable: no compute-sanitizer"
    command = [
        program,
        "--tool",
        tool,
        "--target-processes",
        "application-only",
        sys.executable,
        "-m",
        __spec__.name,
        "cases",
        *pair,
    ]
    done = subprocess.run(
        [*command, "--device", device],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-8000:], done.stderr[-4000:], sep="\n")
    return judge_sanitizer(pair, tool, done.stdout + done.stderr)


def judge_sanitizer(pair: tuning.Pair, tool: str, said: str) -> tuple[list[Row], str]:
    """Rows and status out of what the tool printed."""
    summary = re.search(r"SUMMARY: (\d+) (?:error|hazard)", said)
    ran = re.search(r"(\d+) cases ran", said)
    if summary is None or ran is None:
        last = said.strip().splitlines()[-1:] or ["nothing was printed"]
        return [], f"unavailable: {last[0][:200]}"
    errors = int(summary[1])
    x = ("cases", "small cases", int(ran[1]))
    row = _row(pair, "sanitizer", "errors", float(errors), x, {"tool": tool})
    return [row], f"failed: {errors} errors of {tool}" if errors else f"{tool}: no errors"


def run_cases(pair: tuning.Pair, device: str) -> int:
    """The child of :func:`sanitize`: runs small cases, values and gradients, and says how many."""
    cases = [c for c in oracle_cases.proofs(pair[0]) if SANITIZED_DTYPE in c.dtypes]
    ran = 0
    for case in cases[:: max(1, len(cases) // SANITIZED_CASES)]:
        finding = oracle.prove(*pair, case, SANITIZED_DTYPE, device)
        ran += not finding.skipped
    print(f"{ran} cases ran")
    return 0


def keep(
    rows: Sequence[Row], file: pathlib.Path, pair: tuning.Pair, extra: Mapping[str, Any]
) -> None:
    """Replaces the rows of ``pair`` in ``file``, those with the same ``extra`` entries only."""
    import json

    def replaced(row: Row) -> bool:
        own = json.loads(row.extra_benchmark_config_str)
        same = all(own.get(name) == value for name, value in extra.items())
        return same and (row.kernel_name, row.kernel_provider) == (pair[0], PREFIX + pair[1])

    write_csv([*(row for row in read_csv(file) if not replaced(row)), *rows], file)


def _row(
    pair: tuning.Pair,
    metric: str,
    unit: str,
    value: float | list[float],
    x: tuple[str, str, float],
    extra: Mapping[str, Any],
    mode: str = "forward and backward",
) -> Row:
    values = value if isinstance(value, list) else [value]
    told = {**extra, "fingerprint": fingerprint(*pair)}
    told.pop("event", None)
    return make_row(pair[0], PREFIX + pair[1], mode, values, metric=(metric, unit), x=x, extra=told)


def _capability(device: str) -> str:
    import torch

    if torch.device(device).type != "cuda":
        return device
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def main(argv: list[str] | None = None, command: Sequence[str] = COMMAND) -> int:
    """Runs one step; ``command`` starts the examining process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("job", choices=("prove", "race", "cases", *SANITIZERS))
    parser.add_argument("op")
    parser.add_argument("variant")
    parser.add_argument("--results", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--dtypes", default=",".join(("bf16", "fp32", "fp16")))
    options = parser.parse_args(argv)
    pair = (options.op, options.variant)
    if options.job == "cases":
        return run_cases(pair, options.device)
    dtypes = [dtype for dtype in options.dtypes.split(",") if dtype in DTYPES]
    settings = tuning.Settings(
        [pair], options.device, options.seconds, options.workers, dtypes, command
    )
    if options.job == "prove":
        rows, status = prove(settings, options.seconds)
        keep(rows, options.results / "validation.csv", pair, {})
    elif options.job == "race":
        rows, status = race(settings, options.seconds)
        keep(rows, options.results / "races.csv", pair, {})
    else:
        rows, status = sanitize(pair, options.job, options.device)
        if rows:
            keep(rows, options.results / "sanitizer.csv", pair, {"tool": options.job})
    print(f"{pair[0]} ({pair[1]}) {options.job}: {status}")
    return exit_code(status)


def exit_code(status: str) -> int:
    """What the orchestrator learns from the status of a step."""
    if status.startswith("failed"):
        return 1
    if status.startswith(("unavailable", "covers no case")):
        return UNAVAILABLE
    return UNFINISHED if status == "not reached" else 0


if __name__ == "__main__":
    sys.exit(main())
