"""What ``import stackwise`` costs and brings along, installed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("transformers", "datasets", "matplotlib", "tokenizers", "pyarrow", "pandas", "tensorboard")


def test_import_costs_little_more_than_torch(
    run_python: Callable[..., str], repository: Path, tmp_path: Path
) -> None:
    code = (
        "import torch, time\n"
        "start = time.perf_counter()\n"
        "import stackwise, stackwise.kernels\n"
        "from stackwise import StackWiseConfig\n"
        "print(time.perf_counter() - start)"
    )
    seconds = min(float(run_python(code, tmp_path, repository)) for _ in range(4))
    assert seconds <= 0.3


def test_heavy_packages_wait_until_they_are_needed(
    run_python: Callable[..., str], repository: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, stackwise, stackwise.kernels\n"
        "for name in stackwise.__all__: getattr(stackwise, name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run_python(code, tmp_path, repository) == "[]"


def test_a_checkout_works_without_installation(
    run_python: Callable[..., str], repository: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "def installed(finder): return '__editable__' in getattr(finder, '__module__', '')\n"
        "sys.meta_path = [finder for finder in sys.meta_path if not installed(finder)]\n"
        "import stackwise.kernels, stackwise\n"
        "from stackwise.kernels import rms_norm\n"
        "print(stackwise.kernels.__file__, stackwise.kernels.__name__)"
    )
    expected = f"{repository / 'kernels' / '__init__.py'} stackwise.kernels"
    assert run_python(code, tmp_path, repository) == expected


def test_a_checkout_uses_its_own_kernels_beside_another_installed_one(
    run_python: Callable[..., str], repository: Path, tmp_path: Path
) -> None:
    for name, package in (("own", "stackwise"), ("own", "kernels"), ("other", "kernels")):
        (tmp_path / name / package).mkdir(parents=True)
        (tmp_path / name / package / "__init__.py").write_text(f"marker = {name!r}\n")
    source = (repository / "stackwise" / "__init__.py").read_text()
    (tmp_path / "own" / "stackwise" / "__init__.py").write_text(source)
    code = (
        "import sys\n"
        "from importlib.util import spec_from_file_location\n"
        "class Editable:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'stackwise.kernels':\n"
        f"            return spec_from_file_location(name, {str(tmp_path)!r}"
        " + '/other/kernels/__init__.py')\n"
        "sys.meta_path.append(Editable())\n"
        "import stackwise.kernels\n"
        "print(stackwise.kernels.marker)"
    )
    assert run_python(code, tmp_path, tmp_path / "own") == "own"


def test_every_folder_with_python_files_is_a_package(repository: Path) -> None:
    files = [*repository.glob("stackwise/**/*.py"), *repository.glob("kernels/**/*.py")]
    assert len(files) > 30
    lacking = {file.parent for file in files if not (file.parent / "__init__.py").is_file()}
    assert not lacking, "the wheel would leave these out"


def test_unknown_names_are_attribute_errors() -> None:
    import stackwise

    with pytest.raises(AttributeError, match="no attribute 'UnifiedTrainers'"):
        _ = stackwise.UnifiedTrainers
    assert {"kernels", "UnifiedTrainer"} <= set(dir(stackwise))
