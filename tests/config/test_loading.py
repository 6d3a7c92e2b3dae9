"""Reading, overriding and writing configurations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.config import ConfigError, StackWiseConfig
from stackwise.config.loading import apply_overrides, dump_yaml, from_dict, load_text, to_dict


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(text, "x.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("3.e-4", 3e-4),
        (".5", 0.5),
        ("+2", 2.0),
        ("1_000.5", 1000.5),
        ("1.0e+2", 100.0),
    ],
)
def test_numbers_that_yaml_1_1_reads_as_text_are_floats(written: str, value: float) -> None:
    lr = load_text(f"training: {{lr: {written}}}").training.lr
    assert lr == value
    assert type(lr) is float


@pytest.mark.parametrize(("written", "value"), [("1e5", 100_000), ("4.0", 4), ("1_000", 1000)])
def test_whole_floats_are_accepted_for_integers(written: str, value: int) -> None:
    max_steps = load_text(f"training: {{max_steps: {written}}}").training.max_steps
    assert max_steps == value
    assert type(max_steps) is int


@pytest.mark.parametrize("written", ["4.5", "true", "'4'", ".inf", ".nan", "1e400", "[4]", "1:30"])
def test_what_is_no_whole_number_is_refused(written: str) -> None:
    message = refusal(f"training: {{max_steps: {written}}}")
    assert message.startswith("x.yaml: training.max_steps (line 1): got ")
    assert "accepted: a whole number or null" in message


def test_text_in_place_of_a_number_says_how_to_write_it() -> None:
    assert refusal("training: {lr: '1e-4'}") == (
        "x.yaml: training.lr (line 1): got the text '1e-4'; accepted: a number; write it without "
        "quotes, as a number"
    )


@pytest.mark.parametrize("written", ["yes", "on", "1", "'true'", "null"])
def test_only_true_and_false_are_booleans(written: str) -> None:
    assert "accepted: true or false" in refusal(f"data: {{shuffle: {written}}}")


@pytest.mark.parametrize(
    ("written", "value"),
    [("2024-01-01", "2024-01-01"), ("on", "on"), ("a=b", "a=b"), ("'010'", "010")],
)
def test_dates_and_yaml_1_1_words_stay_text(written: str, value: str) -> None:
    assert load_text(f"data: {{text_field: {written}}}").data.text_field == value


def test_a_number_for_text_is_refused_with_the_remedy() -> None:
    assert 'put it in quotes, "..."' in refusal("run: {id: 2024}")


def test_every_fault_of_a_file_is_listed_once_with_its_line() -> None:
    text = """\
training:
  lrr: 3
  batch_size: 0
  betas: [0.9]
  mode: fuzed
model:
  d_model: 100
  n_heads: 3
