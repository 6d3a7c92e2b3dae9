"""Dispatch by evidence: shipped and tuned verdicts, when they hold, and what reading them costs."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stackwise import kernels
from stackwise.kernels import case_classes, dispatch, evidence, oracle, oracle_cases, sources

MACHINE = {"gpu": "Made-up 9", "capability": "sm_90", "driver": "1", **evidence.software()}
KEY = "Made-up 9 sm_90"
LARGE = "bf16 medium width<=1024"


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A made-up GPU, whose tensors are fake ones, with a cache folder and a file of its own."""
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(evidence, "machine_of", lambda index=0: MACHINE)
    monkeypatch.setattr(evidence, "FILE", tmp_path / "evidence.json")
    ship({})
    evidence.forget()
    yield
    evidence.forget()


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def record(op: str = "rms_norm", variant: str = "triton", **changes: Any) -> dict[str, Any]:
    return {
        "status": "validated", "dtypes": ["bf16"], "fingerprint": sources.fingerprint(op, variant),
        "cases": 3, "worst_error": 0.5, "faster": {LARGE: {"speedup": 1.4}},
    } | changes  # fmt: skip


def ship(records: evidence.Records, key: str = KEY) -> None:
    content = {"format": evidence.FORMAT, "gpus": {key: records} if records else {}}
    evidence.FILE.write_text(json.dumps(content))
    evidence.forget()


def tuned(content: dict[str, Any] | str) -> None:
    file = evidence.cache_file("Made-up 9")
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    evidence.forget()


def cache(records: evidence.Records, **machine: str) -> dict[str, Any]:
    return {"format": evidence.FORMAT, "machine": MACHINE | machine, "verdicts": records}


def chosen(rows: int = 2048, width: int = 768, dtype: torch.dtype = torch.bfloat16) -> str:
    """The variant that rms_norm takes for CUDA tensors of this size."""
    with FakeTensorMode():
        x = torch.empty(rows, width, dtype=dtype, device="cuda")
        weight = torch.empty(width, dtype=dtype, device="cuda")
        taken = dispatch.select("rms_norm", None, x, weight, 1e-6, None, weight_offset=0.0)
    variants = dispatch._registry["rms_norm"]
    return next(name for name, variant in variants.items() if variant.function is taken)


@pytest.mark.usefixtures("available")
def test_torch_is_the_default_without_evidence() -> None:
    assert chosen() == "torch"
    assert evidence.explain("rms_norm")["origin"] == "none"


@pytest.mark.usefixtures("available")
def test_shipped_evidence_makes_a_variant_the_default_for_its_classes() -> None:
    ship({"rms_norm": {"triton": record()}})
    assert chosen() == chosen() == "triton"
    assert chosen(width=2048) == "torch", "another class"
    assert chosen(dtype=torch.float16) == "torch"
    assert chosen(width=767) == "torch", "no vector access"
    assert evidence.explain("rms_norm") == {
        "origin": "evidence",
        "prefers": {LARGE: "triton"},
        "text": "evidence.json for Made-up 9: faster in 1 of its classes",
    }


def test_preferences_come_before_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    ship({"rms_norm": {"triton": record()}})
    monkeypatch.setenv("STACKWISE_IMPL", "reference")
    assert chosen() == "reference"
    assert dispatch.preference("rms_norm") == ("reference", "STACKWISE_IMPL")


def test_a_case_that_the_variant_does_not_cover_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ship({"rms_norm": {"triton": record(faster={"bf16 large width>4096": {"speedup": 2.0}})}})
    assert chosen(4096, 8192) == "triton"
    assert chosen(4096, 16384) == "torch", "wider than a block holds"


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "failed: 1x1 bf16"},
        {"fingerprint": "0" * 16},
        {"dtypes": ["fp32"]},
        {"faster": {}},
    ],
    ids=["failed", "other sources", "another dtype", "not faster"],
)
def test_what_is_no_reason(changes: dict[str, Any]) -> None:
    ship({"rms_norm": {"triton": record(**changes)}})
    assert chosen() == "torch"


def test_evidence_for_another_gpu_says_nothing_here() -> None:
    ship({"rms_norm": {"triton": record()}}, "NVIDIA H200 sm_90")
    assert chosen() == "torch"


