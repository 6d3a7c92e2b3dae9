"""Weights between safetensors files and the decoder's parameters.

A :class:`Placement` says where one stored tensor lives in the decoder, in terms that read both
ways: loading splits the stored tensor into the parameters, saving joins them again. Names, shapes
and completeness are checked from the file headers before any weight is read; nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from stackwise.runs.atomic import write_bytes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LISTED = 12  # names shown in an error before the rest is only counted
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Placement:
    """One stored tensor as parameters of the decoder stacked along its rows.

    ``parts``: the parameters' names.
    ``transposed``: stored as (in, out), GPT-2's Conv1D.
    ``groups``: the rows are this many equal groups, each holding every part in turn (the per-head
    layout of DeepSeek's kv_b_proj).
    ``aliases``: other names the same tensor is stored under.
    """

    stored: str
    parts: tuple[str, ...]
    transposed: bool = False
    groups: int = 1
    aliases: tuple[str, ...] = ()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Shape of the stored tensor, from the shapes of its parts."""
        parts = [tensors[name] for name in self.parts]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return shape[::-1] if self.transposed else shape

    def nbytes(self, tensors: Mapping[str, Tensor]) -> int:
        """Size of the stored tensor."""
        return sum(tensors[name].nbytes for name in self.parts)

    def scatter(self, stored: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copies ``stored`` into its parts, converting dtype and device."""
        stored = stored.t() if self.transposed else stored
        parts = [tensors[name] for name in self.parts]
        sizes = [part.shape[0] // self.groups for part in parts]
        pieces = stored.unflatten(0, (self.groups, -1)).split(sizes, dim=1)
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece.reshape(part.shape))

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor, on the CPU, contiguous and in memory of its own."""
        parts = [tensors[name].detach().cpu() for name in self.parts]
        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        stored = torch.cat(grouped, dim=1).flatten(0, 1)
        return (stored.t() if self.transposed else stored).contiguous()


def one(stored: str, name: str, **kwargs: Any) -> Placement:
    """A stored tensor that is exactly one parameter."""
    return Placement(stored, (name,), **kwargs)


class TensorFiles:
    """The tensors of a checkpoint folder, opened once and read one at a time.

    Reads ``model.safetensors`` or the shards its index lists. ValueError, naming the file, when
    there is neither, when a shard is missing or damaged, or when the weights are pickled only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._files: dict[str, str] = {}

    def __enter__(self) -> TensorFiles:
        with self._stack:
            index = self.folder / INDEX_FILE
            if index.is_file():
                for file in sorted(set(_read_weight_map(index).values())):
                    self._open(file, index)
            elif (self.folder / SINGLE_FILE).is_file():
                self._open(SINGLE_FILE, None)
            else:
                raise ValueError(_no_weights_message(self.folder))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open(self, file: str, index: Path | None) -> None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        if index is not None and not path.is_file():
            raise ValueError(f"{index} lists {file}, which is not in {self.folder}")
        try:
            handle = self._stack.enter_context(safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        self._handles[file] = handle
        for name in handle.keys():  # noqa: SIM118 - safe_open handles are not iterable
            if name in self._files:
                raise ValueError(f"tensor {name} is in both {self._files[name]} and {file}")
            self._files[name] = file

    def names(self) -> list[str]:
        """Names of all stored tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the file header."""
        return tuple(self._handles[self._files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Floating dtype of a stored tensor; None for integers and formats such as fp8."""
        return _FLOATS.get(self._handles[self._files[name]].get_slice(name).get_dtype())

    def dtype_name(self, name: str) -> str:
        """The dtype as the file header spells it."""
        return self._handles[self._files[name]].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """A stored tensor on the CPU."""
        return self._handles[self._files[name]].get_tensor(name)


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = dict(weight_map)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not a readable safetensors index: {error!r}") from error
    outside = [file for file in files.values() if os.path.basename(str(file)) != file]
    if outside:
        raise ValueError(f"{index} names a shard outside its folder: {outside[0]!r}")
    return files


def _no_weights_message(folder: Path) -> str:
    pickled = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if not pickled:
        return f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    return (
        f"{folder} holds only pickled weights ({', '.join(pickled[:_LISTED])}), which StackWise "
        "never opens because unpickling can run code. If you trust their source, convert them once "
        "with Transformers:\n"
        "  from transformers import AutoModelForCausalLM\n"
        f'  AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("NEW_FOLDER")'
    )


def match_names(
    names: Sequence[str],
    placements: Sequence[Placement],
    base_prefix: str,
    ignored: Sequence[str],
) -> dict[int, str]:
    """The stored name of every placement (by position), whichever of its spellings is used.

    ``base_prefix`` may be absent, as in checkpoints of the headless base model. ValueError naming
    what is missing and what is unexpected.
    """
    present = set(names)
    matched: dict[int, str] = {}
    missing = []
    for position, placement in enumerate(placements):
        spellings = [placement.stored, *placement.aliases]
        spellings += [name.removeprefix(base_prefix) for name in spellings]
        found = next((name for name in spellings if name in present), None)
        if found is None:
            missing.append(placement.stored)
        else:
            matched[position] = found
    unexpected = [
        name
        for name in sorted(present - set(matched.values()))
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    faults = []
    if missing:
        faults.append(f"missing tensors: {listed(missing)}")
    if unexpected:
        faults.append(f"unexpected tensors: {listed(unexpected)}")
    if faults:
        raise ValueError("the weights do not match the configuration; " + "; ".join(faults))
    return matched


def load_weights(
    files: TensorFiles,
    matched: Mapping[int, str],
    placements: Sequence[Placement],
    tensors: Mapping[str, Tensor],
) -> None:
    """Fills ``tensors`` from the files. ValueError, before anything is written, naming every
    tensor of a wrong shape and every dtype that is not a plain float (quantised weights)."""
    faults = []
    for position, name in matched.items():
        expected, found = placements[position].shape(tensors), files.shape(name)
        if expected != found:
            faults.append(f"{name} has shape {found}, expected {expected}")
        elif files.dtype(name) is None:
            faults.append(f"{name} has dtype {files.dtype_name(name)}, expected a float dtype")
    if faults:
        raise ValueError(f"the weights do not match the configuration; {listed(faults, '; ')}")
    with torch.no_grad():
        for position, name in matched.items():
            placements[position].scatter(files.read(name), tensors)


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """``names`` for an error message, the many behind the first only counted."""
    rest = len(names) - _LISTED
    return separator.join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def save_weights(
    folder: Path,
    placements: Sequence[Placement],
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
) -> None:
    """Writes ``model.safetensors``, or shards of at most ``max_shard_bytes`` and their index.

    A single larger tensor gets a shard of its own. All files are complete under temporary names
    before the first is renamed, so a full disk leaves an earlier save intact; files of an earlier
    save that would contradict the new ones are removed last.
    """
    shards = list(_plan_shards(placements, tensors, max_shard_bytes))
    temporary: dict[Path, Path] = {}
    weight_map: dict[str, str] = {}
    total = 0
    try:
        for number, shard in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else _shard_name(number, len(shards))
            contents = {placement.stored: placement.gather(tensors) for placement in shard}
            total += sum(tensor.numel() * tensor.element_size() for tensor in contents.values())
            temporary[folder / file] = folder / f".{file}.tmp"
            _save_file(contents, folder / f".{file}.tmp")
            weight_map |= dict.fromkeys(contents, file)
        for final, path in temporary.items():
            os.replace(path, final)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    kept = {path.name for path in temporary}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)
        kept.add(INDEX_FILE)
    for path in _weight_files(folder):
        if path.name not in kept:
            path.unlink()


def _plan_shards(
    placements: Sequence[Placement], tensors: Mapping[str, Tensor], limit: int
) -> Iterator[list[Placement]]:
    shard: list[Placement] = []
    size = 0
    for placement in placements:
        item = placement.nbytes(tensors)
        if shard and size + item > limit:
            yield shard
            shard, size = [], 0
        shard.append(placement)
        size += item
    yield shard


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _weight_files(folder: Path) -> list[Path]:
    shard = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
    return [
        path
        for path in folder.iterdir()
        if path.name in (SINGLE_FILE, INDEX_FILE) or shard.fullmatch(path.name)
    ]


def _save_file(contents: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # Transformers up to 4 refuses files that do not say which framework wrote them.
    save_file(contents, str(path), metadata={"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
