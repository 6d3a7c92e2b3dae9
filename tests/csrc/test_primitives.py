"""The two faces of the primitive layer: the same kernels compile for both and compute the same."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.emulator import CSRC, Emulator, build
from tests.csrc.nvcc import nvcc
from tests.csrc.test_negative import BROKEN, CASES, X

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def conversions() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("conversions", [FOLDER / "conversions.cu"])))
    for function in (library.sw_test_round, library.sw_test_widen):
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return library


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_conversions_of_the_emulator_are_those_of_pytorch(
    conversions: ctypes.CDLL, dtype: torch.dtype
) -> None:
    half = dtype == torch.float16
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    wide = torch.empty(len(every))
    conversions.sw_test_widen(half, every.data_ptr(), wide.data_ptr(), len(every))
    exact = every.view(dtype).float()
    assert torch.equal(wide.nan_to_num(nan=-7.0), exact.nan_to_num(nan=-7.0))
    assert torch.equal(wide.isnan(), exact.isnan())

    # Every value, what lies between neighbours, exactly half way and beside it, and beyond them.
    finite = exact[exact.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    around = [middle, middle.nextafter(torch.tensor(torch.inf)), middle * 1.0001]
    extreme = torch.tensor([torch.inf, -torch.inf, 65519.99, 65520.0, 3.4e38, -3.4e38, 1e-45])
    numbers = torch.cat([exact, *around, extreme, 1e3 * torch.randn(10_000)])
    rounded = torch.empty(len(numbers), dtype=torch.int16)
    conversions.sw_test_round(half, numbers.data_ptr(), rounded.data_ptr(), len(numbers))
    expected = numbers.to(dtype)
    assert torch.equal(rounded.view(dtype).isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(rounded[number], expected.view(torch.int16)[number])


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 100_003])
def test_the_measured_copy_moves_every_byte_and_no_other(emulator: Emulator, size: int) -> None:
    library = emulator.library
    source = torch.randint(0, 255, (size,), dtype=torch.uint8)
    guarded = torch.full((size + 64,), 255, dtype=torch.uint8)
    library.sw_emu_register(source.data_ptr(), size, False, b"src")
    library.sw_emu_register(guarded.data_ptr(), size, True, b"dst")
    code = library.sw_measure_copy(guarded.data_ptr(), source.data_ptr(), size, None)
    library.sw_emu_clear()
    assert code == 0, library.sw_error_string(code).decode()
    assert torch.equal(guarded[:size], source)
    assert bool((guarded[size:] == 255).all())


def compile_with_nvcc(output: Path, archs: tuple[str, ...]) -> Path:
    command = [nvcc(), "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-I", str(CSRC), "-o", str(output), str(BROKEN / "broken.cu")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output


def test_the_emulated_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(compile_with_nvcc(tmp_path / "kernels.so", ("80", "90a"))))
    assert library.sw_test_run(b"no such kernel", 0, None, None, 0) == -1


@pytest.fixture(scope="module")
def gpu_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    output = tmp_path_factory.mktemp("kernels") / "kernels.so"
    library = ctypes.CDLL(str(compile_with_nvcc(output, (f"{major}{minor}",))))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.sw_test_run.argtypes = [ctypes.c_char_p, number, pointer, pointer, number]
    return library


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_right_kernels_compute_the_same_on_a_gpu(gpu_kernels: ctypes.CDLL, name: str) -> None:
    x = X.cuda()
    y: Tensor = torch.zeros_like(x)
    torch.cuda.synchronize()
    code = gpu_kernels.sw_test_run(name.encode(), 0, x.data_ptr(), y.data_ptr(), len(x))
    torch.cuda.synchronize()
    assert code == 0
    assert torch.equal(y.cpu(), CASES[name][0])
