"""mla_attention in the interpreter: DeepSeek's widths, packed documents, nothing concatenated."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels.triton_ops import attention_launchers
from tests.triton.compare import assert_follows_reference
from tests.triton.interpreted.test_attention import DTYPES, FLOAT32_FLOOR


def inputs(
    lq: int,
    lk: int,
    heads: int = 2,
    widths: tuple[int, int, int] = (128, 64, 128),
    lead: tuple[int, ...] = (1,),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    dn, dr, dv = widths
    latent = 32
    return [
        x.to(dtype)
        for x in (
            torch.randn(*lead, lq, heads, dn),
            torch.randn(*lead, lq, heads, dr),
            torch.randn(*lead, lk, latent),
            torch.randn(*lead, lk, dr),
            torch.randn(heads * dn, latent) / latent**0.5,
            torch.randn(heads * dv, latent) / latent**0.5,
        )
    ]


def attend(*tensors: Tensor, impl: str = "triton", **options: Any) -> Any:
    return kernels.mla_attention(*tensors, impl=impl, **options)


def follows_reference(tensors: list[Tensor], **options: Any) -> None:
    floor = FLOAT32_FLOOR if tensors[0].dtype == torch.float32 else 0.0
    reference = partial(attend, impl="reference")
    assert_follows_reference(attend, reference, tensors, floor=floor, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_of_deepseek(dtype: torch.dtype) -> None:
    follows_reference(inputs(70, 70, dtype=dtype), causal=True)


@pytest.mark.parametrize("widths", [(32, 16, 32), (48, 24, 80), (12, 6, 10)], ids=str)
def test_other_widths(widths: tuple[int, int, int]) -> None:
    follows_reference(inputs(40, 90, 3, widths), return_lse=True, scale=0.3)


def test_packed_documents() -> None:
    cu = torch.tensor([0, 5, 5, 22, 70], dtype=torch.int32)
    for causal in (False, True):
        tensors = inputs(70, 70, 2, (32, 16, 32), lead=())
        follows_reference(tensors, causal=causal, cu_seqlens_q=cu)


def test_one_head_needs_no_sum() -> None:
    follows_reference(inputs(20, 20, 1, (32, 16, 32)), causal=True, softcap=3.0)


def test_the_shared_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read k_rope through a stride of 0 over the heads."""
    made = []
    original = attention_launchers.make_problem

    def watch(*arguments: Any) -> Any:
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(attention_launchers, "make_problem", watch)
    tensors = inputs(20, 20)
    attend(*tensors, causal=True)
    assert made[0].k[1].stride(2) == 0
    assert made[0].k[1].data_ptr() == tensors[3].data_ptr()
    assert made[0].q[1].data_ptr() == tensors[1].data_ptr()


def test_under_autocast_and_compiled() -> None:
    tensors = [x.requires_grad_() for x in inputs(20, 20, 2, (32, 16, 32))]

    def loss(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*tensors, causal=True)
        assert out.dtype == torch.bfloat16
        return out.float().square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, same in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(ours, same, rtol=2e-2, atol=2e-2)


def test_what_is_refused_is_named() -> None:
    with pytest.raises(ValueError, match=r"head dimensions 200 \+ 64 and 128; accepted: 1 to 256"):
        attend(*inputs(3, 3, 1, (200, 64, 128)))
    with pytest.raises(ValueError, match="a dense mask"):
        attend(*inputs(3, 3), mask=torch.ones(1, 1, 3, 3).bool())
