"""The built-in corpus: the English prose that every CPython carries.

Three kinds of text, read from the files of the running interpreter without importing any of them:
the language reference topics behind ``help()`` (``pydoc_data``), the standard library's docstrings
(through ``ast``) and its comment blocks. Packages that some distributions leave out (tests,
tkinter, idlelib, ...) are skipped everywhere, so that every CPython of one version gives the same
documents.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from stackwise.data import prose
from stackwise.data.documents import DataError, Document

CORPUS_VERSION = 1
SAMPLE_CHARACTERS = 250
MIN_CHARACTERS = 40

_OPTIONAL = (
    "site-packages dist-packages __pycache__ test tests idlelib tkinter turtledemo lib2to3 "
    "distutils ensurepip lib-dynload pydoc_data _pyrepl"
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_folder() -> Path:
    """Where this interpreter keeps the standard library's source files."""
    return Path(sysconfig.get_paths()["stdlib"])


def builtin_documents(stdlib: Path | None = None) -> list[Document]:
    """The built-in corpus, about 12,000 deduplicated documents of 40 to some 600 characters.

    Order is by hash, so that the first n documents are a fair sample. Paragraphs that occurred
    before, up to case, spacing, digits and punctuation, are left out.

    Raises ``DataError`` when the interpreter carries no reference topics or no library sources.
    """
    return list(_collect(stdlib or stdlib_folder()))


@lru_cache(maxsize=2)
def _collect(stdlib: Path) -> tuple[Document, ...]:
    seen: set[str] = set()
    documents: list[Document] = []
    for original in _originals(stdlib):
        fresh = []
        for paragraph in prose.paragraphs(original):
            folded = prose.fold(paragraph)
            if folded not in seen:
                seen.add(folded)
                fresh.append(paragraph)
        documents += [
            Document(sample, group=original)
            for sample in prose.group(fresh, SAMPLE_CHARACTERS)
            if len(sample) >= MIN_CHARACTERS
        ]
    return tuple(sorted(documents, key=lambda document: _digest(document.text)))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def builtin_identity(stdlib: Path | None = None) -> dict[str, str | int]:
    """What the corpus depends on, in milliseconds: interpreter and names and sizes of its files."""
    folder = stdlib or stdlib_folder()
    listing = hashlib.sha256()
    for path in [_topics_file(folder), *_source_files(folder)]:
        listing.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}\n".encode())
    return {
        "kind": "builtin",
        "version": CORPUS_VERSION,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "files": listing.hexdigest(),
    }


def _originals(stdlib: Path) -> Iterator[str]:
    yield from _topic_sections(_topics_file(stdlib))
    sources = list(_sources(_source_files(stdlib)))
    for source in sources:
        yield from _docstrings(source)
    for source in sources:
        yield from _comment_blocks(source)


def _topics_file(stdlib: Path) -> Path:
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise DataError(
            f"data.dataset_path 'builtin' reads the reference topics every complete CPython "
            f"carries, but {path} does not exist (some minimal installations leave pydoc_data "
            f"out). Install the complete standard library, or set data.dataset_path to a text, "
            f"JSONL or Parquet file or folder."
        )
    return path


def _source_files(stdlib: Path) -> list[Path]:
    found = []
    skipped = _OPTIONAL.split()
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = sorted(
            name for name in subfolders if name not in skipped and not name.startswith("config-")
        )
        found += [
            Path(folder, name)
            for name in sorted(names)
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize"))
        ]
    if not found:
        raise DataError(
            f"data.dataset_path 'builtin' reads docstrings from the standard library's .py files, "
            f"but there are none in {stdlib}. Set data.dataset_path to a file or folder of text."
        )
    return found


def _topic_sections(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield from prose.sections(topics[name])


def _sources(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with tokenize.open(path) as file:
                yield file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            if text:
                yield text


def _comment_blocks(source: str) -> Iterator[str]:
    """Runs of whole-line comments, without their hash signs."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").removeprefix(" "))
        elif block:
            yield "\n".join(block)
            block = []
