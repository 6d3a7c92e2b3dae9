"""Preparing a corpus: source, split, tokenizer, packed rows on disk, reused while nothing changes.

``<cache_dir>/<name>-<fingerprint>/`` holds manifest.json, tokenizer/, train/ and validation/. It is
written under a temporary name and renamed when complete; a lock lets a second process wait for the
first instead of doing the work twice, and where locks do not work the rename decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config.schema import StackWiseConfig
from stackwise.data.builder import SplitBuilder, manifest_fields
from stackwise.data.documents import DataError, Document, split_documents
from stackwise.data.rows import PackedRows
from stackwise.data.sources import Source, open_source
from stackwise.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 21
_log = logging.getLogger("stackwise")


@dataclass
class PreparedData:
    """A tokenised, split and packed corpus; ``folder`` is where it is kept."""

    train: PackedRows
    validation: PackedRows
    tokenizer: Tokenizer
    folder: Path


def prepare_data(
    config: StackWiseConfig, tokenizer: Tokenizer | None = None, progress: bool = True
) -> PreparedData:
    """Builds the corpus of ``config.data`` in rows of ``config.training.seq_len``, or reuses it.

    The tokenizer is the argument's, else ``data.tokenizer_path``'s, else that of
    ``model.init_from``, else a byte-level BPE trained on the training documents.
    Raises ``DataError`` (a ValueError) for a corpus, tokenizer or prepared file that is unusable.
    """
    data = config.data
    if not 0 <= data.validation_fraction < 1:
        raise DataError(
            f"data.validation_fraction must lie in [0, 1), got {data.validation_fraction}"
        )
    source = open_source(data)
    tokenizer = tokenizer or _configured_tokenizer(config)
    cache = cache_folder(data.cache_dir)
    settings = _settings(config, source)
    folder = cache / _folder_name(source.name, settings)
    if tokenizer is not None and not _was_trained_for(folder, tokenizer):
        settings["tokenizer"] = tokenizer.fingerprint()
        folder = cache / _folder_name(source.name, settings)
    if not (folder / "manifest.json").is_file():
        with _lock(cache, folder.name):
            if not (folder / "manifest.json").is_file():
                _build(config, source, tokenizer, settings, folder, progress)
    return load_prepared(folder, tokenizer)


def cache_folder(configured: str | None) -> Path:
    """``data.cache_dir``, else $STACKWISE_CACHE, else ~/.cache/stackwise."""
    return Path(
        configured or os.environ.get("STACKWISE_CACHE") or "~/.cache/stackwise"
    ).expanduser()


def load_prepared(folder: str | Path, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Opens a prepared corpus; ``DataError`` names what is missing, truncated or altered."""
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        rows = {split: PackedRows(folder / split, manifest, split) for split in SPLITS}
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Delete {folder} to have the "
            f"corpus prepared again."
        ) from error
    return PreparedData(
        rows["train"],
        rows["validation"],
        tokenizer or load_tokenizer(folder / "tokenizer"),
        folder,
    )


def describe(prepared: PreparedData) -> dict[str, Any]:
    """What was prepared, in numbers: per split documents, rows, text tokens and bytes, the share of
    places that are not padding, tokens per byte; unigram bits/byte of the validation text."""
    splits = {
        split: {
            "documents": rows.n_documents,
            "rows": len(rows),
            "tokens": rows.n_tokens,
            "bytes": rows.n_bytes,
            "fill_rate": round(rows.fill_rate, 4),
        }
        for split, rows in (("train", prepared.train), ("validation", prepared.validation))
    }
    return {
        "folder": str(prepared.folder),
        "seq_len": prepared.train.seq_len,
        "packing": prepared.train.packing,
        "vocab_size": prepared.tokenizer.vocab_size,
        "bytes_per_token": round(prepared.train.n_bytes / max(1, prepared.train.n_tokens), 4),
        "unigram_bits_per_byte": prepared.validation.unigram_bits_per_byte(prepared.train),
        **splits,
    }


def _configured_tokenizer(config: StackWiseConfig) -> Tokenizer | None:
    name = config.data.tokenizer_path or config.model.init_from
    return load_tokenizer(name, config.data.special_mask_id) if name else None


def _was_trained_for(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether ``folder`` is prepared with this tokenizer, which then was trained on its corpus:
    a run's saved tokenizer finds the rows of the run."""
    if not (folder / "manifest.json").is_file():
        return False
    prepared = load_prepared(folder)
    return prepared.tokenizer.fingerprint() == tokenizer.fingerprint()


def _settings(config: StackWiseConfig, source: Source) -> dict[str, Any]:
    """Everything the prepared rows depend on; its hash is in the folder's name."""
    data = config.data
    return {
        "format": FORMAT_VERSION,
        "source": source.identity(),
        "validation_fraction": data.validation_fraction,
        "tokenizer": {"bpe": data.tokenizer_vocab_size, "mask_id": data.special_mask_id},
        "seq_len": config.training.seq_len,
        "packing": data.packing,
    }


def _folder_name(source_name: str, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source_name).name).strip("-.")[:40]
    return f"{readable or 'corpus'}-{digest[:16]}"


