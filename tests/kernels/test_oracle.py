"""The oracle finds each way of being wrong, and its cases are right for the torch variants."""

from __future__ import annotations

import pytest
import torch

from stackwise import kernels
from stackwise.kernels import dispatch, oracle, oracle_cases
from tests.kernels import examined_variants


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {op: dict(variants) for op, variants in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", registry)
    monkeypatch.setattr(oracle_cases, "_cases", dict(oracle_cases._all()))


def findings(variant: str, dtype: str) -> list[oracle.Finding]:
    examined_variants.register_all(variant)
    return [
        oracle.prove("swiglu", "cuda", case, dtype, "cpu") for case in oracle_cases.proofs("swiglu")
    ]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_right_variant_passes(dtype: str) -> None:
    assert all(finding.passed for finding in findings("fast", dtype))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("variant", "tensor"),
    [("wrong_gradient", "dup"), ("one_tile_missing", "out0"), ("wrong_shape", "out0")],
)
def test_a_wrong_tensor_is_named(variant: str, tensor: str) -> None:
    last = findings(variant, "bf16")[-1]
    assert not last.passed
    assert last.error > 1
    assert last.tensor.split(":")[0] == tensor


@pytest.mark.usefixtures("registry")
def test_two_runs_that_differ_are_noticed() -> None:
    for finding in findings("never_twice_the_same", "fp32"):
        assert finding.error <= 1
        assert not finding.repeats
        assert not finding.passed


def test_a_case_that_a_variant_does_not_cover_counts_neither_way() -> None:
    case = oracle_cases.proofs("rope")[0]
    finding = oracle.prove("rope", "triton", case, "fp32", "cpu")
    assert "Triton runs on CUDA devices" in finding.skipped


@pytest.mark.parametrize("op", oracle_cases.operations())
def test_every_case_runs_and_torch_obeys_the_rule(op: str) -> None:
    """Half of them in bf16, the others in float32, where not all of PyTorch is within the rule."""
    for index, case in enumerate(oracle_cases.proofs(op)):
        dtype, slack = (("bf16", 1.0), ("fp32", 2.0))[index % 2]
        finding = oracle.prove(op, "torch", case, dtype, "cpu")
        assert finding.error <= slack, finding
        assert finding.repeats, finding


@pytest.mark.parametrize("op", oracle_cases.operations())
def test_cases_have_names_of_their_own_and_classes(op: str) -> None:
    for cases in (oracle_cases.proofs(op), oracle_cases.races(op)):
        assert len({case.label for case in cases}) == len(cases) > 0


@pytest.mark.usefixtures("registry")
def test_a_race_times_both_passes_of_both_variants() -> None:
    examined_variants.register_all("fast")
    (case,) = oracle_cases.races("swiglu")
    contest = oracle.race("swiglu", ["cuda"], case, "bf16", "cpu", 0.2)
    assert contest.case_class == "bf16 tiny"
    assert {len(times) for both in contest.times.values() for times in both.values()} == {
        len(contest.times["torch"]["full"])
    }
    low, middle, high = contest.speedup("cuda")
    assert low <= middle <= high
    assert middle > 1.5, "torch's stand-in waits for 5 ms"
    assert contest.is_faster("cuda")


@pytest.mark.usefixtures("registry")
def test_a_race_is_refused_to_a_wrong_variant() -> None:
    examined_variants.register_all("wrong_gradient")
    (case,) = oracle_cases.races("swiglu")
    with pytest.raises(ValueError, match=r"cuda on 16x2048: dup is .* times its bound off"):
        oracle.race("swiglu", ["cuda"], case, "bf16", "cpu", 0.2)


def contest(full: list[float], forward: float = 1.0, memory: int = 100) -> oracle.Contest:
    times = {
        "torch": {"forward": [1.0] * 5, "full": [3.0] * 5},
        "cuda": {"forward": [forward] * 5, "full": full},
    }
    return oracle.Contest("x", "bf16", "bf16 large", times, {"torch": 100, "cuda": memory})


def test_what_counts_as_faster() -> None:
    assert contest([2.0] * 5).is_faster("cuda")
    assert not contest([2.95] * 5).is_faster("cuda"), "within the noise"
    assert not contest([2.0, 2.0, 3.1, 3.1, 2.0]).is_faster("cuda"), "not in four of five rounds"
    assert not contest([2.0] * 5, forward=1.1).is_faster("cuda"), "generation would be slower"
    assert not contest([2.0] * 5, memory=20 << 20).is_faster("cuda"), "it needs more memory"


def test_inputs_are_the_same_for_the_same_seed() -> None:
    case = oracle_cases.proofs("attention")[0]
    one, same, other = (
        case.build(oracle.Maker("cpu", torch.float32, seed))["q"] for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_poisoned_memory_is_undone() -> None:
    with oracle.poisoned_memory():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_public_operations_are_what_is_examined() -> None:
    for op in oracle_cases.operations():
        assert callable(getattr(kernels, op))
