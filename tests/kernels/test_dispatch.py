"""The choice of a variant: call, configuration, environment, evidence, and the errors of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stackwise import kernels
from stackwise.kernels import dispatch

OPS = {
    "attention",
    "bias_gelu",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "mla_attention",
    "random_features",
    "rms_norm",
    "rope",
    "swiglu",
}


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An operation "toy" whose variants return their own names."""
    monkeypatch.setitem(dispatch._registry, "toy", {})
    for name in ("reference", "torch"):
        kernels.register("toy", name, lambda *_, name=name: name)
    yield "toy"
    kernels.use(None)


def choose(impl: str | None = None, *args: object) -> str:
    return dispatch.select("toy", impl, *args)(*args)


def test_every_operation_has_a_definition_and_a_torch_variant() -> None:
    available = kernels.available()
    assert set(available) >= OPS
    for op in OPS:
        assert available[op]["reference"] == "ready"
        assert available[op]["torch"] == "ready"


@pytest.mark.usefixtures("op")
def test_torch_is_the_default_and_impl_wins_over_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose() == "torch"
    monkeypatch.setenv("STACKWISE_IMPL", "reference")
    assert choose() == "reference"
    kernels.use({"toy": "torch"})
    assert choose() == "torch"
    assert choose("reference") == "reference"
    kernels.use({})
    assert choose() == "reference"


@pytest.mark.usefixtures("op")
def test_the_environment_is_a_preference_where_the_variant_exists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STACKWISE_IMPL", "cuda")
    assert choose() == "torch"


@pytest.mark.usefixtures("op")
def test_a_missing_variant_is_an_error_that_names_what_exists() -> None:
    message = r"impl='cuda' does not exist for toy; available: reference, torch"
    with pytest.raises(ValueError, match=message):
        choose("cuda")
    with pytest.raises(ValueError, match=message):
        kernels.use({"toy": "cuda"})
    with pytest.raises(ValueError, match=r"kernels\.tyo: no such operation"):
        kernels.use({"tyo": "torch"})


@pytest.mark.usefixtures("op")
def test_a_refused_preference_leaves_the_earlier_one() -> None:
    kernels.use({"toy": "reference"})
    with pytest.raises(ValueError, match="does not exist"):
        kernels.use({"toy": "cuda"})
    assert choose() == "reference"


@pytest.mark.usefixtures("op")
def test_a_variant_that_does_not_cover_the_case_is_passed_over_unless_asked_for() -> None:
    def odd(x: int) -> str | None:
        return None if x % 2 == 0 else "x is odd"

    kernels.register("toy", "triton", lambda x: "triton", unsupported=odd)
    kernels.use({"toy": "triton"})
    assert choose(None, 2) == "triton"
    assert choose(None, 3) == "torch"
    with pytest.raises(ValueError, match="impl='triton' does not cover this case of toy: x is odd"):
        choose("triton", 3)


@pytest.mark.usefixtures("op")
def test_evidence_makes_a_variant_the_default_for_its_cases() -> None:
    kernels.register("toy", "cuda", lambda x: "cuda", preferred=lambda x: x > 10)
    assert choose(None, 3) == "torch"
    assert choose(None, 30) == "cuda"


def test_an_unknown_variant_name_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="variant: got 'fast'"):
        kernels.register("toy", "fast", lambda: None)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_environment_reaches_operations(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    calls: list[str] = []
    for name in ("reference", "torch"):
        variant = dispatch.Variant(lambda *_, name=name: calls.append(name))
        monkeypatch.setitem(dispatch._registry["swiglu"], name, variant)
    monkeypatch.setenv("STACKWISE_IMPL", impl)
    kernels.swiglu(torch.zeros(1), torch.zeros(1))
    assert calls == [impl]
