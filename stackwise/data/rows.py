"""A prepared split: packed rows on disk with random access, and its text accounting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.data.batch import Batch
from stackwise.data.documents import DataError
from stackwise.data.packing import PackedArrays
from stackwise.data.shards import ShardInfo, ShardReader, token_dtype


class PackedRows:
    """The rows of one split; ``rows.batch([0, 5])`` gives rows 0 and 5 as a :class:`Batch`.

    ``fingerprint`` is the SHA-256 of the rows' tokens and boundaries.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], split: str) -> None:
        """``folder`` holds the shards; ``manifest`` is the prepared corpus's, see prepared.py."""
        entry = manifest["splits"][split]
        self.folder = Path(folder)
        self.split = split
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["vocab_size"]
        self.packing: str = manifest["packing"]
        self.fingerprint: str = entry["sha256"]
        self.n_documents: int = entry["documents"]
        self.n_tokens: int = entry["tokens"]
        self.n_bytes: int = entry["bytes"]
        self.n_filled: int = entry["filled"]
        self._special = np.zeros(self.vocab_size, dtype=bool)
        self._special[manifest["special_ids"]] = True
        dtype = token_dtype(self.vocab_size)
        infos = [ShardInfo(**shard) for shard in entry["shards"]]
        self._shards = [
            ShardReader(self.folder, number, info, self.seq_len, dtype)
            for number, info in enumerate(infos)
        ]
        for shard in self._shards:
            shard.check_sizes()
        self._bounds = np.cumsum([0, *(info.rows for info in infos)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def fill_rate(self) -> float:
        """Share of the rows' places that hold a document's tokens rather than padding."""
        return self.n_filled / max(1, len(self) * self.seq_len)

    def batch(self, row_ids: Sequence[int] | NDArray[np.integer[Any]]) -> Batch:
        """The rows ``row_ids`` (B,) as CPU tensors, in that order; an id may occur twice."""
        ids = np.asarray(row_ids, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"row_ids must be a non-empty list of row ids, got shape {ids.shape}")
        if ids.min() < 0 or ids.max() >= len(self):
            raise ValueError(
                f"row_ids must lie in 0..{len(self) - 1}, got {ids.min()}..{ids.max()}"
            )
        tokens = np.empty((len(ids), self.seq_len), dtype=np.int64)
        starts = []
        for place, row in enumerate(ids):
            arrays, local = self._locate(int(row))
            tokens[place] = arrays.tokens[local]
            first, last = arrays.offsets[local : local + 2]
            starts.append(arrays.starts[first:last].astype(np.int64) + place * self.seq_len)
        bounds = np.concatenate([*starts, [tokens.size]])
        lengths = np.diff(bounds)
        positions = np.arange(tokens.size) - np.repeat(bounds[:-1], lengths)
        return Batch(
            input_ids=torch.from_numpy(tokens),
            maskable=torch.from_numpy(~self._special[tokens]),
            position_ids=torch.from_numpy(positions.reshape(tokens.shape)),
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_seqlen=int(lengths.max()),
            row_ids=torch.from_numpy(ids.copy()),
        )

    def _locate(self, row: int) -> tuple[PackedArrays, int]:
        shard = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._shards[shard].arrays(), row - int(self._bounds[shard])

    def token_counts(self) -> NDArray[np.int64]:
        """How often each id occurs among the maskable tokens, (V,) int64."""
        path = self.folder / "counts.npy"
        try:
            counts = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path} cannot be read ({error}). Delete {self.folder.parent} to have the corpus "
                f"prepared again."
            ) from error
        if counts.shape != (self.vocab_size,) or int(counts.sum()) != self.n_tokens:
            raise DataError(
                f"{path} does not belong to this split. Delete {self.folder.parent} to have the "
                f"corpus prepared again."
            )
        return counts.astype(np.int64)

    def unigram_bits_per_byte(self, train: PackedRows) -> float:
        """Bits per byte of this split under the token frequencies of ``train``.

        p(w) = (count(w) + 1) / (tokens + types), over the ids that are not special; the floor a
        model must beat by using context. NaN for a split without text.
        """
        if not self.n_bytes:
            return math.nan
        text = ~self._special
        counts = train.token_counts()[text].astype(np.float64) + 1.0
        log2_p = np.log2(counts) - math.log2(counts.sum())
        return float(-(self.token_counts()[text] * log2_p).sum() / self.n_bytes)
