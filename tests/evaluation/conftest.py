"""The Markov source and its exact posterior, shared by the tests of evaluation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def markov() -> ModuleType:
    """The module markov.py beside this file."""
    spec = importlib.util.spec_from_file_location(
        "evaluation_markov", Path(__file__).with_name("markov.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
