"""Packed rows on disk: numbered shards of three flat little-endian files each.

``NNNNN.tokens`` (rows, seq_len) uint16 or uint32, ``NNNNN.starts`` int32 segment starts and
``NNNNN.offsets`` (rows + 1) int64 into them. Sizes and CRC-32 of every file stand in the manifest;
a shard is checked against them before its first row is used, then memory-mapped.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stackwise.data.documents import DataError
from stackwise.data.packing import PackedArrays

PARTS = ("tokens", "starts", "offsets")
_CHECK_BYTES = 1 << 24


@dataclass
class ShardInfo:
    """One shard's row count, and bytes and CRC-32 of each of its files."""

    rows: int = 0
    size: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    crc32: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


def shard_file(folder: Path, number: int, part: str) -> Path:
    """The path of one of a shard's files."""
    return folder / f"{number:05d}.{part}"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Appends rows, opening a new shard every ``rows_per_shard`` rows."""

    def __init__(self, folder: Path, rows_per_shard: int) -> None:
        self._folder = folder
        self._rows_per_shard = rows_per_shard
        self._files: dict[str, BinaryIO] = {}
        self._n_starts = 0
        self._hashes = {part: hashlib.sha256() for part in PARTS}
        self.shards: list[ShardInfo] = []
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, rows: PackedArrays) -> None:
        """Writes rows, splitting them over shards where needed."""
        first, n_rows = 0, len(rows.tokens)
        while first < n_rows:
            if not self._files:
                self._open_shard()
            last = min(n_rows, first + self._rows_per_shard - self.shards[-1].rows)
            self._write_rows(rows, first, last)
            first = last
            if self.shards[-1].rows == self._rows_per_shard:
                self._close_shard()

    def _open_shard(self) -> None:
        number = len(self.shards)
        self._files = {
            part: open(shard_file(self._folder, number, part), "wb")  # noqa: SIM115
            for part in PARTS
        }
        self.shards.append(ShardInfo())
        self._n_starts = 0
        self._write("offsets", np.zeros(1, dtype="<i8"))

    def _write_rows(self, rows: PackedArrays, first: int, last: int) -> None:
        offsets = rows.offsets[first : last + 1]
        starts = rows.starts[offsets[0] : offsets[-1]]
        counts = np.diff(offsets)
        self._write("tokens", rows.tokens[first:last])
        self._write("starts", starts.astype("<i4"))
        self._write("offsets", (self._n_starts + np.cumsum(counts)).astype("<i8"))
        self._hashes["tokens"].update(
            np.ascontiguousarray(rows.tokens[first:last], dtype="<u4").data
        )
        self._hashes["starts"].update(np.ascontiguousarray(starts, dtype="<i4").data)
        self._hashes["offsets"].update(np.ascontiguousarray(counts, dtype="<i8").data)
        self._n_starts += len(starts)
        self.shards[-1].rows += last - first

    def _write(self, part: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).tobytes()
        self._files[part].write(data)
        info = self.shards[-1]
        info.size[part] += len(data)
        info.crc32[part] = zlib.crc32(data, info.crc32[part])

    def _close_shard(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files = {}

    def close(self) -> dict[str, Any]:
        """Flushes to disk; returns the shard list and the SHA-256 of all rows for the manifest.

        The hash does not depend on how rows are spread over shards or on the token dtype.
        """
        self._close_shard()
        digest = hashlib.sha256(b"".join(self._hashes[part].digest() for part in PARTS))
        return {"shards": [asdict(shard) for shard in self.shards], "sha256": digest.hexdigest()}

    def abandon(self) -> None:
        """Closes the files of an unfinished shard."""
        for file in self._files.values():
            file.close()
        self._files = {}


class ShardReader:
    """One shard, opened and checked at first use; safe to use from several threads."""

    def __init__(
        self, folder: Path, number: int, info: ShardInfo, seq_len: int, dtype: np.dtype[Any]
    ) -> None:
        self._folder = folder
        self._number = number
        self._info = info
        self._seq_len = seq_len
        self._dtype = dtype
        self._lock = threading.Lock()
        self._arrays: PackedArrays | None = None

    def arrays(self) -> PackedArrays:
        """The shard's memory-mapped rows; raises ``DataError`` naming a damaged file."""
        if self._arrays is None:
            with self._lock:
                if self._arrays is None:
                    self._arrays = self._open()
        return self._arrays

    def check_sizes(self) -> None:
        """Raises ``DataError`` naming the first file that is missing or has another size."""
        for part in PARTS:
            path = shard_file(self._folder, self._number, part)
            expected = self._info.size[part]
            if not path.is_file():
                raise DataError(f"{path} is missing. {self._remedy()}")
            if path.stat().st_size != expected:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes instead of {expected}. "
                    f"{self._remedy()}"
                )

    def _open(self) -> PackedArrays:
        self.check_sizes()
        for part in PARTS:
            path = shard_file(self._folder, self._number, part)
            if _crc32(path) != self._info.crc32[part]:
                raise DataError(f"{path} was altered after it was written. {self._remedy()}")
        tokens = self._map("tokens", self._dtype).reshape(self._info.rows, self._seq_len)
        return PackedArrays(
            tokens, self._map("starts", np.dtype("<i4")), self._map("offsets", np.dtype("<i8"))
        )

    def _map(self, part: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.memmap(shard_file(self._folder, self._number, part), dtype=dtype, mode="r")

    def _remedy(self) -> str:
        return f"Delete {self._folder.parent} to have the corpus prepared again."


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHECK_BYTES):
            value = zlib.crc32(chunk, value)
    return value
