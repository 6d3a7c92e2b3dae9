"""The layout of a batch: from prepared batches, and what blocks share through it."""

from __future__ import annotations

import torch

from stackwise.data.batch import Batch
from stackwise.model.layout import Layout


def batch(boundaries: list[int], max_seqlen: int) -> Batch:
    ids = torch.arange(12).view(2, 6)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    return Batch(
        input_ids=ids,
        maskable=torch.ones(2, 6, dtype=torch.bool),
        position_ids=(ids.flatten() - starts).view(2, 6),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        row_ids=torch.arange(2),
    )


def test_prepared_batches_give_the_layout_of_their_boundaries() -> None:
    prepared = batch([0, 2, 6, 9, 12], 4)
    layout = Layout.from_batch(prepared)
    described = Layout.packed(2, 6, prepared.cu_seqlens)
    assert torch.equal(layout.position_ids, described.position_ids)
    assert layout.cu_seqlens is prepared.cu_seqlens
    assert (layout.max_seqlen, layout.position_end, layout.offset) == (4, 4, None)


def test_whole_row_documents_slice_their_positions() -> None:
    layout = Layout.from_batch(batch([0, 6, 12], 6))
    assert layout.offset == 0
    assert layout.cu_seqlens.tolist() == [0, 6, 12]
    assert Layout.from_batch(batch([0, 5, 6, 12], 6)).offset is None


def test_a_row_has_the_same_bits_beside_whole_and_cut_rows(build_decoder) -> None:
    model = build_decoder("llama")
    whole = Layout.from_batch(batch([0, 6, 12], 6))
    beside_cut = Layout.from_batch(batch([0, 6, 8, 12], 6))
    ids = torch.arange(12).view(2, 6)
    alone, mixed = (
        model.run_blocks(model.embed(ids, layout), layout) for layout in (whole, beside_cut)
    )
    assert torch.equal(alone[0], mixed[0])
    assert not torch.equal(alone[1], mixed[1])


def test_rows_are_counted_per_document_once() -> None:
    layout = Layout.packed(2, 6, torch.tensor([0, 2, 6, 9, 12]))
    rows = torch.tensor([1, 2, 5, 11])
    selection = layout.select(rows)
    assert selection.cu_seqlens_q.tolist() == [0, 1, 3, 3, 4]
    assert selection.cu_seqlens_q.dtype == torch.int32
    assert layout.select(rows) is selection
    assert layout.select(rows.clone()) is not selection
    assert Layout.dense(2, 6).select(rows).cu_seqlens_q.tolist() == [0, 3, 4]


def test_padding_becomes_a_bias_of_the_keys() -> None:
    layout = Layout.from_attention_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    inf = float("inf")
    assert layout.key_bias.tolist() == [[[0.0, 0.0, -inf]], [[0.0, 0.0, 0.0]]]
    assert layout.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
