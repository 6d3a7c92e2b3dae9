"""A tiny corpus and configuration that train in seconds on one core."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.loading import apply_overrides

SENTENCE = "the stack holds a frame for every call and a block of names that it can reach"
WORDS = SENTENCE.split()

TINY = [
    "model.d_model=32",
    "model.n_layers=3",
    "model.n_heads=2",
    "model.d_ff=64",
    "training.seq_len=32",
    "training.batch_size=4",
    "training.max_steps=12",
    "training.warmup_steps=2",
    "training.log_interval=1",
    "training.save_interval=2",
    "training.device=cpu",
    "training.num_threads=1",
    "data.tokenizer_vocab_size=280",
    "data.validation_fraction=0.1",
    "evaluation.samples=1",
]


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of .txt files with seeded sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for index in range(60):
        words = [rng.choice(WORDS) for _ in range(rng.randint(8, 60))]
        (folder / f"{index}.txt").write_text(" ".join(words))
    return str(folder)


@pytest.fixture
def make_config(tmp_path, corpus_folder) -> Callable[..., StackWiseConfig]:
    """``make_config("training.mode=fused", ...)``: the tiny configuration with overrides."""

    def make(*overrides: str) -> StackWiseConfig:
        places = [
            f"run.dir={tmp_path / 'runs'}",
            f"data.dataset_path={corpus_folder}",
            f"data.cache_dir={tmp_path.parent / 'prepared'}",
        ]
        return apply_overrides(StackWiseConfig(), [*TINY, *places, *overrides])

    return make
