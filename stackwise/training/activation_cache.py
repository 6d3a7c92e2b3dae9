"""The frozen prefix's output, kept on disk so that a stage does not recompute it every epoch.

One slot per (row, mask draw) holds that row's residual stream (L, D) at a block boundary. Slots lie
in shards, safetensors files of ``hidden`` (masks, rows, L * D) in the residual dtype and ``crc32``
(masks, rows); a shard's metadata say which boundary (stage) and which prefix weights (hash) it was
computed with, in the same file that is renamed into place, so data and label cannot disagree.
Rolling replaces shard after shard by the next boundary; a kill leaves each shard at one boundary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stackwise.runs.atomic import (
    atomic_file,
    clean_temporary,
    free_bytes,
    gigabytes,
    write_bytes,
)
from stackwise.runs.errors import RunError
from stackwise.runs.tensor_file import DTYPE_NAMES, encode_header, read_header, tensor_bytes

_SHARD_BYTES = 128 * 10**6
_MAX_SHARDS = 512
_HEADER_BYTES = 1024
_SETTINGS = "cache.json"
_STALE = "Delete the folder, or let the trainer fill the cache again."


class StaleCacheError(RunError):
    """Cached activations that belong to other data, masks, weights or another boundary."""


class Progress(Protocol):
    """What ``tqdm`` offers to report progress in slots."""

    total: Any

    def update(self, n: int) -> object: ...


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Everything that decides what a slot holds, except boundary and prefix weights.

    ``dtype`` is the storage dtype (the residual stream's for bit-exactness); the mask of slot
    (row, draw) follows from ``mask_seed``, ``mask_low`` .. ``mask_high`` and ``extra``, which takes
    any further setting that the numbers depend on.
    """

    n_rows: int
    n_masks: int
    seq_len: int
    d_model: int
    dtype: torch.dtype
    data_fingerprint: str
    mask_seed: int
    mask_low: float
    mask_high: float
    attention_mode: str
    extra: str = ""

    def __post_init__(self) -> None:
        for name in ("n_rows", "n_masks", "seq_len", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {self.dtype}; float64, 32, 16 and bfloat16 are accepted")

    @property
    def slot_bytes(self) -> int:
        """Bytes of one row under one mask."""
        return self.seq_len * self.d_model * self.dtype.itemsize

    def key(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


@dataclasses.dataclass(frozen=True)
class _Shard:
    """An open shard: its label, its memory-mapped slots and their checksums."""

    path: Path
    size: int
    stage: int
    prefix_hash: str
    hidden: np.ndarray  # (masks, rows, slot_bytes) uint8
    crc32: np.ndarray  # (masks, rows) int64

    def slot(self, mask: int, row: int) -> np.ndarray:
        """Bytes of one slot, checked: a truncated mapping would end the process with SIGBUS."""
        data = self.hidden[mask, row]
        if self.path.stat().st_size != self.size:
            raise RunError(f"{self.path} was truncated while in use. {_STALE}")
        if zlib.crc32(data) != self.crc32[mask, row]:
            raise RunError(f"{self.path} is damaged: the checksum of a slot differs. {_STALE}")
        return data


class ActivationCache:
    """The cache in ``folder``, made for ``spec``; created when the folder holds none.

    ``produce`` and ``advance`` get batches of exactly ``batch_rows`` slots, all of one mask draw
    (slots repeat where a shard's rows run out), the batch shape of training, which makes cached
    numbers bit-identical to recomputed ones. One process at a time: the run's lock guards it.

    Raises:
        StaleCacheError: the folder holds a cache for another spec; the message names the keys.
        RunError: a shard is truncated or not readable.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: CacheSpec,
        *,
        batch_rows: int = 1,
        rows_per_shard: int | None = None,
    ) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows is {batch_rows}; at least 1 is needed")
        self.folder, self.spec, self.batch_rows = Path(folder), spec, batch_rows
        self._spec_hash = hashlib.sha256(json.dumps(spec.key()).encode()).hexdigest()
        clean_temporary(self.folder)
        self.rows_per_shard = self._open_settings(rows_per_shard)
        self.n_shards = -(-spec.n_rows // self.rows_per_shard)
        self._shards = {i: s for i in range(self.n_shards) if (s := self._open_shard(i))}

    @staticmethod
    def required_bytes(spec: CacheSpec, *, batch_rows: int = 1) -> int:
        """Disk space of a full cache, the one shard more that rolling needs included."""
        rows = _default_rows_per_shard(spec, batch_rows)
        slot = spec.n_masks * (spec.slot_bytes + 8)
        return (spec.n_rows + rows) * slot + (-(-spec.n_rows // rows) + 1) * _HEADER_BYTES

    @staticmethod
    def fits(
        spec: CacheSpec, folder: str | Path, budget_gb: float, *, batch_rows: int = 1
    ) -> tuple[bool, str]:
        """Whether the cache stays within ``budget_gb`` (10^9 bytes) and the free disk space.

        Returns (fits, reason); what a cache in ``folder`` occupies already counts as free.
        """
        needed = ActivationCache.required_bytes(spec, batch_rows=batch_rows)
        occupied = sum(file.stat().st_size for file in Path(folder).glob("shard_*.safetensors"))
        free = free_bytes(folder) + occupied
        wants = f"the activation cache needs {gigabytes(needed)}"
        if needed > budget_gb * 1e9:
            return False, f"{wants}, training.cache_budget_gb allows {budget_gb:g} GB"
        if needed > free:
            return False, f"{wants}, the disk of {folder} has {gigabytes(free)}"
        return True, f"{wants}; {gigabytes(free)} available"

    @property
    def stage(self) -> int | None:
        """Number of blocks applied in every shard; None while shards differ or are missing."""
        label = self._label()
        return None if label is None else label[0]

    @property
    def prefix_hash(self) -> str | None:
        """Hash of the prefix weights of every shard; None while shards differ or are missing."""
        label = self._label()
        return None if label is None else label[1]

    def boundaries(self) -> set[tuple[int, str]]:
        """The (stage, prefix hash) pairs found in the shards that exist."""
        return {(shard.stage, shard.prefix_hash) for shard in self._shards.values()}

    def fill(
        self,
        stage: int,
        prefix_hash: str,
        produce: Callable[[np.ndarray], Tensor],
        progress: Progress | None = None,
    ) -> None:
        """Computes every shard that does not hold (stage, prefix_hash) yet.

        ``produce(slots)`` gets (batch_rows, 2) int64 pairs of row and mask draw and returns the
        residual stream (batch_rows, L, D) in the spec's dtype, on any device.
        """
        missing = [i for i in range(self.n_shards) if not self._holds(i, stage, prefix_hash)]
        self._announce(missing, progress)
        for index in missing:
            self._write_shard(index, stage, prefix_hash, produce, progress)

    def roll(
        self,
        from_stage: int,
        from_hash: str,
        to_stage: int,
        to_hash: str,
        advance: Callable[[np.ndarray, Tensor], Tensor],
        progress: Progress | None = None,
    ) -> None:
        """Replaces every shard at (from_stage, from_hash) by its successor; resumes after a kill.

        ``advance(slots, hidden)`` gets slots as ``fill`` does and their residual stream
        (batch_rows, L, D), a CPU tensor it may keep, and returns the one after the next blocks.
        Raises :class:`StaleCacheError`, before any work, when a shard holds neither pair.
        """
        old, new = (from_stage, from_hash), (to_stage, to_hash)
        for index in range(self.n_shards):
            if not self._holds(index, *old) and not self._holds(index, *new):
                raise StaleCacheError(
                    f"{self._describe(index)}; rolling needs {_name(*old)} or {_name(*new)}. "
                    f"{_STALE}"
                )
        waiting = [i for i in range(self.n_shards) if not self._holds(i, *new)]
        self._announce(waiting, progress)

        def produce(slots: np.ndarray) -> Tensor:
            return advance(slots, self._gather(slots[:, 0], slots[:, 1], *old, pin=False))

        for index in waiting:
            self._write_shard(index, to_stage, to_hash, produce, progress)

    def read(
        self, row_ids: Any, mask_index: Any, stage: int, prefix_hash: str, *, pin: bool = False
    ) -> Tensor:
        """The residual stream (B, L, D) of the given rows, a fresh CPU tensor.

        ``row_ids`` (B,) integers; ``mask_index`` one integer or (B,). Raises
        :class:`StaleCacheError` when a slot's shard is at another boundary or of other weights.
        """
        rows = np.asarray(row_ids, dtype=np.int64).reshape(-1)
        masks = np.broadcast_to(np.asarray(mask_index, dtype=np.int64), rows.shape)
        _check_range("row_ids", rows, self.spec.n_rows)
        _check_range("mask_index", masks, self.spec.n_masks)
        return self._gather(rows, masks, stage, prefix_hash, pin)

    def prefetch(
        self,
        requests: Iterable[tuple[Any, Any]],
        stage: int,
        prefix_hash: str,
        *,
        depth: int = 2,
        pin_memory: bool | None = None,
    ) -> Iterator[Tensor]:
        """``read`` for every (row_ids, mask_index), up to ``depth`` ahead in a background thread.

        ``requests`` is consumed by that thread. Its errors and those of reading are raised here.
        Closing the iterator ends the thread. ``pin_memory`` None: when CUDA is available.
        """
        pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        items = (self.read(r, mask, stage, prefix_hash, pin=pin) for r, mask in requests)
        return _read_ahead(items, depth)

    def _label(self) -> tuple[int, str] | None:
        labels = self.boundaries()
        return labels.pop() if len(labels) == 1 and len(self._shards) == self.n_shards else None

    def _path(self, index: int) -> Path:
        return self.folder / f"shard_{index:05d}.safetensors"

    def _rows(self, index: int) -> np.ndarray:
        start = index * self.rows_per_shard
        return np.arange(start, min(start + self.rows_per_shard, self.spec.n_rows))

    def _holds(self, index: int, stage: int, prefix_hash: str) -> bool:
        shard = self._shards.get(index)
        return shard is not None and (shard.stage, shard.prefix_hash) == (stage, prefix_hash)

    def _describe(self, index: int) -> str:
        shard = self._shards.get(index)
        if shard is None:
            return f"{self._path(index)} is missing"
        return f"{shard.path} holds {_name(shard.stage, shard.prefix_hash)}"

    def _announce(self, indices: list[int], progress: Progress | None) -> None:
        if progress is not None:
            slots = sum(len(self._rows(index)) for index in indices) * self.spec.n_masks
            progress.total = (progress.total or 0) + slots

    def _open_settings(self, rows_per_shard: int | None) -> int:
        path = self.folder / _SETTINGS
        wanted = self.spec.key()
        if not path.exists():
            rows = rows_per_shard or _default_rows_per_shard(self.spec, self.batch_rows)
            content = {"spec": wanted, "rows_per_shard": rows}
            write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
            return rows
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, rows = dict(content["spec"]), int(content["rows_per_shard"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged. Delete {self.folder}.") from error
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            changes = ", ".join(f"{k} {found.get(k)!r}, now {wanted[k]!r}" for k in differing)
            raise StaleCacheError(f"{self.folder} was made for {changes}. {_STALE}")
        return rows

    def _entries(self, rows: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        spec = self.spec
        shape = (spec.n_masks, rows, spec.seq_len * spec.d_model)
        return [("hidden", spec.dtype, shape), ("crc32", torch.int64, shape[:2])]

    def _open_shard(self, index: int) -> _Shard | None:
        path, rows = self._path(index), len(self._rows(index))
        if not path.exists():
            return None
        tensors, metadata, start = read_header(path)
        if metadata.get("spec") != self._spec_hash or metadata.get("shard") != str(index):
            raise StaleCacheError(f"{path} belongs to another cache. {_STALE}")
        expected = {n: [DTYPE_NAMES[t], list(shape)] for n, t, shape in self._entries(rows)}
        found = {name: [entry["dtype"], entry["shape"]] for name, entry in tensors.items()}
        if found != expected:
            raise RunError(f"{path} is damaged: it holds {found}, not {expected}. {_STALE}")
        mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=start)
        n_masks, hidden_bytes = self.spec.n_masks, tensors["hidden"]["data_offsets"][1]
        return _Shard(
            path,
            path.stat().st_size,
            int(metadata["stage"]),
            metadata["prefix_hash"],
            mapped[:hidden_bytes].reshape(n_masks, rows, self.spec.slot_bytes),
            np.frombuffer(mapped[hidden_bytes:].tobytes(), "<i8").reshape(n_masks, rows),
        )

    def _write_shard(
        self,
        index: int,
        stage: int,
        prefix_hash: str,
        produce: Callable[[np.ndarray], Tensor],
        progress: Progress | None,
    ) -> None:
        spec, rows = self.spec, len(self._rows(index))
        metadata = {
            "spec": self._spec_hash,
            "shard": str(index),
            "stage": str(stage),
            "prefix_hash": prefix_hash,
        }
        header = encode_header(self._entries(rows), metadata)
        needed = len(header) + spec.n_masks * rows * (spec.slot_bytes + 8)
        checksums = []
        with atomic_file(self._path(index), needed) as file:
            file.write(header)
            for slots, count in self._batches(index):
                hidden = tensor_bytes(self._checked(produce(slots))[:count])
                for start in range(0, len(hidden), spec.slot_bytes):
                    checksums.append(zlib.crc32(hidden[start : start + spec.slot_bytes]))
                file.write(hidden)
                if progress is not None:
                    progress.update(count)
            file.write(np.asarray(checksums, "<i8").tobytes())
        shard = self._open_shard(index)
        assert shard is not None
        self._shards[index] = shard

    def _batches(self, index: int) -> Iterator[tuple[np.ndarray, int]]:
        """Slots (batch_rows, 2) in file order, and how many at the front are to be stored."""
        rows = self._rows(index)
        for mask in range(self.spec.n_masks):
            for start in range(0, len(rows), self.batch_rows):
                chosen = rows[np.arange(start, start + self.batch_rows) % len(rows)]
                slots = np.stack([chosen, np.full_like(chosen, mask)], axis=1)
                yield slots, min(self.batch_rows, len(rows) - start)

    def _checked(self, hidden: Tensor) -> Tensor:
        shape = (self.batch_rows, self.spec.seq_len, self.spec.d_model)
        if tuple(hidden.shape) != shape or hidden.dtype != self.spec.dtype:
            raise ValueError(
                f"hidden is {tuple(hidden.shape)} {hidden.dtype}; the cache stores {shape} "
                f"{self.spec.dtype}"
            )
        return hidden

    def _gather(
        self, rows: np.ndarray, masks: np.ndarray, stage: int, prefix_hash: str, pin: bool
    ) -> Tensor:
        spec = self.spec
        out = torch.empty((len(rows), spec.slot_bytes), dtype=torch.uint8, pin_memory=pin)
        buffer = out.numpy()
        for k, (row, mask) in enumerate(zip(rows.tolist(), masks.tolist(), strict=True)):
            index, offset = divmod(row, self.rows_per_shard)
            if not self._holds(index, stage, prefix_hash):
                wanted = _name(stage, prefix_hash)
                raise StaleCacheError(f"{self._describe(index)}; {wanted} was asked for. {_STALE}")
            buffer[k] = self._shards[index].slot(mask, offset)
        return out.view(spec.dtype).view(len(rows), spec.seq_len, spec.d_model)


def _read_ahead(items: Iterator[Tensor], depth: int) -> Iterator[Tensor]:
    """Yields ``items``, which a background thread draws up to ``depth`` ahead."""
    ahead: queue.Queue[tuple[Tensor | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def deliver(item: Tensor | None, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ahead.put((item, error), timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                deliver(item)
                if stopped.is_set():
                    return
            deliver(None)
        except BaseException as error:
            deliver(None, error)

    thread = threading.Thread(target=work, name="activation-cache", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ahead.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def parameters_hash(*parts: nn.Module | Mapping[str, Tensor] | str) -> str:
    """SHA-256 (hexadecimal) over names, dtypes, shapes and bytes of everything in ``parts``.

    A module counts with its parameters and persistent buffers; a string (such as the hash of an
    earlier prefix) counts as itself.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"text {len(part)} {part}\n".encode())
            continue
        tensors = part.state_dict() if isinstance(part, nn.Module) else part
        digest.update(f"tensors {len(tensors)}\n".encode())
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _default_rows_per_shard(spec: CacheSpec, batch_rows: int) -> int:
    """Rows for shards of about 128 MB, at most 512 shards, in whole batches."""
    per_row = spec.n_masks * spec.slot_bytes
    rows = max(_SHARD_BYTES // per_row, -(-spec.n_rows // _MAX_SHARDS), 1)
    return min(-(-rows // batch_rows) * batch_rows, spec.n_rows)


def _check_range(name: str, values: np.ndarray, stop: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= stop):
        raise ValueError(f"{name} spans {values.min()} to {values.max()}; 0 to {stop - 1} exist")


def _name(stage: int, prefix_hash: str) -> str:
    return f"the output of block {stage} under weights {prefix_hash[:12]}"
