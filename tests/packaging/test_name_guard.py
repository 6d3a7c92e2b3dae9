"""The folder kernels/ never stands in the way of the PyPI package of the same name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TRANSFORMERS = (
    "from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM\n"
)


@pytest.fixture
def pypi_kernels(tmp_path: Path) -> Path:
    """A site folder with a stand-in for the PyPI package, its metadata included."""
    site = tmp_path / "site"
    package = site / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "__version__ = '0.12.3'\nfrom kernels.layer import Marker\n"
        "def get_kernel(*args, **kwargs): raise OSError('offline')\n"
    )
    (package / "layer.py").write_text("class Marker: pass\n")
    metadata = site / "kernels-0.12.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.12.3\n")
    return site


def test_transformers_imports_from_the_repository_root(
    run_python: Callable[..., str], repository: Path
) -> None:
    code = TRANSFORMERS + (
        "config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=4)\n"
        "print(GPT2LMHeadModel(config).num_parameters() > 0)\n"
        "from stackwise import kernels\n"
        "print(kernels.__name__)"
    )
    assert run_python(code, repository) == "True\nstackwise.kernels"


def test_without_the_pypi_package_the_version_is_older_than_any(
    run_python: Callable[..., str], repository: Path
) -> None:
    code = "import kernels\nprint(kernels.__version__, kernels.__file__, hasattr(kernels, 'rope'))"
    assert run_python(code, repository) == f"0 {repository / 'kernels' / '__init__.py'} False"


def test_the_pypi_package_is_handed_over_whole(
    run_python: Callable[..., str], repository: Path, pypi_kernels: Path
) -> None:
    code = (
        "import kernels, kernels.layer, sys\n"
        "print(kernels.__version__, kernels.layer.Marker is kernels.Marker)\n"
        "print(kernels.__file__, kernels.__spec__.origin == kernels.__file__)\n"
        "print(sorted(name for name in sys.modules if name.startswith('kernels')))"
    )
    assert run_python(code, repository, pypi_kernels).split("\n") == [
        "0.12.3 True",
        f"{pypi_kernels / 'kernels' / '__init__.py'} True",
        "['kernels', 'kernels.layer']",
    ]


def test_transformers_sees_the_pypi_package(
    run_python: Callable[..., str], repository: Path, pypi_kernels: Path
) -> None:
    code = TRANSFORMERS.replace("from", "import kernels\nfrom") + (
        "import stackwise.kernels\nprint(kernels.__version__, stackwise.kernels.__name__)"
    )
    assert run_python(code, repository, pypi_kernels) == "0.12.3 stackwise.kernels"


def test_two_checkouts_on_the_path_do_not_hand_over_to_each_other(
    run_python: Callable[..., str], repository: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "kernels"
    other.mkdir(parents=True)
    for name in ("__init__.py", "_name_guard.py"):
        (other / name).write_text((repository / "kernels" / name).read_text())
    code = "import kernels\nprint(kernels.__version__)"
    assert run_python(code, repository, other.parent) == "0"


def test_a_failing_pypi_package_reports_its_own_error(
    run_python: Callable[..., str], repository: Path, pypi_kernels: Path
) -> None:
    (pypi_kernels / "kernels" / "__init__.py").write_text("raise ImportError('its own reason')")
    code = (
        "try:\n    import kernels\nexcept ImportError as error:\n    print(error)\n"
        "import sys\nprint('kernels' in sys.modules)"
    )
    assert run_python(code, repository, pypi_kernels) == "its own reason\nFalse"
