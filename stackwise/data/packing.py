"""Packing: documents of any length into rows of ``seq_len`` tokens.

A plan is arithmetic on document lengths alone; filling is one scatter. Both work on whole arrays,
with no Python loop over documents.
best_fit: best-fit-decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"):
from the longest piece on, each goes into the fullest row that still holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
PACKINGS = ("best_fit", "concatenate", "none")


@dataclass(frozen=True)
class RowPlan:
    """Where every piece of the token stream goes; pieces in stream order, covering it once.

    ``start``, ``length``: place of the piece in the stream; ``row``, ``column``: its destination;
    each (P,) int64. A piece never spans two documents or two rows.
    """

    start: IntArray
    length: IntArray
    row: IntArray
    column: IntArray
    n_rows: int
    seq_len: int


@dataclass(frozen=True)
class PackedArrays:
    """Rows ready to be written.

    ``tokens`` (R, L); ``starts`` (S,) int32, columns at which segments begin, row after row, each
    row's first one 0; a row's padding tail is its last segment. ``offsets`` (R+1,) int64: row r's
    segments are ``starts[offsets[r]:offsets[r + 1]]``.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int32]
    offsets: IntArray


def plan_rows(lengths: IntArray, seq_len: int, packing: str) -> RowPlan:
    """Assigns documents of ``lengths`` (n,) tokens, end-of-document token included, to rows.

    Documents longer than a row are cut: into pieces counted from the document's start (best_fit,
    none), or wherever a row ends (concatenate).
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    lengths = np.asarray(lengths, dtype=np.int64)
    lengths = lengths[lengths > 0]
    if packing == "concatenate":
        return _concatenate(lengths, seq_len)
    start, length = _cut(lengths, seq_len)
    if packing == "none":
        row, column = np.arange(len(start)), np.zeros(len(start), dtype=np.int64)
    else:
        row, column = _best_fit(length, seq_len)
    n_rows = int(row.max()) + 1 if len(row) else 0
    return RowPlan(start, length, row, column, n_rows, seq_len)


def _concatenate(lengths: IntArray, seq_len: int) -> RowPlan:
    total = int(lengths.sum())
    document_starts = np.cumsum(lengths) - lengths
    start = np.union1d(document_starts, np.arange(0, total, seq_len))
    length = np.diff(start, append=total)
    return RowPlan(start, length, start // seq_len, start % seq_len, -(-total // seq_len), seq_len)


def _cut(lengths: IntArray, seq_len: int) -> tuple[IntArray, IntArray]:
    """Stream position and length of the pieces of at most ``seq_len`` tokens of every document."""
    n_pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), n_pieces)
    first_piece = np.cumsum(n_pieces) - n_pieces
    within = (np.arange(len(document)) - first_piece[document]) * seq_len
    start = (np.cumsum(lengths) - lengths)[document] + within
    return start, np.minimum(seq_len, lengths[document] - within)


def _best_fit(length: IntArray, seq_len: int) -> tuple[IntArray, IntArray]:
    """Row and column of every piece; rows are numbered by their first piece, pieces within a row
    stand in stream order."""
    row = _best_fit_rows(length, seq_len)
    _, first, numbering = np.unique(row, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    row = rank[numbering.reshape(-1)]
    order = np.argsort(row, kind="stable")
    before = np.cumsum(length[order]) - length[order]
    row_start = np.searchsorted(row[order], row[order], side="left")
    column = np.empty_like(length)
    column[order] = before - before[row_start] if len(before) else before
    return row, column


def _best_fit_rows(length: IntArray, seq_len: int) -> IntArray:
    """Best-fit-decreasing, all pieces of one length at a time.

    The fullest row with room r takes r // size pieces in succession, because after each it is still
    the fullest that fits; so whole buckets of rows with equal room are filled at once.
    """
    order = np.argsort(-length, kind="stable")
    sizes, counts = np.unique(length, return_counts=True)
    rooms: dict[int, list[IntArray]] = {}
    chosen: list[IntArray] = []
    n_rows = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for room in sorted(room for room in rooms if room >= size):
            if not count:
                break
            rows = np.concatenate(rooms.pop(room))
            count -= _place(rows, room, size, count, rooms, chosen)
        if count:
            new_rows = np.arange(n_rows, n_rows - (-count // (seq_len // size)))
            n_rows += len(new_rows)
            _place(new_rows, seq_len, size, count, rooms, chosen)
    row = np.empty(len(length), dtype=np.int64)
    if chosen:
        row[order] = np.concatenate(chosen)
    return row


def _place(
    rows: IntArray,
    room: int,
    size: int,
    count: int,
    rooms: dict[int, list[IntArray]],
    chosen: list[IntArray],
) -> int:
    """Puts up to ``count`` pieces of ``size`` tokens into ``rows``; returns how many it placed."""
    per_row = room // size
    full, rest = divmod(min(count, len(rows) * per_row), per_row)
    taken = np.concatenate(
        [np.repeat(rows[:full], per_row), np.repeat(rows[full : full + 1], rest)]
    )
    chosen.append(taken)
    used = full + (rest > 0)
    for part, left in (
        (rows[:full], room - per_row * size),
        (rows[full:used], room - rest * size),
        (rows[used:], room),
    ):
        if len(part) and left:
            rooms.setdefault(left, []).append(part)
    return len(taken)


def fill_rows(tokens: NDArray[Any], plan: RowPlan, pad_id: int) -> PackedArrays:
    """Copies the token stream (T,) into the plan's rows, the rest being ``pad_id``."""
    total = int(plan.length.sum())
    if len(tokens) != total:
        raise ValueError(f"the plan covers {total} tokens, the stream has {len(tokens)}")
    shape = (plan.n_rows, plan.seq_len)
    flat = np.full(plan.n_rows * plan.seq_len, pad_id, dtype=tokens.dtype)
    shift = plan.row * plan.seq_len + plan.column - plan.start
    flat[np.arange(total) + np.repeat(shift, plan.length)] = tokens
    return PackedArrays(flat.reshape(shape), *_segments(plan))


def _segments(plan: RowPlan) -> tuple[NDArray[np.int32], IntArray]:
    used = np.bincount(plan.row, weights=plan.length, minlength=plan.n_rows).astype(np.int64)
    tails = np.flatnonzero(used < plan.seq_len)
    row = np.concatenate([plan.row, tails])
    column = np.concatenate([plan.column, used[tails]])
    order = np.lexsort((column, row))
    offsets = np.zeros(plan.n_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row, minlength=plan.n_rows), out=offsets[1:])
    return column[order].astype(np.int32), offsets
