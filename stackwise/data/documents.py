"""A document, the error every unusable corpus ends in, and which documents are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SPLIT_SEED = b"stackwise-split-0"


class DataError(ValueError):
    """A corpus, tokenizer or prepared shard that cannot be used; the message names the place."""


@dataclass(frozen=True)
class Document:
    """One training document.

    ``group`` ties documents cut from one original together, so that all of them land in the same
    split; empty when the document stands for itself.
    """

    text: str
    group: str = ""


def split_position(document: Document) -> float:
    """Where a document falls in [0, 1): below ``validation_fraction`` it is held out.

    A hash of the text, so that the split does not change when documents are added, removed or
    reordered, and equal texts never face each other across it.
    """
    key = (document.group or document.text).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8, key=_SPLIT_SEED).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def split_documents(
    documents: Iterable[Document], validation_fraction: float
) -> Iterator[tuple[bool, Document]]:
    """Yields ``(held_out, document)`` pairs in one pass.

    A corpus too small to have a document below ``validation_fraction`` gives up the lowest one
    (with its duplicates), which is therefore kept back to the end: all that is in memory here.
    """
    lowest: list[Document] = []
    lowest_position = 1.0
    any_held_out = False
    for document in documents:
        position = split_position(document)
        if position < validation_fraction:
            any_held_out = True
            yield True, document
        elif any_held_out or validation_fraction == 0:
            yield False, document
        elif position == lowest_position:
            lowest.append(document)
        elif position < lowest_position:
            yield from ((False, beaten) for beaten in lowest)
            lowest, lowest_position = [document], position
        else:
            yield False, document
    yield from ((not any_held_out, document) for document in lowest)
