"""Every recipe in configs/ loads, says what it is for, and trains."""

from __future__ import annotations

import math
import pathlib

import pytest

from stackwise.config import StackWiseConfig
from stackwise.training.trainers import UnifiedTrainer

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))
EXPECTED = {
    "quickstart",
    "gpt2_fusion",
    "llama_layerwise",
    "mla_diffusion",
    "kernel_attention",
    "end_to_end",
    "finetune_causal",
}
SMALL = [
    "model.d_model=32",
    "model.n_heads=4",
    "training.seq_len=32",
    "training.batch_size=2",
    "training.warmup_steps=0",
    "training.mixed_precision=none",
    "training.device=cpu",
    "data.num_samples=120",
    "data.tokenizer_vocab_size=280",
    "evaluation.max_rows=4",
]


def test_the_recipes_are_the_ones_the_readme_lists():
    assert {path.stem for path in CONFIGS} == EXPECTED
    readme = (CONFIGS[0].parents[1] / "README.md").read_text()
    assert all(f"configs/{path.name}" in readme for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_round_trips(path, tmp_path):
    config = StackWiseConfig.from_yaml(str(path))
    config.to_yaml(str(tmp_path / "again.yaml"))
    assert StackWiseConfig.from_yaml(str(tmp_path / "again.yaml")) == config
    assert path.read_text().startswith("#")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    overrides = [*SMALL, "training.max_steps=4", f"run.dir={folder}", "run.id=pretrained"]
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    return str(UnifiedTrainer(StackWiseConfig.from_yaml(str(path), overrides)).train().run_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_trains(path, tmp_path, pretrained):
    overrides = [*SMALL, "training.max_steps=16", f"run.dir={tmp_path}"]
    if path.stem == "finetune_causal":
        overrides = [o for o in overrides if not o.startswith("model.")]
        overrides.append(f"model.init_from={pretrained}")
    losses = []
    trainer = UnifiedTrainer(
        StackWiseConfig.from_yaml(str(path), overrides),
        on_step=lambda record: losses.append(record["loss"]),
    )
    result = trainer.train()
    assert len(losses) == sum(stage["steps"] for stage in result.stages) >= 16
    assert 0 < result.stages[-1]["validation_loss"] < 1.05 * math.log(280)