@contextlib.contextmanager
def _lock(cache: Path, name: str) -> Iterator[None]:
    """Holds the cache's lock of this name; goes on without one where the file system has none."""
    import filelock

    cache.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(cache / f".{name}.lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _log.info("waiting for another process that prepares %s", cache / name)
            lock.acquire()
        for leftover in cache.glob(f".{name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    except (NotImplementedError, OSError) as error:
        _log.warning("no file lock in %s (%s)", cache, error)
    try:
        yield
    finally:
        lock.release()


def _build(
    config: StackWiseConfig,
    source: Source,
    tokenizer: Tokenizer | None,
    settings: dict[str, Any],
    folder: Path,
    progress: bool,
) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        if tokenizer is None:
            tokenizer = _train_tokenizer(config, source, progress)
        manifest = _write_splits(config, source, tokenizer, temporary, progress)
        tokenizer.save(temporary / "tokenizer")
        _write_manifest(temporary, manifest | {"settings": settings})
        os.chmod(temporary, 0o755)
        _publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, folder: Path) -> None:
    """Renames into place; an equal folder that another process put there first is kept."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "manifest.json").is_file():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _train_tokenizer(config: StackWiseConfig, source: Source, progress: bool) -> Tokenizer:
    data = config.data
    documents = split_documents(source.documents(), data.validation_fraction)
    texts = (_valid_text(document) for held_out, document in documents if not held_out)
    tokenizer = train_bpe(
        _bar(texts, "training the tokenizer", progress), data.tokenizer_vocab_size
    )
    if data.special_mask_id is None:
        return tokenizer
    return tokenizer.with_mask_id(data.special_mask_id)


def _write_splits(
    config: StackWiseConfig, source: Source, tokenizer: Tokenizer, folder: Path, progress: bool
) -> dict[str, Any]:
    data, seq_len = config.data, config.training.seq_len
    builders = {
        split: SplitBuilder(
            folder / split, tokenizer.info, seq_len, data.packing, data.shard_tokens
        )
        for split in SPLITS
    }
    try:
        documents = split_documents(source.documents(), data.validation_fraction)
        for batch in _batches(_bar(documents, "tokenising documents", progress)):
            _add_batch(builders, tokenizer, batch)
        _check_not_empty(builders, source, data.validation_fraction)
        entries = {split: builder.finish() for split, builder in builders.items()}
    finally:
        for builder in builders.values():
            builder.abandon()
    return manifest_fields(tokenizer.info, seq_len, data.packing) | {
        "format": FORMAT_VERSION,
        "splits": entries,
    }


def _add_batch(
    builders: dict[str, SplitBuilder], tokenizer: Tokenizer, batch: list[tuple[bool, Document]]
) -> None:
    texts = [_valid_text(document) for _, document in batch]
    encoded = tokenizer.encode_batch(texts)
    special = set(tokenizer.special_ids)
    for split in SPLITS:
        chosen = [
            place for place, (held_out, _) in enumerate(batch) if held_out == (split != "train")
        ]
        n_bytes = sum(len(texts[place].encode()) for place in chosen) - sum(
            tokenizer.special_bytes(texts[place])
            for place in chosen
            if not special.isdisjoint(encoded[place])
        )
        builders[split].add([encoded[place] for place in chosen], n_bytes)


def _valid_text(document: Document) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        document.text.encode()
    except UnicodeEncodeError:
        return document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document.text


def _batches(
    documents: Iterable[tuple[bool, Document]],
) -> Iterator[list[tuple[bool, Document]]]:
    batch: list[tuple[bool, Document]] = []
    characters = 0
    for held_out, document in documents:
        batch.append((held_out, document))
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_not_empty(
    builders: dict[str, SplitBuilder], source: Source, validation_fraction: float
) -> None:
    if builders["train"].n_documents:
        return
    held_out = builders["validation"].n_documents
    if not held_out:
        raise DataError(f"the corpus {source.name} (data.dataset_path) holds no text")
    raise DataError(
        f"the corpus {source.name} has {held_out} document(s), all held out for validation: at "
        f"least two are needed. Add documents, or lower data.validation_fraction (now "
        f"{validation_fraction}; 0 holds none out)."
    )


def _bar(items: Iterable[Any], label: str, progress: bool) -> Iterable[Any]:
    """A progress bar on stderr, silent where that is no terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, unit=" docs", disable=None if progress else True)
