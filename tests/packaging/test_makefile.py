"""The Makefile and the CI script, with a script standing in for Python that logs its calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

STAND_IN = """#!/bin/sh
echo "$(basename "$0") cuda=$STACKWISE_CUDA path=$PYTHONPATH $*" >> "{log}"
case "$*" in
  *version_info*) exit {too_old} ;;
  *ensurepip*) exit {no_venv} ;;
  --version) echo "Python 3.{minor}.0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip install"*"--target "*) mkdir -p "$(echo "$*" | sed "s/.*--target \\([^ ]*\\).*/\\1/")" ;;
  "-m pytest"*) echo "$(echo "$*" | wc -w) passed in 0.1s"; exit {tests_fail} ;;
esac
exit 0
"""


@dataclass
class Project:
    """A folder with the files the Makefile reads."""

    root: Path
    answers: dict[str, int] = field(
        default_factory=lambda: {"too_old": 0, "no_venv": 0, "minor": 11, "tests_fail": 0}
    )

    def run(self, *command: str, driver: bool = False) -> subprocess.CompletedProcess[str]:
        python = self.root / "bin" / "stand-in"
        python.write_text(STAND_IN.format(log=self.root / "log", **self.answers))
        python.chmod(0o755)
        smi = self.root / "bin" / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\nexit {0 if driver else 9}\n")
        smi.chmod(0o755)
        dropped = (
            "MAKEFLAGS",
            "MFLAGS",
            "MAKELEVEL",
            "VENV",
            "JOBS",
            "STACKWISE_CUDA",
            "PYTHONPATH",
        )
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"PYTHON": str(python), "PATH": f"{python.parent}:{os.environ['PATH']}"}
        return subprocess.run(
            command, cwd=self.root, env=env, capture_output=True, text=True, check=False
        )

    def log(self) -> list[str]:
        """The calls since the last look, one line each."""
        path = self.root / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Project:
    (tmp_path / "bin").mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(repository / name, tmp_path)
    shutil.copytree(repository / ".ci", tmp_path / ".ci")
    return Project(tmp_path)


def installs(log: list[str]) -> list[str]:
    return [line for line in log if "pip install" in line]


def test_help_is_the_default_and_lists_every_target(project: Project) -> None:
    listed = re.findall(r"^  make ([a-z-]+) +\S", project.run("make").stdout, re.MULTILINE)
    makefile = (project.root / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert sorted(listed) == sorted(phony[1].split())
    assert {"help", "demo", "test", "test-all", "bench", "lint"} <= set(listed)
    assert project.log() == [], "help needs no environment"


def test_the_environment_is_made_once_and_again_when_its_inputs_change(project: Project) -> None:
    assert project.run("make", "test").returncode == 0
    first = project.log()
    assert [line for line in first if "-m venv .venv" in line]
    assert len(installs(first)) == 1
    assert first[-1].startswith("python ")
    assert "-m pytest" in first[-1]
    assert "-m not slow and not gpu" in first[-1]

    assert project.run("make", "test").returncode == 0
    assert not installs(project.log())

    for name in ("pyproject.toml", "setup.py", "constraints-cpu.txt"):
        os.utime(project.root / name)
        assert project.run("make", "test").returncode == 0
        assert len(installs(project.log())) == 1, name


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="a driver is there")
def test_the_driver_decides_about_torch_and_the_library(project: Project) -> None:
    project.run("make", "demo")
    (without,) = installs(project.log())
    assert "cuda=0 " in without
    assert "-c constraints-cpu.txt" in without
    shutil.rmtree(project.root / ".venv")
    project.run("make", "demo", driver=True)
    (with_driver,) = installs(project.log())
    assert "cuda= " in with_driver
    assert "constraints" not in with_driver


def test_an_existing_environment_is_used_as_it_is(project: Project) -> None:
    assert project.run("make", "test", "VENV=").returncode == 0
    (only,) = project.log()
    assert only.startswith("stand-in ")
    assert "-m pytest" in only
    assert not (project.root / ".venv").exists()


def test_a_failed_installation_is_tried_again(project: Project) -> None:
    (project.root / ".venv" / "bin").mkdir(parents=True)
    project.answers["no_venv"] = 1
    assert project.run("make", "test").returncode != 0
    project.log()
    project.answers["no_venv"] = 0
    assert project.run("make", "test").returncode == 0
    assert len(installs(project.log())) == 1


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"too_old": 1, "minor": 8}, "needs Python 3.10 or newer, but '.*stand-in' is: Python 3.8"),
        ({"no_venv": 1}, "cannot make virtual environments .*python3-venv"),
    ],
    ids=["too_old", "no_venv"],
)
def test_an_unusable_python_is_named(
    project: Project, answers: dict[str, int], message: str
) -> None:
    project.answers |= answers
    result = project.run("make", "demo")
    assert result.returncode != 0
    assert re.search(message, result.stderr)
    assert not (project.root / ".venv").exists()


def test_test_all_adds_the_slow_tests_the_oldest_triton_and_all_machine_code(
    project: Project,
) -> None:
    arguments = ("make", "test-all", "VENV=", "JOBS=3", "PYTEST_ARGS=-k name")
    assert project.run(*arguments).returncode == 0
    quick, slow, install, version, old, compiled = project.log()
    assert "-n 3" in quick
    assert quick.endswith("-m not slow and not gpu -k name")
    assert slow.endswith("--run-slow -m slow and not gpu -k name")
    assert "--no-deps --target build/triton-3.6.0 triton==3.6.0" in install
    assert 'triton.__version__ == "3.6.0"' in version
    chosen = "interpreter or sample or plain_training"
    assert f"tests/triton -m not slow and not gpu -k {chosen} -k name" in old
    assert "path=build/triton-3.6.0 " in old
    assert "path= " in quick
    assert compiled.endswith("-m benchmarks.machine_code --all --processes 3")
    project.run(*arguments)
    assert not installs(project.log()), "it is installed once"


def test_the_oldest_triton_lies_in_the_environment(project: Project) -> None:
    assert project.run("make", "test-old-triton").returncode == 0
    assert (project.root / ".venv" / "triton-3.6.0" / ".installed").exists()
    assert "path=.venv/triton-3.6.0 " in project.log()[-1]


def test_gpu_check_takes_a_budget_and_a_folder(project: Project) -> None:
    project.run("make", "gpu-check", "VENV=")
    project.run("make", "gpu-check", "VENV=", "BUDGET=60", "OUT=elsewhere")
    first, second = project.log()
    assert first.endswith("-m benchmarks.gpu_check --budget 480 --out build/gpu-check")
    assert second.endswith("-m benchmarks.gpu_check --budget 60 --out elsewhere")
    assert first.startswith("stand-in "), "no environment is made, nothing is installed"


def test_ci_ends_with_the_summaries(project: Project) -> None:
    result = project.run(".ci/run")
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-3:]
    for part, line in zip(("test", "test-slow", "test-old-triton"), last, strict=True):
        assert re.fullmatch(rf"make {part}: \d+ passed in 0\.1s", line)
    calls = "\n".join(project.log())
    assert "-m ruff check" in calls
    assert "-m mypy" in calls


def test_ci_fails_when_a_test_fails(project: Project) -> None:
    project.answers["tests_fail"] = 1
    assert project.run(".ci/run").returncode != 0
