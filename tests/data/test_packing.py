"""Packing: every token exactly once, in order, in the right row, never across a boundary."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.data.packing import PACKINGS, fill_rows, plan_rows

LENGTHS = st.lists(st.integers(1, 70), max_size=60)


def _stream(lengths: list[int]) -> np.ndarray:
    """Tokens that name their document and place: 1000 * (document + 1) + place."""
    parts = [1000 * (n + 1) + np.arange(length) for n, length in enumerate(lengths)]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype("<u4")


def _segments(packed, row: int) -> list[np.ndarray]:
    first, last = packed.offsets[row : row + 2]
    return np.split(packed.tokens[row], packed.starts[first:last])[1:]


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.sampled_from(PACKINGS))
def test_every_token_once_in_order_within_boundaries(lengths, seq_len, packing):
    stream = _stream(lengths)
    packed = fill_rows(stream, plan_rows(np.array(lengths), seq_len, packing), pad_id=0)
    assert packed.tokens.shape == (len(packed.offsets) - 1, seq_len)
    assert sorted(packed.tokens[packed.tokens > 0]) == sorted(stream)
    pieces: dict[int, list[int]] = {}
    for row in range(len(packed.tokens)):
        segments = _segments(packed, row)
        assert sum(map(len, segments)) == seq_len
        assert packed.starts[packed.offsets[row]] == 0
        for place, segment in enumerate(segments):
            assert len(segment)
            if segment[0] == 0:
                assert place == len(segments) - 1
                assert (segment == 0).all()
                continue
            documents = set(segment // 1000)
            assert len(documents) == 1
            assert (np.diff(segment.astype(int)) == 1).all()
            pieces.setdefault(documents.pop(), []).append(int(segment[0]))
    for firsts in pieces.values():
        assert len(firsts) == len(set(firsts))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_documents_are_cut_only_where_they_must(lengths, seq_len):
    for packing in ("best_fit", "none"):
        plan = plan_rows(np.array(lengths), seq_len, packing)
        expected = [min(seq_len, n - at) for n in lengths for at in range(0, n, seq_len)]
        assert plan.length.tolist() == expected
    plan = plan_rows(np.array(lengths), seq_len, "concatenate")
    assert plan.n_rows == -(-sum(lengths) // seq_len)


def _best_fit_decreasing(lengths: list[int], seq_len: int) -> int:
    """The rows the textbook algorithm needs, one piece at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(seq_len - length)
    return len(rooms)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80))
def test_best_fit_needs_as_many_rows_as_the_textbook_algorithm(lengths):
    plan = plan_rows(np.array(lengths), 40, "best_fit")
    assert plan.n_rows == _best_fit_decreasing(lengths, 40)


def test_best_fit_by_hand():
    plan = plan_rows(np.array([3, 7, 5, 4, 1]), 10, "best_fit")
    assert plan.row.tolist() == [0, 0, 1, 1, 1]
    assert plan.column.tolist() == [0, 3, 0, 5, 9]


def test_rows_follow_the_order_of_the_documents():
    lengths = np.random.default_rng(0).integers(1, 60, 5000)
    plan = plan_rows(lengths, 64, "best_fit")
    firsts = np.unique(plan.row, return_index=True)[1]
    assert (np.diff(firsts) > 0).all()


def test_none_gives_each_document_its_rows():
    plan = plan_rows(np.array([3, 25, 10]), 10, "none")
    assert plan.row.tolist() == [0, 1, 2, 3, 4]
    assert plan.column.tolist() == [0, 0, 0, 0, 0]
    assert plan.length.tolist() == [3, 10, 10, 5, 10]


def test_half_a_million_documents_are_planned_in_seconds_and_fill_the_rows():
    lengths = np.random.default_rng(1).lognormal(4.5, 1.0, 500_000).astype(np.int64) + 1
    begin = time.process_time()
    plan = plan_rows(lengths, 1024, "best_fit")
    assert time.process_time() - begin < 10
    assert lengths.sum() / (plan.n_rows * 1024) > 0.999


def test_faulty_arguments_are_named():
    with pytest.raises(ValueError, match=r"packing must be one of best_fit.*'first_fit'"):
        plan_rows(np.array([1]), 4, "first_fit")
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        plan_rows(np.array([1]), 0, "none")
    with pytest.raises(ValueError, match="the plan covers 3 tokens, the stream has 2"):
        fill_rows(np.zeros(2, "<u2"), plan_rows(np.array([3]), 4, "none"), 0)