run: [1]
"""
    assert refusal(text).splitlines() == [
        "x.yaml has 6 faults:",
        "  training.lrr (line 2): unknown key; nearest valid key: training.lr",
        "  training.betas (line 4): got the list [0.9]; accepted: a list of 2 numbers",
        "  training.mode (line 5): got the text 'fuzed'; accepted: one of layerwise, blockwise, "
        "fused, end_to_end; nearest: fused",
        "  run (line 9): got the list [1]; accepted: a mapping of fields",
        "  training.batch_size (line 3): got 0; accepted: a value at least 1",
        "  model.n_heads (line 8): 3 heads do not divide model.d_model 100; accepted: a divisor of "
        "it, or any number with model.head_dim set",
    ]


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("training.bacth_size", "training.batch_size"),
        ("training.d_model", "model.d_model"),
        ("model.learning_rates", "training.lr"),
        ("trainning", "training"),
        ("model.tokenizer_embedding.familly", "model.tokenizer_embedding.family"),
        ("model.moe.d_fff", "model.moe.d_ff"),
    ],
)
def test_unknown_keys_name_the_nearest_valid_key_anywhere(path: str, nearest: str) -> None:
    message = refusal("", f"{path}=1")
    assert f"{path}: unknown key; nearest valid key: " in message
    if path != "model.learning_rates":
        assert message.endswith(nearest)


def test_a_dotted_key_in_the_file_is_answered_with_the_nesting() -> None:
    assert refusal("training.lr: 1").endswith(
        "training.lr (line 1): write it nested, as lr inside the section training"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1, lr: 2}", "training.lr (line 1): given twice (first on line 1)"),
        ("model: &a {}\ndata: *a", "data (line 1): aliases (*name) are not supported"),
        ("a: &a [*a]", "aliases (*name) are not supported"),
        ("!!python/object/apply:os.system [ls]", "python/object/apply:os.system' is not supported"),
        ("run: {id: !!binary aGk=}", "run.id (line 1): the tag 'tag:yaml.org,2002:binary'"),
        ("run: {seed: !!int x}", "run.seed (line 1): 'x' cannot be read as int"),
        ("run: {? [1] : 2}", "run (line 1): a key must be a plain word or number"),
        ("run: {seed: %s}" % ("9" * 5000), "run.seed (line 1): '999"),
        ("a: 1\n---\nb: 2", "not valid YAML: line 2"),
        ("training: {lr: 1", "not valid YAML: line 1"),
        ("a: \x00", "not valid YAML"),
        ("[" * 5000, "not valid YAML: nested too deeply"),
        ("- 1", "the file: got the list [1]; accepted: a mapping of fields"),
        ("x" * 1_000_001, "1000001 characters is no configuration"),
    ],
)
def test_yaml_that_is_not_accepted(text: str, message: str) -> None:
    assert message in refusal(text)


def test_deep_nesting_inside_a_free_field_is_refused() -> None:
    deep = "{a: " * 60 + "1" + "}" * 60
    assert "nested more than 50 levels" in refusal(f"model: {{rope_scaling: {deep}}}")


def test_an_empty_file_and_empty_sections_are_the_defaults() -> None:
    assert load_text("") == StackWiseConfig()
    assert load_text("training:\nkernels:\n") == StackWiseConfig()


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.lr=3e-4", "training.lr", 3e-4),
        ("training.max_steps=1e3", "training.max_steps", 1000),
        ("training.max_steps=", "training.max_steps", None),
        ("training.max_steps=null", "training.max_steps", None),
        ("evaluation.mask_rates=[0.2, .8]", "evaluation.mask_rates", (0.2, 0.8)),
        ("training.betas=[0.8,0.99]", "training.betas", (0.8, 0.99)),
        ('run.id="2024"', "run.id", "2024"),
        ("data.text_field=a=b", "data.text_field", "a=b"),
        ("model.tokenizer_embedding.width=64", "model.tokenizer_embedding.width", 64),
        ("model.moe.n_groups=2", "model.moe.n_groups", 2),
        ("kernels.attention=reference", "kernels", {"attention": "reference"}),
        (" training.seq_len =64", "training.seq_len", 64),
    ],
)
def test_overrides(override: str, path: str, value: object) -> None:
    config = apply_overrides(StackWiseConfig(), [override])
    holder: object = config
    for name in path.split("."):
        holder = getattr(holder, name)
    assert holder == value
    assert type(holder) is type(value)


def test_later_overrides_win_and_the_original_is_left_alone() -> None:
    config = StackWiseConfig()
    changed = apply_overrides(config, ["training.lr=1", "training.lr=2", "kernels.rope=torch"])
    assert changed.training.lr == 2.0
    assert changed.kernels == {"rope": "torch"}
    assert config == StackWiseConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr", "override 'training.lr': accepted: section.field=value"),
        ("=3", "override '=3': accepted: section.field=value"),
        ("training.lr=[", "training.lr: the value '[' is not YAML"),
        ("training.lr=*a", "training.lr: the value '*a' is not YAML"),
        ("training.lr.x=3", "training.lr: got the mapping {'x': 3}; accepted: a number"),
        ("run.seed.x=3", "run.seed.x: run.seed is 5, which has no fields to set"),
    ],
)
def test_faulty_overrides(override: str, message: str) -> None:
    assert message in refusal("run: {seed: 5}", override)


def test_an_override_does_not_hide_the_file_s_own_fault() -> None:
    assert "training is 5, which has no fields to set" in refusal("training: 5", "training.lr=1")


EVERYTHING = {
    "run": {"id": "a.b-c", "seed": 3},
    "model": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.5},
        "moe": {"n_routed_experts": 4, "routed_scaling": 0.1},
        "norm_eps": 1e-7,
    },
    "objective": {"time_step_mask_fractions": {0: 0.15, 5: 0.5, 9: 0.9}},
    "training": {"lr": 1e-4, "adam_eps": 1e-12, "betas": [0.1, 0.2], "max_grad_norm": None},
    "evaluation": {"mask_rates": []},
    "kernels": {"attention": "torch"},
}


def test_round_trip_of_tuples_nulls_mappings_and_small_floats() -> None:
    config = from_dict(EVERYTHING)
    again = load_text(dump_yaml(config))
    assert again == config
    assert again.objective.time_step_mask_fractions == {0: 0.15, 5: 0.5, 9: 0.9}
    assert again.training.betas == (0.1, 0.2)
    assert again.evaluation.mask_rates == ()
    assert again.model.norm_eps == 1e-7
    assert again.training.max_grad_norm is None
    assert from_dict(to_dict(config)) == config


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    config = from_dict(EVERYTHING)
    text = config.to_yaml(str(tmp_path / "c.yaml"))
    assert (tmp_path / "c.yaml").read_text() == text
    assert StackWiseConfig.from_yaml(str(tmp_path / "c.yaml")) == config


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
    ).filter(str.strip),
    st.floats(min_value=5e-324, allow_infinity=False),
)
def test_round_trip_of_any_text_and_any_float(text: str, number: float) -> None:
    config = StackWiseConfig()
    config.data.text_field = text
    config.training.lr = number
    assert load_text(dump_yaml(config)) == config


@pytest.mark.parametrize("value", [math.inf, math.nan, "1e-4", object(), True])
def test_values_that_cannot_be_read_back_are_not_written(value: object) -> None:
    config = StackWiseConfig()
    config.training.lr = value  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"training\.lr: got "):
        dump_yaml(config)


def test_text_that_no_file_can_hold_is_refused() -> None:
    config = StackWiseConfig()
    config.run.dir = "\ud800"
    with pytest.raises(ConfigError, match=r"run\.dir: got the text"):
        config.validate()


def test_validate_brings_python_values_to_their_types_in_place() -> None:
    config = StackWiseConfig()
    training = config.training
    training.betas = [0.9, 0.99]  # type: ignore[assignment]
    training.max_steps = 100.0  # type: ignore[assignment]
    training.lr = 1
    assert config.validate() is config
    assert config.training is training
    assert training.betas == (0.9, 0.99)
    assert type(training.max_steps) is int
    assert type(training.lr) is float


def test_an_attribute_that_is_no_field_is_a_fault() -> None:
    config = StackWiseConfig()
    config.training.learning_rate = 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"training\.learning_rate: replaced by training\.lr"):
        config.validate()


def test_sections_given_as_plain_mappings_are_typed() -> None:
    config = StackWiseConfig()
    config.model = {"d_model": 64}  # type: ignore[assignment]
    assert config.validate().model.d_model == 64
    assert dataclasses.is_dataclass(config.model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"a: \xff"), "not UTF-8 text (byte 3)"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, make, reason: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "x.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_yaml(str(path))
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun: {seed: 4}")
    assert StackWiseConfig.from_yaml(str(path)).run.seed == 4
