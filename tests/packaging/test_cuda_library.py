"""The library built by the real nvcc: its interface, its loader and its errors without a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stackwise.kernels import _cuda


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


@pytest.fixture(scope="session")
def library(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by setup.py in a copy of the sources, for one architecture to save time."""
    pytest.importorskip("setuptools", minversion="77")
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    root = tmp_path_factory.mktemp("cuda")
    for name in ("kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(repository / name, root / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, root)
    (root / "stackwise").mkdir()
    shutil.copy(repository / "stackwise" / "__init__.py", root / "stackwise")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=root,
        env=os.environ
        | {"STACKWISE_CUDA": "1", "STACKWISE_NVCC": nvcc, "STACKWISE_CUDA_ARCHS": "80"},
        check=True,
    )
    return root / "kernels" / _cuda.LIBRARY.name


def test_library_loads_without_a_gpu_and_says_what_it_is(library: Path) -> None:
    state = _cuda.status(library)
    assert state == {
        "built": True,
        "path": str(library),
        "abi": _cuda.ABI_VERSION,
        "archs": ["80"],
        "reason": None,
    }
    assert _cuda.describe(state).startswith("CUDA kernels: sm_80")


def test_header_and_binding_have_the_same_version(repository: Path) -> None:
    header = (repository / "csrc" / "abi.h").read_text()
    assert re.findall(r"#define SW_ABI_VERSION (\d+)", header) == [str(_cuda.ABI_VERSION)]


def test_every_exported_function_is_bound(repository: Path) -> None:
    sources = "".join(path.read_text() for path in (repository / "csrc").glob("*.cu"))
    exported = set(re.findall(r"^SW_EXPORT .*?\b(sw_\w+)\(", sources, re.MULTILINE))
    assert exported == {"sw_abi_version", *_cuda._SIGNATURES}


def test_another_version_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "ABI_VERSION", _cuda.ABI_VERSION + 1)
    other = library.with_name("libother.so")
    shutil.copy(library, other)
    with pytest.raises(_cuda.CudaLibraryError, match="interface version 2, this package needs 3"):
        _cuda.load(other)


def test_absent_and_broken_libraries_are_reported_with_the_remedy(tmp_path: Path) -> None:
    absent = _cuda.status(tmp_path / "libabsent.so")
    assert absent["built"] is False
    assert "libabsent.so was not built" in absent["reason"]
    assert "STACKWISE_CUDA=1 pip install" in absent["reason"]
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in _cuda.status(broken)["reason"]
    assert _cuda.describe(absent).startswith("CUDA kernels: not available: ")


def test_copy_checks_its_arguments_before_any_launch(library: Path) -> None:
    invalid, misaligned = 1, 716  # cudaErrorInvalidValue, cudaErrorMisalignedAddress
    loaded = _cuda.load(library)
    buffer = ctypes.create_string_buffer(4096)
    start = (ctypes.addressof(buffer) + 15) // 16 * 16

    def copy(dst: int | None, src: int | None, size: int) -> int:
        return int(loaded.sw_measure_copy(dst, src, size, None))

    assert copy(None, None, 0) == 0
    assert copy(start, start + 1024, -1) == invalid
    assert copy(None, start, 16) == invalid
    assert copy(start, start + 1008, 1024) == invalid, "they overlap by 16 bytes"
    assert copy(start + 4, start + 2048, 16) == misaligned


def test_norms_check_their_arguments_before_any_launch(library: Path) -> None:
    invalid = 1
    loaded = _cuda.load(library)
    rows, width, no_processors = 0, 0, 0
    pointers, strides, options = (0,) * 7, (0, 0), (0.0, 0.0, 0, 0, 0)
    pack = _cuda.NORM_FORWARD.pack
    assert loaded.sw_norm_forward(pack(*pointers, *strides, rows, 8, *options)) == 0
    assert loaded.sw_norm_forward(pack(*pointers, *strides, 1, width, *options)) == invalid
    pointers, strides = (0,) * 9, (0, 0, 0)
    packed = _cuda.NORM_BACKWARD.pack(*pointers, *strides, rows, 8, 0.0, 0, 0, no_processors, 0)
    assert loaded.sw_norm_backward(packed) == invalid


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_launch_without_a_driver_is_an_error_code_with_a_text(library: Path) -> None:
    loaded = _cuda.load(library)
    buffer = ctypes.create_string_buffer(4096)
    start = (ctypes.addressof(buffer) + 15) // 16 * 16
    code = loaded.sw_measure_copy(start, start + 1024, 1024, None)
    assert code != 0
    assert len(loaded.sw_error_string(code)) > 10


def test_copy_refuses_cpu_tensors_by_name() -> None:
    with pytest.raises(ValueError, match="dst: got a tensor on cpu"):
        _cuda.measure_copy(torch.zeros(4), torch.zeros(4))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 1_000_003, 1 << 28])
def test_copy_moves_every_byte_and_no_other(size: int) -> None:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    guarded = torch.full((size + 64,), 255, dtype=torch.uint8, device="cuda")
    _cuda.measure_copy(guarded[:size], source)
    assert torch.equal(guarded[:size], source)
    assert bool((guarded[size:] == 255).all())


@pytest.mark.gpu
def test_copy_runs_on_the_current_stream() -> None:
    source = torch.ones(1 << 24, device="cuda")
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        source.mul_(3)
        _cuda.measure_copy(target, source)
    stream.synchronize()
    assert bool((target == 3).all())
