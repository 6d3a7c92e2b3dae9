"""Which documents are held out: a hash of the text decides, not the order or the company."""

from __future__ import annotations

import random

import pytest

from stackwise.data import Document, PreparedData, builtin_documents, prose
from stackwise.data.documents import split_documents, split_position

DOCUMENTS = [Document(f"document number {n} of many") for n in range(2000)]


def _held_out(documents: list[Document], fraction: float) -> set[str]:
    return {document.text for held, document in split_documents(documents, fraction) if held}


def test_every_document_lands_in_one_split_and_the_share_is_right():
    pairs = list(split_documents(DOCUMENTS, 0.1))
    assert sorted(document.text for _, document in pairs) == sorted(d.text for d in DOCUMENTS)
    assert sum(held for held, _ in pairs) == pytest.approx(200, abs=40)


def test_growing_or_shuffling_the_corpus_moves_no_document():
    before = _held_out(DOCUMENTS[:1000], 0.05)
    shuffled = random.Random(0).sample(DOCUMENTS, 2000)
    after = _held_out(shuffled, 0.05)
    assert before == after & {document.text for document in DOCUMENTS[:1000]}
    assert _held_out(DOCUMENTS, 0.05) == after < _held_out(DOCUMENTS, 0.1)


def test_duplicates_and_parts_of_one_original_stay_together():
    parts = [Document(f"part {n}", group=f"original {n // 5}") for n in range(1000)]
    sides: dict[str, set[bool]] = {}
    for held, document in split_documents(parts + parts, 0.3):
        sides.setdefault(document.group, set()).add(held)
    assert {len(side) for side in sides.values()} == {1}
    assert {next(iter(side)) for side in sides.values()} == {True, False}


def test_a_small_corpus_gives_up_its_lowest_document():
    few = sorted(DOCUMENTS, key=split_position)[1500:1505]
    for documents in (few, few[::-1], few[2:] + few[:2]):
        assert _held_out(documents, 0.01) == {few[0].text}
    assert _held_out([few[0], few[3], few[0]], 0.01) == {few[0].text}
    held = [held for held, _ in split_documents([few[0], few[3], few[0]], 0.01)]
    assert sorted(held) == [False, True, True]
    assert _held_out(few, 0.0) == set()
    assert list(split_documents([], 0.1)) == []


def test_the_split_is_the_same_everywhere():
    assert split_position(Document("a")) == pytest.approx(0.10028286593626035, abs=1e-15)
    assert split_position(Document("b", group="a")) == split_position(Document("a"))


def test_builtin_train_and_validation_share_no_paragraph(builtin: PreparedData):
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for held, document in split_documents(builtin_documents(), 0.05):
        sides[held].update(
            folded for line in document.text.splitlines() if len(folded := prose.fold(line)) > 60
        )
    assert len(sides[True]) > 400
    assert len(sides[True] & sides[False]) <= 3
    counted = sum(held for held, _ in split_documents(builtin_documents(), 0.05))
    assert counted == builtin.validation.n_documents
    total = builtin.train.n_documents + builtin.validation.n_documents
    assert total == len(builtin_documents())
    assert 0.04 < builtin.validation.n_bytes / (builtin.train.n_bytes + 1) < 0.07
