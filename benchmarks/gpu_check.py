"""``make gpu-check``: everything a GPU has to say, in one unattended command, without a network.

Builds csrc/, proves every Triton and CUDA variant (the unproven ones first), races them, runs the
tests marked gpu, compute-sanitizer where it works and the benches beside their peers, as far as
BUDGET seconds reach; the next run goes on where this one stopped. Then writes
results/<gpu>/**.csv, kernels/evidence.json, OUT/summary.md and OUT/gpu-check.tar.gz.

Exit code 0: nothing is wrong; 1: a step failed; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import evidence
from benchmarks import gpu_check_report as report
from benchmarks.gpu_check_runner import State, Step, not_reached, run
from benchmarks.runner import names
from stackwise import tuning
from stackwise.kernels.evidence import holds

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUDGET = 480.0
LONG = ("training-step",)  # benches whose subject is no single operation
CLOSING = 10.0  # seconds of the budget for evidence, page and archive

_PROBE = """
import json, torch
from stackwise.kernels import evidence
print(json.dumps(evidence.machine_of() if torch.cuda.is_available() else None))
"""


def find_machine() -> dict[str, str] | None:
    """The GPU and its software, asked in another process; None without a GPU that works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print("gpu-check: the GPU did not answer within 120 s", file=sys.stderr)
        return None
    if done.returncode != 0:
        print(done.stderr.strip()[-2000:], file=sys.stderr)
        return None
    found: dict[str, str] | None = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    """That of every step: this checkout, installed or not."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {k: v for k, v in os.environ.items() if k not in ("STACKWISE_IMPL", "TRITON_INTERPRET")}
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def all_steps(results: pathlib.Path, proven: Mapping[str, Any]) -> list[Step]:
    """Every step; ``proven``: the records of evidence.json for this GPU."""
    python = sys.executable
    steps = [Step("build", [python, "setup.py", "build_ext", "--inplace"], 150, 1, first=True)]
    for op, variant in tuning.candidates():
        known = proven.get(op, {}).get(variant)
        steps += _variant_steps(op, variant, results, unproven=not _still_holds(op, variant, known))
    if importlib.util.find_spec("pytest") is not None:
        command = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        # What the proofs show is not shown twice.
        command += ["--run-gpu", "-k", "not follows_its_reference", *_gpu_test_files()]
        steps.append(Step("gpu tests", command, 180, 80, least=60))
    steps += [_bench_step(name, results) for name in names() if name not in LONG]
    return steps


def _gpu_test_files() -> list[str]:
    """Only these are imported: what other tests need may be missing on this machine."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text("utf-8")]


def _still_holds(op: str, variant: str, record: Mapping[str, Any] | None) -> bool:
    return record is not None and holds(op, variant, record)


def _variant_steps(op: str, variant: str, results: pathlib.Path, unproven: bool) -> list[Step]:
    def command(job: str, seconds: float) -> list[str]:
        program = [sys.executable, "-m", "benchmarks.gpu_check_proofs", job, op, variant]
        return [*program, "--results", str(results / "proofs"), "--seconds", str(seconds)]

    prove, weight = f"prove {op} {variant}", 10.0 if unproven else 1.0
    return [
        Step(prove, command("prove", 100), 120, 60 * weight),
        Step(f"race {op} {variant}", command("race", 12), 40, 15 * weight, after=prove),
        Step(f"memcheck {op} {variant}", command("memcheck", 0), 100, 4 * weight, 30),
        Step(f"racecheck {op} {variant}", command("racecheck", 0), 100, 3 * weight, 30),
    ]


def _bench_step(name: str, results: pathlib.Path) -> Step:
    command = [sys.executable, "-m", "benchmarks.runner", name, "--peers", "--resume"]
    return Step(
        f"bench {name}", [*command, "--seconds", "30", "--results", str(results)], 60, 30, least=25
    )


def source_key(root: pathlib.Path = ROOT) -> str:
    """Changes with any source whose outcome a step could show."""
    digest = hashlib.sha256()
    patterns = (
        "kernels/**/*.py",
        "stackwise/**/*.py",
        "benchmarks/*.py",
        "csrc/**/*",
        "tests/**/*.py",
    )
    for file in sorted(f for pattern in patterns for f in root.glob(pattern) if f.is_file()):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def conclude(
    steps: Sequence[Step],
    state: State,
    machine: Mapping[str, str],
    out: pathlib.Path,
    results: pathlib.Path,
    evidence_file: pathlib.Path,
) -> pathlib.Path:
    """Regenerates the evidence, writes the page and the archive."""
    evidence.main(["--results", str(results.parent), "--output", str(evidence_file)])
    gpu = f"{machine['gpu']} {machine['capability']}"
    page = report.summary(steps, state, machine, report.read_records(evidence_file, gpu))
    return report.pack(out, results, evidence_file, page)


def main(argv: list[str] | None = None) -> int:
    """Runs the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--evidence", type=pathlib.Path, default=ROOT / "kernels" / "evidence.json")
    options = parser.parse_args(argv)
    machine = find_machine()
    if machine is None:
        print("gpu-check: there is no CUDA GPU that torch can use; nothing was checked",
              file=sys.stderr)  # fmt: skip
        return 2
    out, evidence_file = options.out.resolve(), options.evidence.resolve()
    results = options.results.resolve() / machine["gpu"].lower().replace(" ", "-")
    results.mkdir(parents=True, exist_ok=True)
    gpu = f"{machine['gpu']} {machine['capability']}"
    steps = all_steps(results, report.read_records(evidence_file, gpu))
    state = State.load(out / "state.json", f"{gpu} {source_key()}")
    os.chdir(ROOT)
    try:
        run(steps, state, options.budget - CLOSING, environment())
    finally:
        archive = conclude(steps, state, machine, out, results, evidence_file)
    left = not_reached(steps, state)
    print(f"\n{archive}\n{out / 'summary.md'}")
    print(f"not reached: {', '.join(left)}; run it again" if left else "all steps reached")
    wrong = [s.name for s in steps if state.status(s.name) in ("failed", "crashed", "timed out")]
    if wrong:
        print(f"failed: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
