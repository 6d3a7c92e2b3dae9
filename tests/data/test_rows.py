"""Packed rows: batches, boundaries, what may be masked, and exact byte accounting."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.data import PackedRows, PreparedData, TokenizerInfo, pack_documents, prepare_data
from stackwise.data.packing import PACKINGS
from stackwise.data.shards import ShardWriter, token_dtype

INFO = TokenizerInfo(
    vocab_size=50, pad_id=0, eos_id=1, mask_id=2, bos_id=None, special_ids=(0, 1, 2)
)
DOCUMENTS = [list(range(3, 3 + n)) for n in (4, 9, 2, 23, 1, 6)]


def _documents_of(rows: PackedRows) -> list[list[int]]:
    """Every segment without its padding, read back through batches."""
    found = []
    for row in range(len(rows)):
        batch = rows.batch([row])
        bounds = batch.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(bounds):
            tokens = batch.input_ids[0, start:stop].tolist()
            if tokens[0] != 0:
                found.append(tokens)
    return found


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_come_back_from_batches_with_eos(packing: str, tmp_path: Path):
    rows = pack_documents(DOCUMENTS, tmp_path, INFO, seq_len=10, packing=packing)
    pieces = sorted(tuple(piece) for piece in _documents_of(rows))
    stream = sorted(token for document in DOCUMENTS for token in [*document, 1])
    assert sorted(itertools.chain(*pieces)) == stream
    if packing != "concatenate":
        expected = [
            tuple([*document, 1][at : at + 10])
            for document in DOCUMENTS
            for at in range(0, len(document) + 1, 10)
        ]
        assert pieces == sorted(expected)
    assert rows.n_tokens == rows.n_bytes == sum(map(len, DOCUMENTS))
    assert rows.n_documents == len(DOCUMENTS)
    assert rows.fill_rate == pytest.approx(len(stream) / (len(rows) * 10))


def test_a_batch_by_hand(tmp_path: Path):
    rows = pack_documents([[5, 6, 7], [8], [9, 10, 11, 12]], tmp_path, INFO, seq_len=8)
    batch = rows.batch([1, 0])
    assert batch.input_ids.tolist() == [[8, 1, 9, 10, 11, 12, 1, 0], [5, 6, 7, 1, 0, 0, 0, 0]]
    assert batch.maskable.tolist() == [
        [True, False, True, True, True, True, False, False],
        [True, True, True, False, False, False, False, False],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 2, 7, 8, 12, 16]
    assert batch.max_seqlen == 5
    assert batch.row_ids.tolist() == [1, 0]
    assert (batch.input_ids.dtype, batch.position_ids.dtype) == (torch.int64, torch.int64)
    assert (batch.cu_seqlens.dtype, batch.row_ids.dtype) == (torch.int32, torch.int64)
    assert batch.maskable.dtype == torch.bool


def test_special_tokens_inside_a_document_are_not_maskable(tmp_path: Path):
    rows = pack_documents([[5, 2, 6, 1, 7]], tmp_path, INFO, seq_len=6)
    assert rows.batch([0]).maskable.tolist() == [[True, False, True, False, True, False]]
    assert rows.n_tokens == rows.n_bytes == 3


def test_rows_do_not_depend_on_the_batch_they_are_read_in(builtin: PreparedData):
    rows = builtin.train
    together = rows.batch([3, 500, 3, 12])
    for place, row in enumerate([3, 500, 3, 12]):
        alone = rows.batch([row])
        assert torch.equal(alone.input_ids[0], together.input_ids[place])
        assert torch.equal(alone.position_ids[0], together.position_ids[place])


def test_every_boundary_starts_a_position_count(builtin: PreparedData):
    batch = builtin.train.batch(np.arange(200))
    flat = batch.position_ids.flatten()
    assert torch.equal(torch.nonzero(flat == 0).flatten(), batch.cu_seqlens[:-1].long())
    lengths = batch.cu_seqlens.diff()
    assert batch.max_seqlen == lengths.max()
    assert (lengths > 0).all()
    assert set(range(0, 200 * 128, 128)) <= set(batch.cu_seqlens.tolist())


def test_the_same_rows_in_one_shard_and_in_many(tmp_path: Path):
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, 50, generator.integers(1, 30)).tolist() for _ in range(200)]
    whole = pack_documents(documents, tmp_path / "whole", INFO, seq_len=16)
    manifest = {"seq_len": 16, "packing": "best_fit", "vocab_size": 50, "special_ids": [0, 1, 2]}
    writer = ShardWriter(tmp_path / "parts", rows_per_shard=7)
    for row in range(0, len(whole), 10):
        arrays = whole._shards[0].arrays()
        last = min(row + 10, len(whole))
        offsets = arrays.offsets[row : last + 1]
        writer.append(
            type(arrays)(
                arrays.tokens[row:last],
                arrays.starts[offsets[0] : offsets[-1]],
                offsets - offsets[0],
            )
        )
    entry = writer.close() | {"documents": 200, "tokens": whole.n_tokens, "bytes": 0, "filled": 0}
    parts = PackedRows(tmp_path / "parts", manifest | {"splits": {"train": entry}}, "train")
    assert len(parts) == len(whole)
    assert len(entry["shards"]) == -(-len(whole) // 7)
    assert parts.fingerprint == whole.fingerprint
    ids = generator.permutation(len(whole))
    ours, theirs = parts.batch(ids), whole.batch(ids)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)


def test_the_fingerprint_tells_rows_apart(tmp_path: Path):
    def fingerprint(name: str, documents: list[list[int]], packing: str = "best_fit") -> str:
        return pack_documents(documents, tmp_path / name, INFO, 8, packing).fingerprint

    first = fingerprint("a", [[3, 4], [5]])
    assert fingerprint("b", [[3, 4], [5]]) == first
    assert fingerprint("c", [[3, 4], [6]]) != first
    assert fingerprint("d", [[3, 4, 1, 5]]) != first
    assert fingerprint("e", [[3, 4], [5]], "none") != first


def test_large_vocabularies_take_four_bytes(tmp_path: Path):
    info = TokenizerInfo(70_000, 0, 1, 2, None, (0, 1, 2))
    rows = pack_documents([[69_999, 65_536, 3]], tmp_path, info, seq_len=4)
    assert rows.batch([0]).input_ids.tolist() == [[69_999, 65_536, 3, 1]]
    assert (token_dtype(65_536).itemsize, token_dtype(65_537).itemsize) == (2, 4)


def test_tokens_and_bytes_are_counted_exactly_on_multi_byte_text(text_folder: Path, make_config):
    data = prepare_data(make_config(text_folder, seq_len=16), progress=False)
    files = [path.read_text(encoding="utf-8") for path in text_folder.rglob("*.txt")]
    n_bytes = sum(len(text.encode()) for text in files)
    assert data.train.n_bytes + data.validation.n_bytes == n_bytes > sum(map(len, files))
    for rows in (data.train, data.validation):
        batch = rows.batch(range(len(rows)))
        kept = batch.input_ids[batch.maskable].tolist()
        assert len(kept) == rows.n_tokens
        # One character of GPT-2's byte alphabet stands for one byte.
        assert sum(len(data.tokenizer._token(index) or "") for index in kept) == rows.n_bytes


def test_unigram_bits_per_byte_by_hand(tmp_path: Path):
    train = pack_documents([[3, 3, 3, 4]], tmp_path / "t", INFO, 8)
    validation = pack_documents([[3, 5]], tmp_path / "v", INFO, 8)
    types = 50 - 3
    expected = -(math.log2(4 / (4 + types)) + math.log2(1 / (4 + types))) / 2
    assert validation.unigram_bits_per_byte(train) == pytest.approx(expected, rel=1e-12)
    empty = pack_documents([], tmp_path / "e", INFO, 8)
    assert len(empty) == 0
    assert math.isnan(empty.unigram_bits_per_byte(train))


def test_faulty_row_ids_are_named(tmp_path: Path):
    rows = pack_documents(DOCUMENTS, tmp_path, INFO, seq_len=10)
    with pytest.raises(ValueError, match=rf"row_ids must lie in 0..{len(rows) - 1}, got 0..99"):
        rows.batch([0, 99])
    with pytest.raises(ValueError, match="must lie in"):
        rows.batch([-1])
    with pytest.raises(ValueError, match="non-empty list"):
        rows.batch([])
