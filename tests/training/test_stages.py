"""Every mode builds the stages it promises."""

from __future__ import annotations

import pytest

from stackwise.config import ConfigError, StackWiseConfig
from stackwise.config.loading import apply_overrides
from stackwise.training.stages import Stage, build_stages


def stages(*overrides: str) -> list[Stage]:
    base = ["model.n_layers=6", "training.max_steps=60", "training.block_size=2"]
    return build_stages(apply_overrides(StackWiseConfig(), [*base, *overrides]))


def test_layerwise_trains_one_block_per_stage_on_a_frozen_prefix():
    built = stages("training.mode=layerwise")
    assert [s.trainable for s in built] == [(k,) for k in range(6)]
    assert [s.depth for s in built] == [1, 2, 3, 4, 5, 6]
    assert [s.frozen_prefix for s in built] == [0, 1, 2, 3, 4, 5]
    assert [s.train_embeddings for s in built] == [True] + [False] * 5
    assert all(s.train_head and s.source == "tokens" for s in built)
    assert [s.steps for s in built] == [10] * 6


def test_blockwise_groups_blocks_and_total_blocks_limits_them():
    assert [(s.start, s.stop) for s in stages("training.mode=blockwise")] == [
        (0, 2),
        (2, 4),
        (4, 6),
    ]
    built = stages("training.mode=blockwise", "training.block_size=4")
    assert [(s.start, s.stop) for s in built] == [(0, 4), (4, 6)]
    built = stages("training.mode=blockwise", "training.total_blocks=2")
    assert [(s.start, s.stop) for s in built] == [(0, 2), (2, 4)]
    assert sum(s.steps for s in built) == 60


def test_fusion_trains_the_backbone_only_when_asked_with_its_own_rate():
    rates = ["training.current_block_lr=5e-4", "training.backbone_lr=1e-5"]
    frozen = stages("training.mode=fused", *rates)
    assert [s.trainable for s in frozen] == [(0, 1), (2, 3), (4, 5)]
    trainable = stages("training.mode=fused", "training.fusion_mode=trainable", *rates)
    assert [s.trainable for s in trainable] == [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)]
    assert {(s.lr, s.backbone_lr) for s in trainable} == {(5e-4, 1e-5)}


def test_joint_phase_comes_last_and_on_top():
    built = stages("training.mode=layerwise", "training.joint_tuning_steps=7")
    joint = built[-1]
    assert (joint.kind, joint.steps, joint.trainable) == ("joint", 7, tuple(range(6)))
    assert joint.train_embeddings
    assert joint.train_head
    assert sum(s.steps for s in built[:-1]) == 60


def test_end_to_end_is_one_stage():
    (stage,) = stages("training.mode=end_to_end")
    assert (stage.start, stage.stop, stage.steps) == (0, 6, 60)
    assert stage.train_embeddings


def test_cache_is_read_by_every_stage_after_the_first():
    built = stages("training.mode=layerwise", "training.activation_cache=true")
    assert [s.source for s in built] == ["tokens"] + ["cache"] * 5
    assert {(s.plan.low, s.plan.high) for s in built[1:]} == {(0.15, 0.9)}
    fused = stages(
        "training.mode=fused", "training.activation_cache=true", "training.cache_mode=fusion"
    )
    assert [s.source for s in fused] == ["tokens", "cache", "cache"]


def test_init_from_runs_the_whole_stack_in_every_stage():
    built = stages("training.mode=fused", "model.init_from=somewhere")
    assert [s.depth for s in built] == [6, 6, 6]


def test_steps_come_from_epochs_when_max_steps_is_null():
    config = apply_overrides(
        StackWiseConfig(), ["training.max_steps=null", "training.epochs_per_layer=0.5"]
    )
    assert [s.steps for s in build_stages(config, steps_per_epoch=100)] == [50] * 4
    with pytest.raises(ValueError, match="steps_per_epoch"):
        build_stages(config)


def test_too_few_steps_for_the_stages_is_an_error():
    with pytest.raises(ConfigError, match="at least 6"):
        stages("training.mode=layerwise", "training.max_steps=5")
