"""Kernels of csrc/ on the CPU: builds a library over the emulator and calls it as the GPU's.

Only :func:`stackwise.kernels.cuda_ops.launch.run` and ``multiprocessors`` are replaced. The launch
code above them allocates and packs as it would for a GPU; every tensor whose address it takes is
registered with the emulator, with its extent and as read or written according to the record.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.kernels import _cuda
from stackwise.kernels.cuda_ops import launch

REPOSITORY = Path(__file__).resolve().parents[2]
CSRC = REPOSITORY / "csrc"
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"),
    # Fibers jump between stacks, which the checks of fortified longjmp forbid.
    *("-U_FORTIFY_SOURCE", "-DSW_EMULATE", '-DSW_BUILD_ARCHS="emulated"'),
)
MULTIPROCESSORS = 3  # few, so that blocks walk over several rows


def find_compiler() -> str:
    """A C++17 compiler; without one the test is skipped, or fails with STACKWISE_REQUIRE_CXX=1."""
    names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        reason = "no C++ compiler for the emulator: neither $CXX nor g++, c++ or clang++ is there"
        if os.environ.get("STACKWISE_REQUIRE_CXX") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def build(name: str, sources: list[Path], csrc: Path = CSRC) -> Path:
    """A library of ``sources`` and the emulator, once per session and per content."""
    compiler = find_compiler()
    cache = Path(os.environ["STACKWISE_CACHE"]) / "emulator"
    cache.mkdir(parents=True, exist_ok=True)
    files = [*sources, *sorted((csrc / "emu").glob("*.cpp"))]

    def compiled(source: Path) -> Path:
        headers = {*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *source.parent.glob("*.cuh")}
        digest = hashlib.sha256(repr((compiler, FLAGS)).encode())
        for file in (source, *sorted(headers)):
            digest.update(file.read_bytes())
        target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            command = [compiler, *FLAGS, "-I", str(csrc)]
            partial = target.with_suffix(".partial")
            _run([*command, "-x", "c++", "-c", str(source), "-o", str(partial)])
            partial.rename(target)
        return target

    # Test processes share the cache: the first builds, the others wait.
    with open(cache / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(compiled, files))
        digest = hashlib.sha256(repr(sorted(objects)).encode()).hexdigest()[:16]
        library = cache / f"lib{name}-{digest}.so"
        if not library.exists():
            _run([compiler, "-shared", "-o", str(library), *map(str, objects)])
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


class Emulator:
    """Stands in for the library's launches; ``launches`` lists what ran."""

    def __init__(self, path: Path) -> None:
        self.library = _cuda.load(path)
        self.library.sw_emu_register.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p)
        ]
        self.launches: list[str] = []
        self._spans: dict[int, int] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data_ptr = torch.Tensor.data_ptr

        def recorded(x: Tensor) -> int:
            address = data_ptr(x)
            # The latest counts: memory of a tensor that is gone belongs to another one by now.
            self._spans[address] = _span(x)
            return address

        monkeypatch.setattr(torch.Tensor, "data_ptr", recorded)
        monkeypatch.setattr(launch, "run", self.run)
        monkeypatch.setattr(launch, "multiprocessors", lambda x: MULTIPROCESSORS)

    def run(self, name: str, x: Tensor, arguments: tuple[Any, ...]) -> None:
        record = _cuda.RECORDS[name]
        self.launches.append(name)
        try:
            for position, label in enumerate((*record.reads, *record.writes)):
                address = arguments[position]
                if address:
                    writable = position >= len(record.reads)
                    self.library.sw_emu_register(
                        address, self._spans[address], writable, label.encode()
                    )
            code = getattr(self.library, name)(record.pack(*arguments, 0))
        finally:
            self.library.sw_emu_clear()
            self._spans.clear()
        if code:
            raise _cuda.CudaLibraryError(self.library.sw_error_string(code).decode())


def _span(x: Tensor) -> int:
    """Bytes from the first element of ``x`` to its last."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()
