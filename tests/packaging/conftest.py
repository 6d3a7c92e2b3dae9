"""Programs run in interpreters of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., str]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """``run_python(code, folder, *path)``: what ``python -c code`` prints, run in ``folder`` with
    ``path`` as PYTHONPATH. Python puts ``folder`` first on sys.path itself."""

    def run(code: str, folder: Path, *path: Path, python: str = sys.executable) -> str:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
        command = [python, "-c", code]
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run
