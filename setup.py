"""Builds csrc/*.cu with nvcc into one plain-C library inside stackwise/kernels.

No torch, Python ABI or GPU is needed at build time. Metadata is in pyproject.toml. Environment:

STACKWISE_CUDA        0 skips the library; 1 makes a missing nvcc or a failed build an error;
                      unset builds it where nvcc is found.
STACKWISE_CUDA_ARCHS  architectures, default "80;90a;100a" as far as nvcc knows them.
STACKWISE_NVCC        nvcc to use; else $CUDA_HOME/bin, PATH, /usr/local/cuda/bin.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
LIBRARY = "libstackwise_cuda.so"
EXTENSION = "stackwise.kernels._cuda"
DEFAULT_ARCHS = {"80": (11, 0), "90a": (12, 0), "100a": (12, 8)}  # since which CUDA version


@dataclass(frozen=True)
class CudaBuild:
    """What will be built, decided once from the environment."""

    required: bool
    nvcc: str | None
    archs: tuple[str, ...]
    reason: str  # why nothing is built; empty when something is

    @classmethod
    def from_environment(cls) -> CudaBuild:
        choice = os.environ.get("STACKWISE_CUDA", "")
        if choice not in ("", "0", "1"):
            raise SystemExit(f"stackwise: STACKWISE_CUDA={choice!r}: expected 0, 1 or nothing")
        if choice == "0":
            return cls(False, None, (), "STACKWISE_CUDA=0")
        nvcc = find_nvcc()
        if nvcc is None:
            reason = "no nvcc in STACKWISE_NVCC, CUDA_HOME, PATH or /usr/local/cuda"
            if choice == "1":
                raise SystemExit(f"stackwise: STACKWISE_CUDA=1, but {reason}")
            return cls(False, None, (), reason)
        return cls(choice == "1", nvcc, build_archs(nvcc), "")


def find_nvcc() -> str | None:
    """Path of nvcc; SystemExit when STACKWISE_NVCC names one that is not there."""
    named = os.environ.get("STACKWISE_NVCC")
    if named:
        if not (os.path.isfile(named) and os.access(named, os.X_OK)):
            raise SystemExit(f"stackwise: STACKWISE_NVCC={named}: no such program")
        return named
    home = os.environ.get("CUDA_HOME")
    candidates = [home and os.path.join(home, "bin", "nvcc"), shutil.which("nvcc")]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def build_archs(nvcc: str) -> tuple[str, ...]:
    named = os.environ.get("STACKWISE_CUDA_ARCHS")
    if named:
        archs = tuple(arch.strip() for arch in named.split(";") if arch.strip())
        wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
        if wrong or not archs:
            raise SystemExit(
                f"stackwise: STACKWISE_CUDA_ARCHS={named!r}: expected numbers such as '80;90a;100a'"
            )
        return archs
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(release[1]), int(release[2])) if release else (11, 0)
    return tuple(arch for arch, since in DEFAULT_ARCHS.items() if version >= since)


def nvcc_command(build: CudaBuild, sources: list[str], output: str) -> list[str]:
    # PTX of the oldest one: the driver compiles it for GPUs that have no code of their own.
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in build.archs]
    portable = [int(arch) for arch in build.archs if arch.isdigit()]
    if portable:
        codes.append(f"arch=compute_{min(portable)},code=compute_{min(portable)}")
    return [
        str(build.nvcc),
        *("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
        *("-cudart", "static", "--threads", "0"),
        *(flag for code in codes for flag in ("-gencode", code)),
        f'-DSW_BUILD_ARCHS="{";".join(build.archs)}"',
        *("-I", str(ROOT / "csrc"), "-o", output, *sources),
    ]


CUDA = CudaBuild.from_environment()


class NvccBuild(build_ext):
    """Compiles the one extension with nvcc and gives it a name without a Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        # Called with "stackwise.kernels._cuda" and, for in-place builds, with "_cuda" alone.
        *package, last = fullname.split(".")
        if last != "_cuda":
            return super().get_ext_filename(fullname)
        return os.path.join(*package, LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        command = nvcc_command(CUDA, ext.sources, str(partial))
        say(" ".join(command))
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            partial.unlink(missing_ok=True)
            delete_stale_library(self.build_lib)
            Wheel.has_library = False
            say(f"CUDA kernels NOT BUILT (nvcc failed with exit status {status})")
            raise CompileError(f"nvcc failed with exit status {status}")
        os.replace(partial, output)
        say(f"CUDA kernels built for sm_{', sm_'.join(CUDA.archs)}: {output}")


class BuildPython(build_py):
    """Deletes a library left by an earlier build when this one has none."""

    def run(self) -> None:
        super().run()
        if CUDA.nvcc is None:
            delete_stale_library(self.build_lib)
            say(f"CUDA kernels NOT BUILT ({CUDA.reason}); the other variants remain.")


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library inside, py3-none-any without."""

    has_library = CUDA.nvcc is not None

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not self.has_library

    def get_tag(self) -> tuple[str, str, str]:
        platform = self.plat_name or sysconfig.get_platform()
        return "py3", "none", re.sub(r"[-. ]", "_", platform) if self.has_library else "any"


def delete_stale_library(build_lib: str | None) -> None:
    built = Path(build_lib or "build/lib") / "stackwise" / "kernels"
    for folder in (ROOT / "kernels", built):
        (folder / LIBRARY).unlink(missing_ok=True)


def say(message: str) -> None:
    print(f"stackwise: {message}", file=sys.stderr, flush=True)


library = Extension(
    EXTENSION,
    sorted(glob.glob("csrc/*.cu")),
    depends=[*glob.glob("csrc/*.h"), *glob.glob("csrc/*.cuh")],
    optional=not CUDA.required,
)
kernels = ["stackwise.kernels", *(f"stackwise.kernels.{p}" for p in find_packages("kernels"))]
setup(
    packages=[*find_packages(include=["stackwise", "stackwise.*"]), *kernels],
    package_dir={"stackwise": "stackwise", "stackwise.kernels": "kernels"},
    package_data={"stackwise": ["py.typed"], "stackwise.kernels": ["*.json"]},
    include_package_data=False,
    ext_modules=[library] if CUDA.nvcc else [],
    cmdclass={"build_ext": NvccBuild, "build_py": BuildPython, "bdist_wheel": Wheel},
)
