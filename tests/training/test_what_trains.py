"""What is meant to train changes, what is frozen stays bit-identical, the trained head is saved."""

from __future__ import annotations

import itertools

import pytest
import torch

from stackwise.runs import RunStore, load_run_model
from stackwise.training.loop import TrainingLoop
from stackwise.training.trainers import BlockTrainer, FusionTrainer, UnifiedTrainer


@pytest.fixture
def snapshots(monkeypatch):
    """Copies of the model's state before the first stage and after every stage."""
    taken: list[dict[str, torch.Tensor]] = []
    run_stage = TrainingLoop._run_stage

    def watched(self, stage, reporter):
        if not taken:
            taken.append(_copy(self.model))
        run_stage(self, stage, reporter)
        taken.append(_copy(self.model))

    monkeypatch.setattr(TrainingLoop, "_run_stage", watched)
    return taken


def _copy(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def _names(state, *prefixes: str) -> set[str]:
    return {name for name in state if name.startswith(prefixes)}


def test_layerwise_changes_exactly_one_block_and_the_head(make_config, snapshots):
    UnifiedTrainer(make_config("training.mode=layerwise")).train()
    head = ("head.", "final_norm.")
    for stage, (before, after) in enumerate(itertools.pairwise(snapshots)):
        expected = _names(before, f"blocks.{stage}.", *head)
        if stage == 0:
            expected |= _names(before, "embeddings.")
        assert _changed(before, after) == expected


def test_fusion_trainable_backbone_changes_every_block_so_far(make_config, snapshots):
    config = make_config("training.block_size=1", "training.backbone_lr=1e-3")
    FusionTrainer(config).train_with_trainable_backbone()
    for stage, (before, after) in enumerate(itertools.pairwise(snapshots)):
        blocks = {n for n in _changed(before, after) if n.startswith("blocks.")}
        assert blocks == _names(before, *(f"blocks.{k}." for k in range(stage + 1)))


def test_fusion_frozen_backbone_stays_bit_identical(make_config, snapshots):
    FusionTrainer(make_config("training.block_size=1")).train_with_frozen_backbone()
    for stage in (1, 2):
        changed = _changed(snapshots[stage], snapshots[stage + 1])
        assert not {n for n in changed if n.startswith(tuple(f"blocks.{k}." for k in range(stage)))}


def test_frozen_head_and_embeddings_stay_and_the_up_projection_can(make_config, snapshots):
    config = make_config(
        "training.mode=end_to_end",
        "training.train_embeddings=never",
        "training.train_head=never",
        "model.freeze_up_proj=true",
    )
    UnifiedTrainer(config).train()
    before, after = snapshots
    changed = _changed(before, after)
    assert changed
    assert all(n.startswith("blocks.") and "up_proj" not in n for n in changed)


def test_tied_head_is_one_matrix_and_rests_with_frozen_embeddings(make_config, snapshots):
    UnifiedTrainer(make_config("model.tie_embeddings=true", "training.mode=layerwise")).train()
    first, second = _changed(*snapshots[0:2]), _changed(*snapshots[1:3])
    assert "embeddings.token.weight" in first
    assert second == _names(snapshots[0], "blocks.1.", "final_norm.")


def test_saved_model_holds_the_trained_head_and_blocks(make_config, snapshots):
    result = BlockTrainer(make_config("training.block_size=1")).train_blocks()
    saved = load_run_model(result.run_path).state_dict()
    assert saved.keys() == snapshots[-1].keys()
    assert _changed(saved, snapshots[-1]) == set()
    store = RunStore.open(result.run_path)
    for index in range(3):
        for name, value in store.load_block(index).items():
            assert torch.equal(value, snapshots[-1][f"blocks.{index}.{name}"])


def test_embeddings_can_train_in_every_stage(make_config, snapshots):
    config = make_config("training.mode=layerwise", "training.train_embeddings=all")
    UnifiedTrainer(config).train()
    for before, after in itertools.pairwise(snapshots):
        assert "embeddings.token.weight" in _changed(before, after)


def test_optimiser_state_and_gradients_are_freed_between_stages(make_config, monkeypatch):
    left = []
    finish = TrainingLoop._finish_stage

    def watched(self, stage, reporter):
        left.append([n for n, p in self.model.named_parameters() if p.grad is not None])
        finish(self, stage, reporter)

    monkeypatch.setattr(TrainingLoop, "_finish_stage", watched)
    UnifiedTrainer(make_config("training.mode=layerwise")).train()
    assert left == [[], [], []]


def test_a_copy_of_the_configuration_is_trained_not_the_callers(make_config):
    config = make_config("training.mode=end_to_end", "training.max_steps=2")
    UnifiedTrainer(config).train()
    assert config.model.vocab_size is None


def test_blocks_that_no_stage_ran_are_left_out_of_the_saved_model(make_config):
    config = make_config(
        "training.mode=blockwise", "training.block_size=1", "training.total_blocks=2"
    )
    result = UnifiedTrainer(config).train()
    assert len(result.model.blocks) == len(load_run_model(result.run_path).blocks) == 2
    assert len(UnifiedTrainer.resume(result.run_path).train().model.blocks) == 2
