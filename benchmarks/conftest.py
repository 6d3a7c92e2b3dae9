"""The option of ``pytest benchmarks``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-size", action="store_true", help="the sizes of `stackwise bench`, not of --quick"
    )
