"""setup.py: what is built when, with which compiler, and what the wheel is called and holds.

A script stands in for nvcc where only its command line matters.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

LIBRARY = "libstackwise_cuda.so"
FAKE_NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V0"; exit 0; fi
echo "$@" >> "$(dirname "$0")/commands"
while [ "$1" != -o ]; do shift; done
[ {status} = 0 ] && echo "{name}" > "$2"
exit {status}
"""


@dataclass
class Checkout:
    """A copy of the sources with stand-ins for nvcc beside it."""

    root: Path

    def nvcc(self, name: str = "nvcc", release: str = "13.0", status: int = 0) -> Path:
        path = self.root.parent / name / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(FAKE_NVCC.format(release=release, status=status, name=name))
        path.chmod(0o755)
        return path

    def commands(self, nvcc: Path) -> str:
        log = nvcc.parent / "commands"
        return log.read_text() if log.exists() else ""

    def setup(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            k: v for k, v in os.environ.items() if k != "CUDA_HOME" and "STACKWISE" not in k
        }
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *command],
            cwd=self.root,
            env=inherited | {"PATH": "/usr/bin:/bin"} | env,
            capture_output=True,
            text=True,
            check=False,
        )

    def wheel(self, **env: str) -> tuple[Path, str]:
        """The built wheel and what the build said."""
        out = self.root.parent / "wheels"
        shutil.rmtree(out, ignore_errors=True)
        result = self.setup("bdist_wheel", "--dist-dir", str(out), **env)
        assert result.returncode == 0, result.stderr
        (wheel,) = out.iterdir()
        return wheel, result.stderr


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Checkout:
    root = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("stackwise", "kernels", "csrc"):
        shutil.copytree(repository / name, root / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, root)
    return Checkout(root)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_without_the_library_is_for_any_machine(checkout: Checkout) -> None:
    stale = checkout.root / "kernels" / LIBRARY
    stale.write_text("of an earlier build")
    wheel, said = checkout.wheel(STACKWISE_CUDA="0")

    assert wheel.name.endswith("-py3-none-any.whl")
    assert "CUDA kernels NOT BUILT (STACKWISE_CUDA=0)" in said
    assert not stale.exists()
    files = names(wheel)
    assert not any(name.endswith(".so") for name in files)
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in files)
    for folder, target in (("stackwise", "stackwise"), ("kernels", "stackwise/kernels")):
        for source in (checkout.root / folder).rglob("*.py"):
            assert f"{target}/{source.relative_to(checkout.root / folder)}" in files


def test_a_wheel_with_the_library_is_for_this_platform(checkout: Checkout) -> None:
    nvcc = checkout.nvcc()
    wheel, said = checkout.wheel(STACKWISE_NVCC=str(nvcc))

    assert "-py3-none-linux_" in wheel.name
    assert "CUDA kernels built for sm_80, sm_90a, sm_100a" in said
    assert f"stackwise/kernels/{LIBRARY}" in names(wheel)
    command = checkout.commands(nvcc)
    assert "-cudart static" in command
    assert '-DSW_BUILD_ARCHS="80;90a;100a"' in command
    for code in ("80,code=sm_80", "90a,code=sm_90a", "100a,code=sm_100a", "80,code=compute_80"):
        assert f"-gencode arch=compute_{code} " in command

    skipped, _ = checkout.wheel(STACKWISE_CUDA="0")
    assert not any(name.endswith(".so") for name in names(skipped)), "left by the build before"


@pytest.mark.parametrize(
    ("env", "release", "archs"),
    [
        ({"STACKWISE_CUDA_ARCHS": "89; 120"}, "13.0", "89;120"),
        ({}, "12.4", "80;90a"),
        ({}, "11.8", "80"),
    ],
    ids=["named", "cuda_12.4", "cuda_11.8"],
)
def test_architectures_are_those_named_or_those_nvcc_knows(
    checkout: Checkout, env: dict[str, str], release: str, archs: str
) -> None:
    nvcc = checkout.nvcc(release=release)
    result = checkout.setup("build_ext", "--inplace", STACKWISE_NVCC=str(nvcc), **env)
    assert result.returncode == 0, result.stderr
    assert f'-DSW_BUILD_ARCHS="{archs}"' in checkout.commands(nvcc)
    assert (checkout.root / "kernels" / LIBRARY).exists()


def test_nvcc_is_looked_for_in_the_documented_order(checkout: Checkout) -> None:
    named, home, path = (checkout.nvcc(name) for name in ("named", "home", "path"))
    env = {
        "STACKWISE_NVCC": str(named),
        "CUDA_HOME": str(home.parent.parent),
        "PATH": f"{path.parent}:/usr/bin:/bin",
    }
    for expected, drop in ((named, "STACKWISE_NVCC"), (home, "CUDA_HOME"), (path, "PATH")):
        result = checkout.setup("build_ext", "--inplace", "--force", **env)
        assert result.returncode == 0, result.stderr
        assert (checkout.root / "kernels" / LIBRARY).read_text().strip() == expected.parts[-3]
        del env[drop]


def test_a_failed_build_leaves_no_library_and_is_said(checkout: Checkout) -> None:
    stale = checkout.root / "kernels" / LIBRARY
    stale.write_text("of an earlier build")
    nvcc = checkout.nvcc(status=2)
    wheel, said = checkout.wheel(STACKWISE_NVCC=str(nvcc))
    assert "CUDA kernels NOT BUILT (nvcc failed with exit status 2)" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not stale.exists()

    required = checkout.setup("bdist_wheel", STACKWISE_NVCC=str(nvcc), STACKWISE_CUDA="1")
    assert required.returncode != 0
    assert "nvcc failed with exit status 2" in required.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"STACKWISE_CUDA": "yes"}, "STACKWISE_CUDA='yes': expected 0, 1 or nothing"),
        ({"STACKWISE_NVCC": "/no/such/nvcc"}, "STACKWISE_NVCC=/no/such/nvcc: no such program"),
        ({"STACKWISE_CUDA_ARCHS": "sm_90"}, "'sm_90': expected numbers such as '80;90a;100a'"),
    ],
    ids=["choice", "nvcc", "archs"],
)
def test_wrong_settings_are_named(checkout: Checkout, env: dict[str, str], message: str) -> None:
    settings = {"STACKWISE_NVCC": str(checkout.nvcc())} | env
    result = checkout.setup("--version", **settings)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_required_library_without_nvcc_is_an_error(checkout: Checkout) -> None:
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("nvcc is installed in its usual place")
    result = checkout.setup("--version", STACKWISE_CUDA="1")
    assert result.returncode != 0
    assert "STACKWISE_CUDA=1, but no nvcc" in result.stderr
