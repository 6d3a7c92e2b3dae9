from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stackwise.config.schema import StackWiseConfig
from stackwise.data import PreparedData, prepare_data

MakeConfig = Callable[..., StackWiseConfig]


def build_config(cache: Path, dataset: Path | str, **settings: object) -> StackWiseConfig:
    """A configuration with ``data`` fields from ``settings`` and ``seq_len`` for training."""
    config = StackWiseConfig()
    config.training.seq_len = int(settings.pop("seq_len", 32))  # type: ignore[call-overload]
    config.data.cache_dir = str(cache)
    config.data.dataset_path = str(dataset)
    for name, value in settings.items():
        setattr(config.data, name, value)
    return config


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    def make(dataset: Path | str, **settings: object) -> StackWiseConfig:
        return build_config(tmp_path / "cache", dataset, **settings)

    return make


@pytest.fixture(scope="session")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The built-in corpus in rows of 128, prepared once for all tests."""
    cache = tmp_path_factory.mktemp("builtin")
    return prepare_data(build_config(cache, "builtin", seq_len=128), progress=False)


STORY = (
    "The river was wide and slow, and the boat went where the water went.\n"
    "Nobody spoke; naïve gulls — and one 🦀 — were the only company.\n"
)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A user's own folder: 40 text files in two subfolders, each different, some multi-byte."""
    folder = tmp_path / "my texts"
    for number in range(40):
        place = folder / ("first" if number % 2 else "second")
        place.mkdir(parents=True, exist_ok=True)
        text = f"Chapter {number}.\n" + STORY * (1 + number % 5)
        (place / f"chapter{number:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "cover.png").write_bytes(b"\x89PNG")
    return folder
