"""Tensors to and from one safetensors file, streamed, hashed while written, ties kept.

The safetensors format: an 8-byte little-endian header length, a JSON header
``{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}``, then the raw data. The
library's own writer refuses tensors that share memory and copies everything in memory first; here
a tensor that is the very same view as another is stored once and named in the metadata, any other
is stored by its values, one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.runs.errors import RunError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIASES = "stackwise_aliases"
_HEADER_LIMIT = 100_000_000


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of ``tensor`` (any device, any strides) as contiguous bytes in row-major order."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def encode_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The file's first bytes for tensors stored one after the other in the order given.

    Padded with spaces to a multiple of 8 bytes, so that the data that follow are aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: str | Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """``(tensors, metadata, data_start)`` of a safetensors file whose size was checked against it.

    ``tensors`` maps a name to its dtype name, shape and data_offsets; ``data_start`` is the byte
    at which offset 0 lies. Raises :class:`RunError` when the file is truncated or not safetensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_HEADER_LIMIT, size - 8):
                raise RunError(f"{path} is damaged: no complete header in its {size} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged: its header is not readable") from error
    if size != 8 + length + end:
        raise RunError(f"{path} is damaged: {size} bytes, its header announces {8 + length + end}")
    return header, metadata, 8 + length


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Data bytes :func:`write_tensors` will write, ties counted once."""
    kept, _ = _split_aliases(tensors)
    return sum(tensors[name].numel() * tensors[name].element_size() for name in kept)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Writes ``tensors`` to the new file ``path`` and returns the SHA-256 of the file.

    Not atomic by itself: for use inside :func:`stackwise.runs.atomic.atomic_folder`. Raises
    ``ValueError`` for what cannot be stored (sparse, meta or unsupported dtypes).
    """
    kept, aliases = _split_aliases(tensors)
    # Widest elements first keeps every tensor aligned to its own element size.
    kept.sort(key=lambda name: -tensors[name].element_size())
    facts = dict(metadata or {}) | ({_ALIASES: json.dumps(aliases)} if aliases else {})
    header = encode_header(
        ((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in kept), facts
    )
    digest = hashlib.sha256(header)
    with open(path, "xb") as file:
        file.write(header)
        for name in kept:
            data = tensor_bytes(tensors[name])
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file written here or by safetensors, on the CPU; ties come back as ties."""
    from safetensors import SafetensorError, safe_open

    _, metadata, _ = read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, kept in json.loads(metadata.get(_ALIASES, "{}")).items():
            tensors[name] = tensors[kept]
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return tensors


def _check_storable(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; only tensors are stored here")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} has layout {tensor.layout} on device {tensor.device}; a dense tensor with "
            "values is needed"
        )
    if tensor.dtype not in DTYPE_NAMES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: {accepted}")


def _split_aliases(tensors: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    seen: dict[tuple[Any, ...], str] = {}
    kept: list[str] = []
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
        view = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in seen:
            aliases[name] = seen[view]
        else:
            seen[view] = name
            kept.append(name)
    return kept, aliases
