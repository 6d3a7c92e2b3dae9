"""What every test runs under: one thread, no GPU, no network, caches of its own.

The environment is set before any test module imports torch or transformers, which read it once.
Under pytest-xdist the controller sets it and the workers inherit it, so they share one cache.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stackwise")
    group.addoption("--run-slow", action="store_true", help="run tests marked slow too")
    group.addoption("--run-gpu", action="store_true", help="run only the tests marked gpu")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    cache = tempfile.mkdtemp(prefix="stackwise-tests-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ |= {
        "STACKWISE_CACHE": cache,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    os.environ.pop("STACKWISE_IMPL", None)
    if not config.getoption("--run-gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run_gpu = config.getoption("--run-gpu")
    run_slow = config.getoption("--run-slow") or "slow" in (config.getoption("-m") or "").split()
    for item in items:
        is_gpu = item.get_closest_marker("gpu") is not None
        if is_gpu and not run_gpu:
            item.add_marker(pytest.mark.skip(reason="needs --run-gpu"))
        elif run_gpu and not is_gpu:
            item.add_marker(pytest.mark.skip(reason="--run-gpu runs only tests marked gpu"))
        elif item.get_closest_marker("slow") and not (run_slow or run_gpu):
            item.add_marker(pytest.mark.skip(reason="needs --run-slow"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same seeds, whichever tests ran before it in its process."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout the tests belong to."""
    return REPOSITORY
