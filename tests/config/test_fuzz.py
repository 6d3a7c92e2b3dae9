"""Any text ends in a valid configuration or in one readable ConfigError, and nothing else.

Random input: valid configurations mutated, random structures over real keys, plain noise.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackwise.config import ConfigError, StackWiseConfig
from stackwise.config.fields import all_fields, union_members
from stackwise.config.loading import apply_overrides, dump_yaml, load_text, load_yaml
from stackwise.config.renamed import new_names
from stackwise.config.rules import notes

KEYS = sorted({part for path in [*all_fields(), *new_names()] for part in path.split(".")})
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 8, 64, 10**9, 2**63 - 1, 2**63, -(10**30)]),
    st.integers(),
    st.floats(),
    st.sampled_from([1e-4, 1e5, 0.5, 0.15, 1.0, 4.0, 1e308]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["1e-4", "yes", "on", "~", "null", "gqa", "causal", "2024-01-01", "010", ""]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(TEXTS, st.integers(-3, 20)), inner, max_size=4),
    ),
    max_leaves=8,
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), inner, max_size=6),
    ),
    max_leaves=25,
)


def plausible(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of the declared type, from inside and outside the accepted range."""
    choices = []
    for option in union_members(annotation):
        origin, arguments = get_origin(option), get_args(option)
        if origin is Literal:
            choices.append(st.sampled_from(arguments))
        elif origin is tuple:
            choices.append(st.lists(st.floats(-0.5, 1.5), max_size=3))
        elif option is bool:
            choices.append(st.booleans())
        elif option is int:
            choices.append(st.integers(-1, 300))
        elif option is float:
            choices.append(st.floats(-0.1, 1.1))
        elif option is str:
            choices.append(st.text(string.ascii_letters + string.digits + "._-/: ", max_size=12))
        elif option is Any or origin is dict:
            choices.append(VALUES)
        else:
            choices.append(st.none())
    return st.one_of(*choices)


@st.composite
def mutated_configs(draw: st.DrawFn) -> Any:
    """A few fields set, some of them misspelt or under a neighbour's name."""
    tree: dict[Any, Any] = {}
    paths = sorted(all_fields())
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=6)):
        annotation = all_fields()[path].annotation
        value = draw(st.one_of(plausible(annotation), plausible(annotation), VALUES))
        *sections, name = path.split(".")
        holder = tree
        for section in sections:
            if not isinstance(holder.get(section), dict):
                holder[section] = {}
            holder = holder[section]
        if draw(st.integers(0, 4)) == 0:
            name = draw(st.one_of(st.just(name + "s"), st.sampled_from(KEYS), TEXTS))
        holder[name] = value
    return tree


QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
THOROUGH = settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))


def fault_of(action: Callable[[], object]) -> ConfigError | None:
    """The ConfigError that ``action`` ends in, None without one; other exceptions pass."""
    try:
        action()
    except ConfigError as error:
        return error
    return None


def assert_valid_or_readable(text: str) -> bool:
    """True for a valid configuration, which must then survive a round trip."""
    fault = fault_of(lambda: load_text(text, "fuzz.yaml"))
    if fault is not None:
        assert_readable(str(fault))
        return False
    config = load_text(text, "fuzz.yaml")
    assert isinstance(config, StackWiseConfig)
    assert all(isinstance(note, str) for note in notes(config))
    assert load_text(dump_yaml(config)) == config
    return True


def assert_readable(message: str) -> None:
    assert message.startswith("fuzz.yaml")
    assert "Traceback" not in message
    assert " object at 0x" not in message
    for line in message.splitlines():
        assert len(line) < 1500
        assert line.isprintable(), ascii(line)


def as_yaml(tree: object) -> str:
    return yaml.safe_dump(tree, allow_unicode=True)


@QUICK
@given(mutated_configs())
def test_mutated_configurations(tree: object) -> None:
    assert_valid_or_readable(as_yaml(tree))


@QUICK
@given(TREES)
def test_random_structures_over_real_keys(tree: object) -> None:
    assert_valid_or_readable(as_yaml(tree))


@QUICK
@given(st.one_of(st.text(), st.text(alphabet=" \n\t:-#{}[]&*!|>%@`'\"?,.0123456789eE+_abtfn")))
def test_random_text(text: str) -> None:
    assert_valid_or_readable(text)


@QUICK
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    fault = fault_of(lambda: load_yaml(path))
    assert fault is None or str(path) in str(fault)


@QUICK
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.builds(
                "{}.{}={}".format, st.sampled_from(KEYS), st.sampled_from(KEYS), st.text(max_size=9)
            ),
            st.builds("{}={}".format, st.sampled_from(KEYS), VALUES),
        ),
        max_size=4,
    )
)
def test_random_overrides(overrides: list[str]) -> None:
    fault = fault_of(lambda: apply_overrides(StackWiseConfig(), overrides))
    assert fault is None or all(line.isprintable() for line in str(fault).splitlines())


@pytest.mark.slow
def test_thousands_of_random_files_of_every_kind() -> None:
    counts = {True: 0, False: 0}

    @THOROUGH
    @given(st.one_of(mutated_configs().map(as_yaml), TREES.map(as_yaml), st.text()))
    def run(text: str) -> None:
        counts[assert_valid_or_readable(text)] += 1

    run()
    assert counts[True] >= 100
    assert counts[False] >= 1000


def test_damaged_files_of_the_real_layout() -> None:
    source = dump_yaml(StackWiseConfig())
    rng = random.Random(7)
    faulty = 0
    for _ in range(300):
        characters = list(source[rng.randrange(len(source) // 2) :][: rng.randrange(40, 900)])
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(characters))
            characters[place] = rng.choice(["", " ", "\n", ":", "-", "{", "'", "\t", "&", "*", "9"])
        faulty += not assert_valid_or_readable("".join(characters))
    assert faulty > 100
