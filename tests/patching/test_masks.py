"""Which form a mask takes, that every form says the same, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

from stackwise.kernels import attention
from stackwise.patching.attention import stackwise_attention
from stackwise.patching.masks import AttentionPattern, stackwise_mask

from .conftest import BATCHES, positions_of

L = 12


def qkv(lq: int = L, lk: int = L, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, lq, 8), (2, kv_heads, lk, 8), (2, kv_heads, lk, 6))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def packed(inner: Callable[..., Tensor], *rows: list[int]) -> Callable[..., Tensor]:
    positions = positions_of(*rows)
    found = masking_utils.find_packed_sequence_indices(positions)
    assert found is not None
    return masking_utils.packed_sequence_compatibility_function(inner, positions, found)


LEFT = torch.ones(2, L, dtype=torch.bool)
LEFT[0, :5] = False
RIGHT = torch.ones(2, L, dtype=torch.bool)
RIGHT[0, 9:] = False
RIGHT[1] = False
HOLE = LEFT.clone()
HOLE[1, 4:6] = False
CAUSAL = masking_utils.causal_mask_function
WINDOW = masking_utils.sliding_window_causal_mask_function(3)
BOTH_SIDES = masking_utils.sliding_window_bidirectional_mask_function(2)
BIDIRECTIONAL = masking_utils.bidirectional_mask_function
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"mask_function": CAUSAL},
    "causal_left": {"mask_function": CAUSAL, "attention_mask": LEFT},
    "causal_right": {"mask_function": CAUSAL, "attention_mask": RIGHT},
    "causal_hole": {"mask_function": CAUSAL, "attention_mask": HOLE},
    "causal_packed": {"mask_function": packed(CAUSAL, [5, 1, 6], [12]), "packed": True},
    "window": {"mask_function": WINDOW},
    "window_left": {"mask_function": WINDOW, "attention_mask": LEFT},
    "window_hole": {"mask_function": WINDOW, "attention_mask": HOLE},
    "window_packed": {"mask_function": packed(WINDOW, [5, 1, 6], [2, 10]), "packed": True},
    "bidirectional": {"mask_function": BIDIRECTIONAL},
    "bidirectional_right": {"mask_function": BIDIRECTIONAL, "attention_mask": RIGHT},
    "both_sides_left": {"mask_function": BOTH_SIDES, "attention_mask": LEFT},
    "chunked": {
        "mask_function": masking_utils.chunked_causal_mask_function(
            4, torch.zeros(2, dtype=torch.int64)
        )
    },
    "causal_later": {"mask_function": CAUSAL, "q_offset": 8, "q_length": 4},
    "causal_later_left": {
        "mask_function": CAUSAL,
        "q_offset": 8,
        "q_length": 4,
        "attention_mask": LEFT,
    },
    "window_later": {"mask_function": WINDOW, "q_offset": 8, "q_length": 4},
    "window_shifted_cache": {
        "mask_function": WINDOW,
        "q_offset": 28,
        "kv_offset": 20,
        "q_length": 4,
    },
    "causal_empty_static_cache": {"mask_function": CAUSAL, "q_length": 4},
    "one_row": {"mask_function": CAUSAL, "q_offset": 11, "q_length": 1, "attention_mask": LEFT},
    "one_row_static": {
        "mask_function": CAUSAL,
        "q_offset": torch.tensor(6),
        "q_length": 1,
        "attention_mask": LEFT,
        "allow_is_causal_skip": False,
    },
}


@pytest.mark.parametrize("name", list(MASKS))
def test_every_form_says_what_the_dense_mask_says(name: str) -> None:
    """Rows that see nothing give 0 and no gradient; so does padding where it is left out."""
    options = {"batch_size": 2, "q_length": L, "kv_length": L, "q_offset": 0, **MASKS[name]}
    if options.pop("packed", False) or "bidirectional" in name or "both" in name:
        options["allow_is_causal_skip"] = False
    if "bidirectional" in name or "both" in name:
        options["allow_is_bidirectional_skip"] = True
    form = stackwise_mask(**options)
    dense = masking_utils.sdpa_mask(
        **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    ).expand(2, 1, -1, -1)
    if isinstance(form, AttentionPattern) and form.cu_seqlens_k is not None:
        dense = dense & options["attention_mask"][:, None, :, None]
    inputs = [x.requires_grad_() for x in qkv(lq=options["q_length"])]
    out, weights = stackwise_attention(nn.Identity(), *inputs, form)
    assert weights is None
    q, k, v = (x.transpose(1, 2) for x in inputs)
    expected = attention(q, k, v, mask=dense, impl="reference")
    upstream = torch.randn(out.shape)
    ours = torch.autograd.grad(out, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for mine, truth in zip((out, *ours), (expected, *theirs), strict=True):
        assert (mine - truth).abs().max() <= 2e-6
    hidden = ~dense.any(-1)[:, 0]
    assert bool((out[hidden] == 0).all())


def test_forms() -> None:
    """No tensor of Lq times Lk elements where there is another way."""

    def form(name: str) -> Any:
        options = {"batch_size": 2, "q_length": L, "kv_length": L, **MASKS[name]}
        if options.pop("packed", False):
            options["allow_is_causal_skip"] = False
        return stackwise_mask(**options)

    assert form("causal") is None
    assert form("causal_later") is None
    left = form("causal_left")
    assert left.cu_seqlens_q.tolist() == [0, 5, 5, 12, 12, 24, 24]
    assert left.cu_seqlens_k.tolist() == [0, 0, 5, 12, 12, 24, 24]
    rows = form("window_packed")
    assert rows.cu_seqlens_q.tolist() == [0, 5, 6, 12, 14, 24]
    assert rows.cu_seqlens_k is None
    assert rows.window == (2, -1)
    assert form("window_later").window == (2, -1)
    assert torch.equal(form("causal_hole").keys, HOLE)
    for name in ("chunked", "causal_empty_static_cache", "one_row_static"):
        dense = form(name)
        assert dense.dtype == torch.bool
        assert dense.shape == (2, 1, MASKS[name].get("q_length", L), L)


def test_functions_of_users_are_never_skipped() -> None:
    """``or_mask_function`` of a model comes with ``use_vmap``, and so does any other function."""
    prefix = masking_utils.or_masks(CAUSAL, lambda b, h, q, k: k < 3)
    mask = stackwise_mask(2, L, L, mask_function=prefix, allow_is_causal_skip=False, use_vmap=True)
    assert isinstance(mask, Tensor)
    assert bool(mask[0, 0, 0, 2])
    assert not bool(mask[0, 0, 0, 3])
    other = masking_utils.and_masks(CAUSAL, lambda b, h, q, k: k != 1)
    assert isinstance(stackwise_mask(2, L, L, mask_function=other), Tensor)


def test_dense_masks_of_users() -> None:
    """bool, or floating point with the lowest value; one row for all; longer than the keys."""
    q, k, v = qkv(lq=5, lk=7)
    keep = torch.rand(1, 1, 5, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    expected = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        mask=keep[..., :7].expand(2, 1, 5, 7),
        impl="reference",
    )
    for mask in (keep, added, added.masked_fill(~keep, -torch.inf)):
        out, _ = stackwise_attention(nn.Identity(), q, k, v, mask, sliding_window=2)
        assert (out - expected).abs().max() <= 2e-6
    row = keep[:, :, :1]
    out, _ = stackwise_attention(nn.Identity(), q, k, v, row)
    expected = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        mask=row[..., :7].expand(2, 1, 5, 7),
        impl="reference",
    )
    assert (out - expected).abs().max() <= 2e-6


def test_causality_without_a_mask() -> None:
    """The call decides, then the layer, then it is causal."""
    q, k, v = qkv()
    layer = nn.Identity()
    first, _ = stackwise_attention(layer, q, k, v, None)
    layer.is_causal = False
    full, _ = stackwise_attention(layer, q, k, v, None)
    again, _ = stackwise_attention(layer, q, k, v, None, is_causal=True)
    windowed, _ = stackwise_attention(layer, q, k, v, None, is_causal=True, sliding_window=3)
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    for out, options in (
        (first, {"causal": True}),
        (again, {"causal": True}),
        (full, {}),
        (windowed, {"causal": True, "window": (2, -1)}),
    ):
        assert (out - attention(*tensors, impl="reference", **options)).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout: got 0.1"),
        ({"output_attentions": True}, "output_attentions: got True"),
        ({"head_mask": torch.ones(4)}, "head_mask: got an argument"),
        ({"position_bias": torch.ones(1)}, "position_bias: got an argument"),
        ({"cache": object()}, "cache: got an argument"),
        ({"attention_mask": torch.full((2, 1, L, L), 0.5)}, "finite biases"),
        ({"attention_mask": torch.ones(2, 1, L, L, dtype=torch.int64)}, "int64"),
        ({"attention_mask": torch.ones(2, L, dtype=torch.bool)}, r"got shape \(2, 12\)"),
        ({"attention_mask": torch.ones(2, 1, L, 3, dtype=torch.bool)}, r"got shape"),
        ({"attention_mask": AttentionPattern((2, 1, 9, 9), True)}, "pattern for"),
        (
            {
                "attention_mask": torch.ones(2, 1, L, L, dtype=torch.bool),
                "cu_seq_lens_q": torch.tensor([0, 24], dtype=torch.int32),
            },
            "dense mask with cu_seq_lens_q",
        ),
        (
            {
                "attention_mask": AttentionPattern((2, 1, L, L), True, keys=LEFT),
                "cu_seq_lens_q": torch.tensor([0, 24], dtype=torch.int32),
            },
            "padding with cu_seq_lens_q",
        ),
        ({"is_causal": False, "sliding_window": 3}, "sliding_window: got 3"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"attention_mask": None, **options}
    with pytest.raises(ValueError, match=message):
        stackwise_attention(nn.Identity(), *qkv(), **arguments)


def test_arguments_that_are_not_for_attention_pass() -> None:
    out, _ = stackwise_attention(
        nn.Identity(), *qkv(), None, position_ids=torch.arange(L), use_cache=True, head_mask=None
    )
    expected, _ = stackwise_attention(nn.Identity(), *qkv(), None)
    assert torch.equal(out, expected)


def test_refused_in_a_model(tiny: Callable[..., Any]) -> None:
    batch = BATCHES["plain"]()
    with pytest.raises(ValueError, match="output_attentions"):
        tiny("llama", "stackwise")(**batch, output_attentions=True)
    with pytest.raises(ValueError, match=r"attn_pdrop.*to 0"):
        tiny("gpt2", "stackwise", attn_pdrop=0.1).train()(**batch)
    assert tiny("gpt2", "stackwise", attn_pdrop=0.1)(**batch).logits.isfinite().all()
    with pytest.raises(ValueError, match="attention_dropout"):
        tiny("llama", "stackwise", attention_dropout=0.2).train()(**batch)


def test_sinks_and_softcap_with_gradient() -> None:
    inputs = [x.requires_grad_() for x in (*qkv(), torch.randn(4))]
    q, k, v, sinks = inputs
    out, _ = stackwise_attention(
        nn.Identity(), q, k, v, None, scaling=0.3, softcap=1.5, s_aux=sinks
    )
    expected = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=True, scale=0.3, softcap=1.5, sinks=sinks, impl="reference",
    )  # fmt: skip
    upstream = torch.randn(out.shape)
    ours = torch.autograd.grad(out, inputs, upstream)
    for mine, truth in zip(ours, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert (mine - truth).abs().max() <= 2e-6
