"""Mask fractions of the stages against the published formulas."""

from __future__ import annotations

import math

import pytest

from stackwise.config import ConfigError, ObjectiveConfig
from stackwise.objectives import MaskPlan, stage_mask_plans
from stackwise.objectives.schedules import scheduled_fractions, time_step_fractions


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("linear", lambda p: p),
        ("exponential", lambda p: (math.exp(p) - 1) / (math.e - 1)),
        ("cosine", lambda p: (1 - math.cos(math.pi * p)) / 2),
    ],
)
def test_schedule_formula_and_end_points(schedule, shape):
    config = ObjectiveConfig(mask_schedule=schedule)
    plans = stage_mask_plans(config, 8)
    expected = [0.15 + shape(k / 7) * 0.75 for k in range(8)]
    assert [plan.low for plan in plans] == pytest.approx(expected, abs=1e-12)
    assert all(plan.low == plan.high for plan in plans)
    assert (plans[0].low, plans[-1].low) == (pytest.approx(0.15), pytest.approx(0.90))


def test_single_stage_uses_the_smallest_fraction():
    assert scheduled_fractions("cosine", 0.2, 0.8, 1) == [0.2]


def test_random_gives_every_stage_the_whole_range():
    assert stage_mask_plans(ObjectiveConfig(), 3) == [MaskPlan(0.15, 0.9)] * 3


def test_default_time_steps_are_the_published_eight():
    config = ObjectiveConfig(time_step_masking=True)
    expected = [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85]
    assert time_step_fractions(config) == pytest.approx(expected)
    plans = stage_mask_plans(config, 10)
    assert [plan.high for plan in plans] == pytest.approx([*expected, 0.85, 0.85])


def test_time_step_mapping_is_interpolated():
    config = ObjectiveConfig(time_step_mask_fractions={0: 0.15, 5: 0.5, 9: 0.9})
    expected = [0.15, 0.22, 0.29, 0.36, 0.43, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert time_step_fractions(config) == pytest.approx(expected)


def test_time_step_mapping_is_held_beyond_its_bins():
    config = ObjectiveConfig(time_step_mask_fractions={2: 0.3, 4: 0.5}, num_time_steps=7)
    assert time_step_fractions(config) == pytest.approx([0.3, 0.3, 0.3, 0.4, 0.5, 0.5, 0.5])


def test_time_step_list_is_taken_as_it_is():
    config = ObjectiveConfig(time_step_masking=True, time_step_mask_fractions=[0.2, 0.6])
    assert [plan.low for plan in stage_mask_plans(config, 3)] == [0.2, 0.6, 0.6]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.5, 0.2], "must ascend"),
        ([0.0, 0.2], r"\(0, 1\]"),
        ([0.5, 1.2], r"\(0, 1\]"),
        (["x"], "must hold numbers"),
        ({-1: 0.2}, "bins 0, 1, 2"),
        ({0: 0.9, 3: 0.2}, "must ascend"),
        ("0.5", "must be a list"),
        ([], "must be a list"),
    ],
)
def test_wrong_time_steps_name_the_field(fractions, message):
    config = ObjectiveConfig(time_step_mask_fractions=fractions)
    with pytest.raises(ConfigError, match=message) as error:
        time_step_fractions(config)
    assert "objective.time_step_mask_fractions" in str(error.value)


def test_mlm_and_clm_plans():
    assert stage_mask_plans(ObjectiveConfig(type="mlm"), 2) == [MaskPlan(0.15, 0.15)] * 2
    assert stage_mask_plans(ObjectiveConfig(type="clm"), 2) == [MaskPlan(0.0, 0.0)] * 2
    linear = stage_mask_plans(ObjectiveConfig(type="mlm", mask_schedule="linear"), 2)
    assert [plan.low for plan in linear] == [0.15, 0.9]


def test_plan_and_stage_count_are_checked():
    with pytest.raises(ValueError, match=r"low=0\.9, high=0\.2"):
        MaskPlan(0.9, 0.2)
    with pytest.raises(ValueError, match="n_stages must be at least 1, got 0"):
        stage_mask_plans(ObjectiveConfig(), 0)
