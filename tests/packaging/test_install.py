"""Real installations by pip into fresh environments; dependencies come from the running one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pip")

SHOW = (
    "import stackwise, stackwise.kernels, torch\n"
    "from stackwise.kernels import rms_norm\n"
    "x = torch.ones(2, 4)\n"
    "print(stackwise.__file__)\nprint(stackwise.kernels.__file__)\n"
    "print(rms_norm(x, torch.ones(4)).sum().item())"
)


@dataclass
class Environment:
    """A fresh virtual environment that sees the running one's packages, and a copy to install."""

    folder: Path
    source: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def pip_install(self, *arguments: str) -> None:
        command = [
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-build-isolation",
            *arguments,
        ]
        environment = {"STACKWISE_CUDA": "0", "PATH": "/usr/bin:/bin"}
        subprocess.run([self.python, *command], cwd=self.folder, env=environment, check=True)

    def stackwise(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "bin" / "stackwise"), *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True)


@pytest.fixture
def environment(repository: Path, tmp_path: Path) -> Environment:
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("stackwise", "kernels", "csrc"):
        shutil.copytree(repository / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Environment(folder, source)


def test_editable_installation_runs_from_the_checkout(
    environment: Environment, run_python: Callable[..., str], tmp_path: Path
) -> None:
    environment.pip_install("-e", str(environment.source))
    package, kernels, total = run_python(SHOW, tmp_path, python=environment.python).split("\n")
    assert package == str(environment.source / "stackwise" / "__init__.py")
    assert kernels == str(environment.source / "kernels" / "__init__.py")
    assert float(total) == pytest.approx(8.0, rel=1e-5)
    assert environment.stackwise("--help").returncode == 0


def test_installed_package_does_not_need_the_checkout(
    environment: Environment, run_python: Callable[..., str], tmp_path: Path
) -> None:
    environment.pip_install(str(environment.source))
    shutil.rmtree(environment.source)
    package, kernels, total = run_python(SHOW, tmp_path, python=environment.python).split("\n")
    assert package.startswith(str(environment.folder))
    assert kernels == str(Path(package).parent / "kernels" / "__init__.py")
    assert float(total) == pytest.approx(8.0, rel=1e-5)
    info = environment.stackwise("info")
    assert info.returncode == 0, info.stderr
    assert "attention" in info.stdout
    assert sys.prefix not in package
