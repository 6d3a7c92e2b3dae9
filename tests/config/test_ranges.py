"""Ranges of single fields."""

from __future__ import annotations

import pytest

from stackwise.config import ConfigError, StackWiseConfig
from stackwise.config.fields import all_fields, union_members
from stackwise.config.loading import apply_overrides
from stackwise.config.ranges import MIN_TOKENIZER_SIZE, RANGES, TEXTS


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(StackWiseConfig(), overrides)
    return str(caught.value)


NUMERIC = [
    path
    for path, spec in all_fields().items()
    if {int, float} & set(union_members(spec.annotation))
]


def test_every_number_has_a_range_and_every_text_a_rule() -> None:
    assert set(NUMERIC) <= set(RANGES)
    texts = {p for p, spec in all_fields().items() if str in union_members(spec.annotation)}
    assert texts == set(TEXTS)
    assert set(RANGES) <= set(all_fields())


@pytest.mark.parametrize("path", NUMERIC)
def test_just_outside_its_range_is_refused_and_the_ends_are_not(path: str) -> None:
    limits = RANGES[path]
    whole = int in union_members(all_fields()[path].annotation)
    step = 1 if whole else 1e-6
    below = limits.low if limits.open_low else limits.low - step
    assert f"{path}: got " in refusal(f"{path}={below}")
    if limits.high < float("inf"):
        above = limits.high if limits.open_high else limits.high + step
        assert f"{path}: got " in refusal(f"{path}={above}")
    inside = limits.low + step if limits.open_low else limits.low
    assert inside in limits


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices(device: str) -> None:
    assert apply_overrides(StackWiseConfig(), [f"training.device={device}"])


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CPU", "cpu:0", "mps", '""'])
def test_no_devices(device: str) -> None:
    assert "training.device: got " in refusal(f"training.device={device}")
    assert "accepted: auto, cpu, cuda or cuda:N" in refusal(f"training.device={device}")


@pytest.mark.parametrize("name", ['"../x"', ".hidden", "a/b", '"a b"', '""'])
def test_run_ids_are_plain_names(name: str) -> None:
    assert "run.id: got " in refusal(f"run.id={name}")


def test_betas_are_a_pair_below_one() -> None:
    assert "training.betas: got [0.9, 1.0]; accepted: values in [0, 1)" in refusal(
        "training.betas=[0.9, 1]"
    )


def test_smallest_tokenizer_matches_the_tokenizer_s_own() -> None:
    from stackwise.data.tokenizer import MIN_BPE_SIZE

    assert MIN_TOKENIZER_SIZE == MIN_BPE_SIZE
