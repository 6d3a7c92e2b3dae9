"""Packed rows give every document the loss and gradients it has alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from stackwise.model.layout import Layout

BOUNDARIES = [0, 7, 12, 24, 25, 41, 48]


def loss_of_documents_alone(model, ids, targets) -> torch.Tensor:
    """Summed cross entropy of every document run alone, as plain PyTorch sees it."""
    flat, wanted = ids.flatten(), targets.flatten()
    total = torch.zeros((), dtype=model.head.weight.dtype)
    for start, stop in itertools.pairwise(BOUNDARIES):
        logits = model(flat[None, start:stop]).logits[0]
        total = total + F.cross_entropy(logits, wanted[start:stop], reduction="sum")
    return total


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        *(
            (kind, torch.float32, 1e-6)
            for kind in ("llama", "gpt2", "gqa", "mla", "low_rank", "kernel", "window")
        ),
        # The Laplacian spectrum has heavy tails: phases of many turns amplify rounding.
        ("mlgka", torch.float64, 1e-12),
    ],
)
def test_packed_equals_documents_alone(
    build_decoder, gradients, kind, dtype, tolerance, mode
) -> None:
    model = build_decoder(kind).to(dtype)
    model.set_attention_mode(mode)
    ids, targets = torch.randint(0, 37, (2, 2, 24))

    alone = loss_of_documents_alone(model, ids, targets) / 48
    alone.backward()
    expected = gradients(model)

    layout = Layout.packed(2, 24, torch.tensor(BOUNDARIES))
    hidden = model.run_blocks(model.embed(ids, layout), layout)
    packed = model.loss(hidden, targets) / 48
    packed.backward()
    result = gradients(model)

    assert abs(packed - alone) <= tolerance * max(1.0, abs(alone))
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert (result[name] - value).abs().max() <= tolerance, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_change_in_one_document_leaves_the_others_bits(build_decoder, kind) -> None:
    model = build_decoder(kind)
    boundaries = torch.tensor(BOUNDARIES)
    ids = torch.randint(0, 37, (2, 24))
    changed = ids.clone()
    changed.view(-1)[7:12] = (changed.view(-1)[7:12] + 1) % 37
    before = model(ids, cu_seqlens=boundaries).logits.flatten(0, 1)
    after = model(changed, cu_seqlens=boundaries).logits.flatten(0, 1)
    assert torch.equal(before[:7], after[:7])
    assert torch.equal(before[12:], after[12:])
    assert not torch.equal(before[7:12], after[7:12])


def test_positions_restart_in_every_document() -> None:
    layout = Layout.packed(2, 6, torch.tensor([0, 2, 6, 9, 12]))
    assert layout.position_ids.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]]
    assert layout.max_seqlen == 4
    assert layout.position_end == 4


def test_given_positions_replace_the_restarting_ones(build_decoder) -> None:
    model = build_decoder("gpt2")
    ids = torch.randint(0, 37, (1, 6))
    moved = torch.arange(3, 9)[None]
    shifted = model(ids, position_ids=moved).logits
    table = model.embeddings.position.weight
    with torch.no_grad():
        table.copy_(table.roll(-3, 0))
    assert torch.equal(model(ids).logits, shifted)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([0, 5, 12], "include every row start"),
        ([0, 6, 11], "ascending from 0 to 2 \\* 6 = 12"),
        ([1, 6, 12], "ascending from 0"),
        ([0, 8, 6, 12], "ascending from 0"),
    ],
)
def test_wrong_boundaries_are_refused(build_decoder, boundaries, message) -> None:
    model = build_decoder("llama")
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 6, dtype=torch.int64), cu_seqlens=torch.tensor(boundaries))


def test_mask_and_boundaries_together_are_refused(build_decoder) -> None:
    model = build_decoder("llama")
    with pytest.raises(ValueError, match="attention_mask and cu_seqlens: got both"):
        model(
            torch.zeros(2, 6, dtype=torch.int64),
            attention_mask=torch.ones(2, 6),
            cu_seqlens=torch.tensor([0, 6, 12]),
        )
