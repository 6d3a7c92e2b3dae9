"""Finds nvcc and a disassembler, or skips the test."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("no nvcc on this machine")
    return found


def disassembler() -> str:
    """CUDA's own cuobjdump, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=str(folder))
    if found is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    return found
