"""Reading text, JSON Lines and Parquet files as documents, in bounded memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stackwise.data.documents import DataError, Document

KINDS = ("txt", "text", "md", "jsonl", "ndjson", "json", "parquet")
LONGEST_TEXT = 8192


def kind_of(path: Path) -> str | None:
    """The file's kind by its name (``.gz`` aside), None when it is not a corpus file."""
    name = path.name.lower()
    compressed = name.endswith(".gz")
    kind = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    return kind if kind in KINDS and not (compressed and kind == "parquet") else None


def read_documents(path: Path, text_field: str) -> Iterator[Document]:
    """The documents of one file, empty ones left out.

    Text: the file is one document; beyond 8,192 characters it is cut at blank lines (else at line
    ends) into documents of at most that size. JSONL: one document per line. Parquet: one per row.
    Raises ``DataError`` naming the file and the offset, line or field that cannot be read.
    """
    kind = kind_of(path)
    if kind == "parquet":
        texts = _read_parquet(path, text_field)
    elif kind in ("jsonl", "ndjson", "json"):
        texts = _read_json(path, text_field)
    else:
        texts = _cut(_read_lines(path))
    for text in texts:
        if text.strip():
            yield Document(text)


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def _read_lines(path: Path) -> Iterator[str]:
    """Decoded lines with normalised ends; long lines come whole."""
    offset = 0
    try:
        with _open(path) as file:
            for line in file:
                yield _decode(path, line, offset)
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error


def _decode(path: Path, line: bytes, offset: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{line[error.start]:02x} at offset "
            f"{offset + error.start}. Convert it, for example with iconv -f LATIN1 -t UTF-8."
        ) from error
    if offset == 0:
        text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n")


def _cut(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined into texts of at most LONGEST_TEXT characters, cut at the last blank line."""
    waiting: list[str] = []
    size = 0
    blank = 0
    for line in lines:
        while size + len(line) > LONGEST_TEXT:
            if not waiting:
                yield line[:LONGEST_TEXT]
                line = line[LONGEST_TEXT:]
                continue
            count = blank or len(waiting)
            yield "".join(waiting[:count])
            waiting = waiting[count:]
            size = sum(map(len, waiting))
            blank = 0
        waiting.append(line)
        size += len(line)
        if not line.strip():
            blank = len(waiting)
    if waiting:
        yield "".join(waiting)


def _read_json(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON ({error}); one object per line is expected"
            ) from error
        text = _field(path, f"line {number}", record, text_field)
        if text:
            yield text


def _field(path: Path, place: str, record: Any, text_field: str) -> str | None:
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, {place}: expected an object with the field {text_field!r}, got "
            f"{type(record).__name__}"
        )
    if text_field not in record:
        raise DataError(
            f"{path}, {place}: no field {text_field!r}; it has "
            f"{', '.join(sorted(record)) or 'none'}. Set data.text_field."
        )
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{path}, {place}: field {text_field!r} holds {type(text).__name__}, not text"
        )
    return text


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow
            if text_field not in fields.names:
                raise DataError(
                    f"{path}: no field {text_field!r}; it has {', '.join(fields.names)}. "
                    f"Set data.text_field."
                )
            kind = fields.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: field {text_field!r} holds {kind}, not text")
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
