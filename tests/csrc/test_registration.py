"""The "cuda" variants: listed, never a default, refused with the remedy where they cannot run."""

from __future__ import annotations

import pytest
import torch

from stackwise import kernels
from stackwise.kernels import _cuda, dispatch
from stackwise.kernels.cuda_ops import registration

OPS = {"rms_norm": kernels.rms_norm, "layer_norm": kernels.layer_norm}


@pytest.mark.parametrize("op", OPS)
def test_the_variant_is_listed_with_what_is_known_of_it(op: str) -> None:
    built = _cuda.status()["built"]
    variant = dispatch.variant(op, "cuda")
    assert variant.status == (
        "not validated on a GPU" if built else "not built with this installation"
    )
    assert variant.preferred is None
    assert variant.source == "cuda_ops.norms"


@pytest.mark.parametrize("op", OPS)
def test_without_the_library_the_remedy_is_named(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_missing", _cuda.status(_cuda.LIBRARY / "absent")["reason"])
    with pytest.raises(ValueError, match=f"case of {op}: absent was not built .*STACKWISE_CUDA=1"):
        OPS[op](torch.zeros(2, 8), torch.ones(8), impl="cuda")


@pytest.mark.parametrize("op", OPS)
def test_tensors_elsewhere_are_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_missing", None)
    with pytest.raises(ValueError, match="a tensor is on cpu, the library runs on CUDA devices"):
        OPS[op](torch.zeros(2, 8), torch.ones(8), impl="cuda")


@pytest.mark.parametrize("op", OPS)
def test_it_is_no_default_on_a_cpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACKWISE_IMPL", "cuda")
    out = OPS[op](torch.zeros(2, 8), torch.ones(8))
    assert torch.equal(out, torch.zeros(2, 8))
