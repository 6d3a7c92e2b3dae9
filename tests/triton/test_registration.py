"""Triton variants are there when asked for, cost nothing when not, and say why they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stackwise import kernels
from stackwise.kernels import dispatch
from stackwise.kernels.triton_ops import registration

OPS = ("swiglu", "geglu", "bias_gelu", "rope")


def test_importing_the_kernels_does_not_import_triton(repository: Path) -> None:
    code = "import sys, stackwise.kernels as k; k.available(); print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


FIRST_CALLS_COMPILED = """
import sys, torch
from stackwise import kernels
x, w = torch.randn(5, 16), torch.randn(16)
q, table = torch.randn(1, 5, 2, 16), torch.randn(5, 16)
calls = {
    "gated": lambda impl: kernels.swiglu(x, x, impl=impl),
    "bias_gelu": lambda impl: kernels.bias_gelu(x, w, impl=impl),
    "norms": lambda impl: kernels.rms_norm(x, w, impl=impl),
    "rope": lambda impl: kernels.rope(q, q, table, table, impl=impl)[0],
}
assert "triton" not in sys.modules
for module, call in calls.items():
    assert f"stackwise.kernels.triton_ops.{module}" not in sys.modules
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled("triton"), call("reference"))
    from tests.triton.interpreter import repair
    repair()
"""


def test_the_first_call_of_a_variant_may_be_compiled(repository: Path) -> None:
    pytest.importorskip("triton")
    subprocess.run(
        [sys.executable, "-c", FIRST_CALLS_COMPILED],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )


@pytest.mark.parametrize("op", OPS)
def test_status_says_that_no_gpu_has_validated_it(op: str) -> None:
    assert kernels.available()[op]["triton"] == "not validated on a GPU"


def test_tensors_on_a_cpu_are_refused_by_name() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="swiglu: a tensor is on cpu, Triton runs on CUDA devices"):
        kernels.swiglu(x, x, impl="triton")


def test_a_preference_that_cannot_run_here_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4)
    monkeypatch.setenv("STACKWISE_IMPL", "triton")
    assert torch.equal(kernels.swiglu(x, x), kernels.swiglu(x, x, impl="torch"))


@pytest.mark.parametrize("op", OPS)
def test_triton_is_never_chosen_without_evidence(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "why_not", lambda arguments: None)
    tensors = [torch.ones(1, 2, 2, 4)] * 2
    assert dispatch.select(op, None, *tensors) is dispatch.select(op, "torch", *tensors)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registration.why_not([torch.ones(1), None, "tanh", torch.ones(1).half()]) is None
    assert registration.why_not([torch.ones(1, dtype=torch.int64)]) is None
    assert "dtype torch.float64" in str(registration.why_not([torch.ones(1).double()]))
    monkeypatch.setattr(registration, "_has_triton", False)
    assert registration.why_not([]) == "Triton cannot be imported"


def test_an_operation_can_add_reasons_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    registration.register("probe", "none:none", unsupported=lambda x: f"{x.shape[0]} rows")
    with pytest.raises(ValueError, match=r"probe: 3 rows; variants of probe: triton"):
        dispatch.select("probe", "triton", torch.ones(3))
    with pytest.raises(ValueError, match="float64"):
        dispatch.select("probe", "triton", torch.ones(3).double())


def test_environment_of_the_tests_does_not_interpret() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
