"""Runs each file of ``interpreted/`` in a process of its own, where Triton interprets kernels.

TRITON_INTERPRET is read when a kernel is defined, so it cannot be set in a process that also
compiles kernels, nor be left set for other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def run_interpreted(file: Path, repository: Path, *options: str) -> subprocess.CompletedProcess:
    """pytest on ``file`` with the interpreter on."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-p", "no:xdist", *options, str(file)],
        cwd=repository,
        env={**inherited, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_in_the_interpreter(file: Path, repository: Path) -> None:
    pytest.importorskip("triton")
    done = run_interpreted(file, repository)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [f for f in FILES if "pytest.mark.slow" in f.read_text()], ids=lambda file: file.stem
)
def test_slow_kernels_in_the_interpreter(file: Path, repository: Path) -> None:
    pytest.importorskip("triton")
    done = run_interpreted(file, repository, "--run-slow", "-m", "slow")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
