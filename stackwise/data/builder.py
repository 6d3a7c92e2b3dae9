"""From token lists to a split on disk, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise.data.packing import fill_rows, plan_rows
from stackwise.data.rows import PackedRows
from stackwise.data.shards import ShardWriter, token_dtype
from stackwise.data.tokenizer import TokenizerInfo

BUFFER_TOKENS = 1 << 22


class SplitBuilder:
    """Collects documents, packs them a buffer at a time and writes the rows.

    A buffer holds some four million tokens: enough that best-fit packing loses nothing to its
    edges. ``concatenate`` carries the unfinished row over to the next buffer.
    """

    def __init__(
        self,
        folder: Path,
        info: TokenizerInfo,
        seq_len: int,
        packing: str,
        shard_tokens: int,
        buffer_tokens: int = BUFFER_TOKENS,
    ) -> None:
        self._folder = folder
        self._info = info
        self._seq_len = seq_len
        self._packing = packing
        self._buffer_tokens = max(buffer_tokens, seq_len)
        self._dtype = token_dtype(info.vocab_size)
        self._writer = ShardWriter(folder, max(1, shard_tokens // seq_len))
        self._tokens: list[NDArray[Any]] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._waiting = 0
        self._counts = np.zeros(info.vocab_size, dtype=np.int64)
        self._filled = 0
        self.n_documents = 0
        self.n_bytes = 0

    def add(self, documents: Sequence[Sequence[int]], n_bytes: int) -> None:
        """Takes the ids of whole documents, to each of which EOS is appended; ``n_bytes`` are the
        UTF-8 bytes of the text behind their non-special ids, all together."""
        if not documents:
            return
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=total)
        self._counts += np.bincount(ids, minlength=self._info.vocab_size)
        tokens = np.full(total + len(lengths), self._info.eos_id, dtype=self._dtype)
        tokens[np.arange(total) + np.repeat(np.arange(len(lengths)), lengths)] = ids
        self._tokens.append(tokens)
        self._lengths.append(lengths + 1)
        self._waiting += len(tokens)
        self._filled += len(tokens)
        self.n_documents += len(lengths)
        self.n_bytes += n_bytes
        if self._waiting >= self._buffer_tokens:
            self._flush(last=False)

    def _flush(self, last: bool) -> None:
        if not self._waiting:
            return
        tokens, lengths = np.concatenate(self._tokens), np.concatenate(self._lengths)
        carried = 0
        if self._packing == "concatenate" and not last:
            carried = len(tokens) % self._seq_len
        used = len(tokens) - carried
        ends = np.minimum(np.cumsum(lengths), used)
        lengths_used = np.diff(ends, prepend=0)
        plan = plan_rows(lengths_used, self._seq_len, self._packing)
        self._writer.append(fill_rows(tokens[:used], plan, self._info.pad_id))
        rest = lengths - lengths_used
        self._tokens, self._lengths = [tokens[used:].copy()], [rest[rest > 0]]
        self._waiting = carried

    def finish(self) -> dict[str, Any]:
        """Writes what is waiting; returns the split's manifest entry."""
        self._flush(last=True)
        self._counts[list(self._info.special_ids)] = 0
        np.save(self._folder / "counts.npy", self._counts)
        return self._writer.close() | {
            "documents": self.n_documents,
            "tokens": int(self._counts.sum()),
            "bytes": self.n_bytes,
            "filled": self._filled,
        }

    def abandon(self) -> None:
        """Closes open files after a failure."""
        self._writer.abandon()


def manifest_fields(info: TokenizerInfo, seq_len: int, packing: str) -> dict[str, Any]:
    """The manifest entries that all splits share and :class:`PackedRows` needs."""
    return {
        "seq_len": seq_len,
        "packing": packing,
        "vocab_size": info.vocab_size,
        "special_ids": list(info.special_ids),
    }


def pack_documents(
    documents: Iterable[Sequence[int]],
    folder: str | Path,
    info: TokenizerInfo,
    seq_len: int,
    packing: str = "best_fit",
) -> PackedRows:
    """Packs documents that are ids already (synthetic data) into rows below ``folder``.

    EOS is appended to each. ``n_bytes`` counts one byte per token, as there is no text.
    """
    folder = Path(folder)
    builder = SplitBuilder(folder, info, seq_len, packing, shard_tokens=1 << 24)
    special = set(info.special_ids)
    for document in documents:
        builder.add([document], sum(index not in special for index in document))
    manifest = manifest_fields(info, seq_len, packing) | {"splits": {"train": builder.finish()}}
    return PackedRows(folder, manifest, "train")
