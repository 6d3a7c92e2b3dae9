"""metrics.jsonl: one JSON object per line, appended while a run trains."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise.runs.atomic import storage_errors, write_bytes


class MetricsLog:
    """Append-only log that survives kill -9: at worst the last line is incomplete, and ignored.

    NaN and infinities are written as null, so that every line is strict JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line; values may be JSON types, NumPy scalars or one-element tensors."""
        line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        with storage_errors(self.path), open(self.path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            remaining = memoryview(line)
            while remaining:
                remaining = remaining[file.write(remaining) :]

    def read(self) -> list[dict[str, Any]]:
        """All complete records, oldest first; an unreadable line before the last is warned of."""
        return [record for _, record in self._lines()]

    def truncate(self, step: int) -> int:
        """Drops, atomically, the records whose ``step`` is past ``step``; returns how many."""
        if not self.path.exists():
            return 0
        lines = self._lines()
        kept = [line for line, record in lines if record.get("step", step) <= step]
        data = b"".join(line + b"\n" for line in kept)
        if data != self.path.read_bytes():
            write_bytes(self.path, data)
        return len(lines) - len(kept)

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError:
                if number < len(lines):
                    warnings.warn(
                        f"{self.path}, line {number}, is not a complete record; ignored",
                        stacklevel=3,
                    )
                continue
            records.append((line, record))
        return records


def _plain(value: Any) -> Any:
    """``value`` as strict JSON types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, (str, int, float, bool, type(None))) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
