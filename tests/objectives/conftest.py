"""Small packed batches with known documents, padding and special tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from stackwise.data.batch import Batch

PAD, EOS, MASK = 0, 1, 2
SPECIAL = (PAD, EOS, MASK)
VOCAB = 24
Rows = Sequence[Sequence[Sequence[int]]]


def pack_rows(rows: Rows, length: int, row_ids: Sequence[int] | None = None, pad: int = PAD):
    """A Batch from rows of documents of token ids; what is left of a row is padding."""
    ids, positions, bounds = [], [], [0]
    for row in rows:
        tail = length - sum(len(document) for document in row)
        for document in [*row, [pad] * tail]:
            if document:
                ids += document
                positions += range(len(document))
                bounds.append(bounds[-1] + len(document))
    input_ids = torch.tensor(ids).view(len(rows), length)
    return Batch(
        input_ids=input_ids,
        maskable=~torch.isin(input_ids, torch.tensor(SPECIAL)),
        position_ids=torch.tensor(positions).view(len(rows), length),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(bounds)),
        row_ids=torch.tensor(row_ids if row_ids is not None else range(len(rows))),
    )


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return pack_rows


@pytest.fixture
def text_batch() -> Callable[..., Batch]:
    """n rows of two documents of random ordinary tokens, each closed by EOS, then padding."""

    def build(n_rows: int, length: int = 32, first_row: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(first_row)
        sizes = (length // 2, length // 4)
        rows = [
            [
                [*torch.randint(3, VOCAB, (size,), generator=generator).tolist(), EOS]
                for size in sizes
            ]
            for _ in range(n_rows)
        ]
        return pack_rows(rows, length, range(first_row, first_row + n_rows))

    return build
