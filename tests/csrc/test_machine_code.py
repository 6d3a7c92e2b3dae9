"""Machine code of csrc/norm_*.cuh as nvcc makes it: no spills, no local memory, 16-byte accesses.

Needs nvcc, and for the instructions a disassembler: CUDA's own or the one that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.nvcc import disassembler, nvcc

ARCHS = ("80", "90a", "100a", "120")

# Per multiprocessor: the registers, and the threads of a backward block that must fit them.
REGISTERS, BACKWARD_THREADS = 65536, 512

KEY_KERNELS = (
    *("NormForward<bfloat16, bfloat16, 8, 4, true>", "NormForward<float, float, 4, 4, false>"),
    *("NormBackward<bfloat16, 8, 2, true, true>", "NormBackward<float, 4, 4, true, false>"),
    "NormBackwardAny<bfloat16, 8, true>",
)
# A row of 16,384 elements in registers, beside its sums and the row ahead.
TOO_MUCH = "NormBackward<bfloat16, 8, 4, true, true>"


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel; ``spills`` in bytes, ``stack`` in bytes per thread."""

    kernel: str
    stack: int
    spills: int
    registers: int
    barriers: int


def compile_for(arch: str, source: Path, repository: Path, cubin: Path) -> list[Usage]:
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = [nvcc(), "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", "-gencode", code]
    command += ["-I", str(repository / "csrc"), "-o", str(cubin), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if arch not in ("80", "90a") and "Unsupported gpu architecture" in result.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert result.returncode == 0, result.stderr
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers, used (\d+) barriers"
    )
    found = re.findall(pattern, result.stderr, re.DOTALL)
    return [
        Usage(name, int(stack), int(stored) + int(loaded), int(registers), int(barriers))
        for name, stack, stored, loaded, registers, barriers in found
    ]


def instantiate(kernels: tuple[str, ...], folder: Path) -> Path:
    lines = ['#include "norm_backward.cuh"', '#include "norm_forward.cuh"', "namespace sw {"]
    by_value = "const __grid_constant__ "
    for i, kernel in enumerate(kernels):
        lines.append(f"using K{i} = {kernel};")
        lines.append(f"template __global__ void kernel_entry<K{i}>({by_value}K{i}::Params);")
    source = folder / "kernels.cu"
    source.write_text("\n".join([*lines, "}", ""]))
    return source


def faults(usage: Usage) -> list[str]:
    found = []
    if usage.spills:
        found.append(f"{usage.kernel} spills {usage.spills} bytes")
    if usage.stack:
        found.append(f"{usage.kernel} uses {usage.stack} bytes of local memory")
    if usage.registers * BACKWARD_THREADS > REGISTERS:
        found.append(f"{usage.kernel} needs {usage.registers} registers")
    if usage.barriers > 1 and "NormBackward" not in usage.kernel:
        found.append(f"{usage.kernel} owns {usage.barriers} barriers: few blocks are resident")
    return found


def test_key_kernels_on_hopper(repository: Path, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    usages = compile_for("90a", instantiate(KEY_KERNELS, tmp_path), repository, cubin)
    assert len(usages) == len(KEY_KERNELS)
    assert [fault for usage in usages for fault in faults(usage)] == []
    sass = subprocess.run(
        [disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    functions = sass.split("Function : ")[1:]
    assert len(functions) == len(KEY_KERNELS)
    for function in functions:
        name = function.split("\n", 1)[0]
        assert re.search(r"LDG\.E\.(EF\.)?128", function), f"{name}: no 16-byte load"
        assert re.search(r"STG\.E\.128", function), f"{name}: no 16-byte store"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name}: local memory"


def test_a_configuration_that_spills_is_found(repository: Path, tmp_path: Path) -> None:
    source = instantiate((TOO_MUCH,), tmp_path)
    (usage,) = compile_for("90a", source, repository, tmp_path / "kernels.cubin")
    assert any("spills" in fault for fault in faults(usage))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel(arch: str, repository: Path, tmp_path: Path) -> None:
    for name, count in (("norm_forward", 30), ("norm_backward", 27), ("library", 1)):
        source = repository / "csrc" / f"{name}.cu"
        if name == "library":
            text = source.read_text()
            source = tmp_path / "library.cu"
            source.write_text(f'#define SW_BUILD_ARCHS "{arch}"\n{text}')
        usages = compile_for(arch, source, repository, tmp_path / f"{name}.cubin")
        assert len(usages) == count
        assert [fault for usage in usages for fault in faults(usage)] == []
