"""The Markov source of the evaluation tests, here as something to sample from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def markov() -> ModuleType:
    """The module tests/evaluation/markov.py."""
    path = Path(__file__).resolve().parent.parent / "evaluation" / "markov.py"
    spec = importlib.util.spec_from_file_location("generation_markov", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
