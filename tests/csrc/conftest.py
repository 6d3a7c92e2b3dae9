"""The emulated library, built once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc.emulator import CSRC, Emulator, build


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    return build("stackwise_emulated", sorted(CSRC.glob("*.cu")))


@pytest.fixture
def emulator(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The cuda variants run on CPU tensors while the test lasts."""
    emulator = Emulator(emulated_library)
    emulator.install(monkeypatch)
    return emulator
