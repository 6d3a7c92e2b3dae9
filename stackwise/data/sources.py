"""Where documents come from: the built-in corpus, files and folders, Hugging Face datasets.

A source can be read any number of times, always in the same order, one document at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from stackwise.config.schema import DataConfig
from stackwise.data.corpus import builtin_documents, builtin_identity
from stackwise.data.documents import DataError, Document
from stackwise.data.files import KINDS, kind_of, read_documents
from stackwise.data.hub import failure, offline_when_unreachable


class Source(Protocol):
    """A readable corpus."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, as JSON values; part of the prepared folder's name."""

    def documents(self) -> Iterator[Document]:
        """The non-empty documents, from the first one on."""


def open_source(config: DataConfig) -> Source:
    """The source named by ``config.dataset_path``; raises ``DataError`` when there is none."""
    path = Path(config.dataset_path).expanduser()
    source: Source
    if config.dataset_path == "builtin":
        source = BuiltinSource()
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        source = HubSource(config, saved=True)
    elif path.exists():
        source = FileSource(path, config.text_field, hash_content=not config.streaming)
    elif _looks_like_path(config.dataset_path):
        raise DataError(f"data.dataset_path: no such file or folder: {path}")
    else:
        source = HubSource(config)
    return source if config.num_samples is None else LimitedSource(source, config.num_samples)


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.endswith("/")
        or name.count("/") > 1
        or kind_of(Path(name)) is not None
    )


class BuiltinSource:
    """The prose every CPython carries, see corpus.py."""

    name = "builtin"

    def identity(self) -> dict[str, Any]:
        return dict(builtin_identity())

    def documents(self) -> Iterator[Document]:
        return iter(builtin_documents())


class LimitedSource:
    """The first ``n`` documents of another source."""

    def __init__(self, source: Source, n: int) -> None:
        self.name = source.name
        self._source = source
        self._n = n

    def identity(self) -> dict[str, Any]:
        return self._source.identity() | {"num_samples": self._n}

    def documents(self) -> Iterator[Document]:
        return islice(self._source.documents(), self._n)


class FileSource:
    """A text, JSONL or Parquet file, or every such file below a folder, in order of path.

    With ``hash_content`` False the identity is made of names, sizes and modification times, for
    corpora too large to be read an extra time.
    """

    def __init__(self, path: Path, text_field: str, hash_content: bool = True) -> None:
        self.name = str(path)
        self._root = path
        self._text_field = text_field
        self._hash_content = hash_content
        self._files = _list_files(path)

    def identity(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for file in self._files:
            listing.update(f"{file.relative_to(self._root.parent).as_posix()}\0".encode())
            listing.update(_content_hash(file) if self._hash_content else _stat_hash(file))
        return {
            "kind": "files",
            "text_field": self._text_field,
            "files": len(self._files),
            "content": listing.hexdigest(),
        }

    def documents(self) -> Iterator[Document]:
        for file in self._files:
            yield from read_documents(file, self._text_field)


def _list_files(path: Path) -> list[Path]:
    accepted = ", ".join(f".{kind}" for kind in KINDS)
    if path.is_file():
        if kind_of(path) is None:
            raise DataError(f"data.dataset_path: {path} is none of {accepted} (or these with .gz)")
        return [path]
    files, others = [], 0
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and kind_of(file) is not None:
                files.append(file)
            else:
                others += 1
    if not files:
        raise DataError(
            f"data.dataset_path: the folder {path} holds no {accepted} file (nor one of these with "
            f".gz); it holds {others} other file(s)"
        )
    return files


def _content_hash(file: Path) -> bytes:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _stat_hash(file: Path) -> bytes:
    status = file.stat()
    return f"{status.st_size}:{status.st_mtime_ns}\0".encode()


class HubSource:
    """A Hugging Face dataset by name, or a folder written by ``Dataset.save_to_disk``."""

    def __init__(self, config: DataConfig, saved: bool = False) -> None:
        self.name = config.dataset_path
        self._config = config
        self._saved = saved
        self._dataset: Any = None

    def identity(self) -> dict[str, Any]:
        """Name, configuration, split and field, and for a copy on disk its content fingerprint."""
        config = self._config
        found: dict[str, Any] = {
            "kind": "datasets",
            "name": config.dataset_path,
            "config": config.dataset_config,
            "split": config.dataset_split,
            "text_field": config.text_field,
        }
        if self._saved or not config.streaming:
            found["fingerprint"] = self._load()._fingerprint
        return found

    def documents(self) -> Iterator[Document]:
        field = self._config.text_field
        dataset = self._load()
        if dataset.column_names is not None:
            self._check_field(dataset.column_names)
            dataset = dataset.select_columns([field])
        for number, record in enumerate(dataset):
            if field not in record:
                self._check_field(list(record))
            text = record[field]
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"dataset {self.name!r}, record {number}: field {field!r} holds "
                    f"{type(text).__name__}, not text"
                )
            if text and text.strip():
                yield Document(text)

    def _check_field(self, fields: list[str]) -> None:
        if self._config.text_field not in fields:
            raise DataError(
                f"dataset {self.name!r} has no field {self._config.text_field!r}; it has "
                f"{', '.join(sorted(fields))}. Set data.text_field."
            )

    def _load(self) -> Any:
        if self._dataset is None:
            self._dataset = self._load_saved() if self._saved else self._load_named()
        return self._dataset

    def _load_saved(self) -> Any:
        import datasets

        found = datasets.load_from_disk(str(Path(self.name).expanduser()))
        return self._pick_split(found) if isinstance(found, dict) else found

    def _pick_split(self, splits: Any) -> Any:
        if self._config.dataset_split not in splits:
            raise DataError(
                f"dataset {self.name!r} has no split {self._config.dataset_split!r}; it has "
                f"{', '.join(splits)}. Set data.dataset_split."
            )
        return splits[self._config.dataset_split]

    def _load_named(self) -> Any:
        import datasets

        config = self._config
        try:
            with offline_when_unreachable():
                return datasets.load_dataset(
                    config.dataset_path,
                    config.dataset_config,
                    split=config.dataset_split,
                    streaming=config.streaming,
                )
        except Exception as error:
            what = f"the dataset {config.dataset_path!r} (data.dataset_path)"
            instead = "use 'builtin', or a text, JSONL or Parquet file or folder"
            raise DataError(failure(what, error, instead)) from error