def test_the_largest_speedup_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {op: dict(variants) for op, variants in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", registry)
    kernels.register("rms_norm", "cuda", lambda *_, **__: None)
    better = record(variant="cuda", faster={LARGE: {"speedup": 1.6}})
    ship({"rms_norm": {"triton": record(), "cuda": better}})
    assert chosen() == "cuda"


@pytest.mark.usefixtures("available")
def test_the_tuned_cache_decides_where_nothing_is_shipped() -> None:
    tuned(cache({"rms_norm": {"triton": record()}}))
    assert chosen() == "triton"
    assert evidence.explain("rms_norm")["origin"] == "tuned"
    ship({"rms_norm": {"triton": record(faster={})}})
    assert chosen() == "torch", "what was measured for this GPU comes first"
    ship({"rms_norm": {"triton": record(fingerprint="old")}})
    assert chosen() == "triton", "unless its sources have changed since"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 0}', "format 0, this version reads 1"),
        (cache({"rms_norm": {"triton": {"faster": {}}}}), "cannot be read"),
        (cache({"rms_norm": {"triton": record(dtypes="bf16")}}), "a record without dtypes"),
        (cache({"rms_norm": {"triton": record(faster={LARGE: {}})}}), "cannot be read"),
        (cache({"rms_norm": {"triton": record()}}, torch="1.0"), r"torch 1\.0 -> "),
        (cache({"rms_norm": {"triton": record()}}, triton="1.0"), r"triton 1\.0 -> "),
        (cache({"rms_norm": {"triton": record()}}, stackwise="0"), "stackwise 0 -> "),
        (cache({"rms_norm": {"triton": record()}}, driver="0"), "driver 0 -> 1"),
        (cache({"rms_norm": {"triton": record()}}, gpu="Other"), "gpu Other -> Made-up 9"),
        (cache({"rms_norm": {"triton": record(fingerprint="x")}}), "other kernel sources in rms_"),
    ],
)
def test_a_cache_that_does_not_fit_is_ignored_with_one_warning(
    content: dict[str, Any] | str, message: str
) -> None:
    tuned(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert chosen() == "torch"
        evidence._tables.clear()
        assert chosen() == "torch"
    (warning,) = caught
    assert re.search(message, str(warning.message))
    assert "made-up-9.json" in str(warning.message)


def test_a_shipped_file_that_cannot_be_read_is_a_warning() -> None:
    evidence.FILE.write_text("{")
    evidence.forget()
    with pytest.warns(RuntimeWarning, match="evidence.json cannot be read"):
        assert chosen() == "torch"


def test_the_cache_is_written_whole_and_read_back(tmp_path: Path) -> None:
    records = {"rms_norm": {"triton": record()}}
    file = evidence.write_cache(MACHINE, records)
    assert file == tmp_path / "tune" / "made-up-9.json"
    assert evidence.read_cache(MACHINE) == records
    assert [entry.name for entry in file.parent.iterdir()] == ["made-up-9.json"]
    assert chosen() == "triton", "the verdicts hold at once"


def test_the_shipped_file_of_this_checkout_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(evidence.__file__).with_name("evidence.json")
    monkeypatch.setattr(evidence, "FILE", file)
    evidence.forget()
    assert evidence.read_evidence()["format"] == evidence.FORMAT


def test_the_status_of_a_variant_says_where_it_is_validated() -> None:
    assert kernels.available()["rms_norm"]["triton"] == "not validated on a GPU"
    ship({"rms_norm": {"triton": record()}}, "NVIDIA H200 sm_90")
    assert kernels.available()["rms_norm"]["triton"] == "validated on NVIDIA H200"
    ship({"rms_norm": {"triton": record(status="failed: so")}}, "NVIDIA H200 sm_90")
    assert kernels.available()["rms_norm"]["triton"] == "not validated on a GPU"
    assert kernels.available()["rms_norm"]["torch"] == "ready"


def test_tensors_on_a_cpu_never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("evidence was consulted")

    monkeypatch.setattr(evidence, "preferred", asked)
    x = torch.randn(3, 8)
    kernels.rms_norm(x, x[0])
    with pytest.raises(AssertionError, match="was consulted"):
        chosen()


def test_an_answer_is_looked_up_once_per_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    ship({"rms_norm": {"triton": record()}})
    calls: list[str] = []
    real = case_classes.case_class
    monkeypatch.setattr(
        evidence, "case_class", lambda *arguments: calls.append("") or real(*arguments)
    )
    assert [chosen(), chosen(), chosen(4096), chosen()] == ["triton"] * 4
    assert len(calls) == 2


def test_signatures_tell_apart_what_classes_tell_apart() -> None:
    weight = torch.randn(32, 64)
    signatures = {
        evidence._signature(argument)
        for argument in (
            weight, weight[:16], weight.half(), kernels.quantize(weight, "nf4"),
            kernels.quantize(weight, "fp8_row"), kernels.quantize(weight[:16], "nf4"),
            None, (3, 0), (3, 1), "tanh", 0.5,
        )
    }  # fmt: skip
    assert len(signatures) == 11
    assert evidence._signature({"gate": (weight, weight)}) is dict


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_asks_while_it_is_traced(dynamic: bool) -> None:
    evidence._tables[0] = evidence.Table("G", preferred={"rms_norm": {LARGE: "triton"}})

    def ask(x: torch.Tensor) -> torch.Tensor:
        key = evidence.case_class("rms_norm", (x, x), {})
        return x + 1 if evidence._verdict("rms_norm", 0, key) == "triton" else x

    compiled = torch.compile(ask, fullgraph=True, backend="eager", dynamic=dynamic)
    x = torch.zeros(2048, 768, dtype=torch.bfloat16)
    assert compiled(x).sum() == x.numel()
    assert compiled(x[:8]).sum() == 0


@pytest.mark.parametrize("op", oracle_cases.operations())
def test_the_classes_of_raced_cases_are_those_of_calls(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict is kept under the class of the race; a call must find it under its own."""
    seen: list[str | None] = []
    real = dispatch.select

    def select(name: str, impl: str | None, *args: Any, **kwargs: Any) -> Any:
        if name == op:
            seen.append(case_classes.case_class(name, args, kwargs))
        return real(name, impl, *args, **kwargs)

    monkeypatch.setattr(dispatch, "select", select)
    for case in oracle_cases.proofs(op):
        arguments = case.build(oracle.Maker("cpu", torch.bfloat16))
        seen.clear()
        oracle._function(op, case)(**arguments, impl="reference")
        raced = case_classes.case_class(op, (), oracle._bound_arguments(op, arguments))
        assert seen[0] == raced, case.label


def test_classes_tell_apart_what_decides_the_speed() -> None:
    x = torch.zeros(64, 1024, dtype=torch.bfloat16)
    one = case_classes.case_class

    assert one("rms_norm", (x, x[0]), {}) == "bf16 tiny width<=1024"
    assert one("rms_norm", (x, x[0], 1e-6, x), {}) == "bf16 tiny width<=1024 residual"
    assert one("swiglu", (x.float(), x), {}) == "fp32 tiny"
    assert one("swiglu", (torch.zeros(4096, 8192).half(), x), {}) == "fp16 large"
    assert one("swiglu", (x.double(), x), {}) is None
    assert one("swiglu", (x[:, :63], x), {}) is None
    assert one("swiglu", (3, x), {}) is None
    q = torch.zeros(2, 512, 4, 64, dtype=torch.bfloat16)
    plain = {"causal": False, "key_bias": None, "window": None, "return_lse": False}
    assert one("attention", (q, q, q), plain) == "bf16 small length<=512 heads 64/64"
    causal = plain | {"causal": True, "window": (3, 0), "return_lse": True}
    assert one("attention", (q, q, q), causal) == (
        "bf16 small length<=512 heads 64/64 causal window lse"
    )
    gaussian = {"kernel": "gaussian", "normalize": False}
    assert one("kernel_attention", (q, q, q), gaussian | {"bandwidth": 2.0}) == (
        "bf16 small gaussian unnormalised length<=512 heads 64/64"
    )
    quantised = kernels.quantize(torch.randn(96, 1024), "nf4")
    assert one("quantized_linear", (x, quantised, None), {}) == "bf16 tiny 128x1024 nf4"
    assert one("lora_linear", (x, x, x, x), {}) == "bf16 tiny 64x1024 dense"
    weight, target = torch.zeros(1000, 1024), torch.zeros(64, dtype=torch.int64)
    loss = ((x, weight, target), {"rows": None})
    assert one("linear_cross_entropy", *loss) == "bf16 tiny logits<=2^24"


def test_fingerprints_follow_the_code_and_not_the_words(tmp_path: Path) -> None:
    text = '"""Words."""\n\n# why\nx = 1  # here\n\n\ndef f():\n    """More."""\n    return "# x"\n'
    assert sources.code_of(text) == 'x = 1\ndef f():\n    return "# x"'
    closure = sources._closure(sources.PACKAGE / "triton_ops" / "norms.py")
    assert {"triton_ops/norms.py", "triton_ops/norm_kernels.py", "library.py"} <= closure
    assert not {"dispatch.py", "triton_ops/machine_code.py", "triton_ops/rope.py"} & closure
    assert sources.fingerprint("rms_norm", "triton") == sources.fingerprint("layer_norm", "triton")
    assert sources.fingerprint("rms_norm", "triton") != sources.fingerprint("rope", "triton")


def test_native_sources_count_where_they_are_there() -> None:
    assert sources.same_sources("a+csrc:1", "a+csrc:1")
    assert not sources.same_sources("a+csrc:1", "a+csrc:2")
    assert sources.same_sources("a+csrc:1", "a+library:9"), "an installation without csrc/"
    assert not sources.same_sources("b+csrc:1", "a+library:9")
    assert not sources.same_sources("a+library:1", "a+library:9")
