"""The built-in corpus: size, cleanliness, no duplicates, sameness; what a bare Python is told."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stackwise.data import DataError, builtin_documents, prose
from stackwise.data.corpus import builtin_identity, stdlib_folder

TOPIC = (
    "topics = {'loops': '''The loop\n********\n\n"
    "A loop runs the body again and again until it is done.\n'''}\n"
)


def test_at_least_ten_thousand_samples_and_one_and_a_half_megabytes():
    documents = builtin_documents()
    assert len(documents) >= 10_000
    assert sum(len(document.text.encode()) for document in documents) >= 1_500_000


def test_samples_are_documents_rather_than_lines():
    sizes = sorted(len(document.text) for document in builtin_documents())
    assert sizes[0] >= 40
    assert sizes[len(sizes) // 2] >= 90
    assert sum(size for size in sizes if size >= 200) >= 0.6 * sum(sizes)
    assert sizes[-1] <= 4000


def test_no_two_samples_are_equal_up_to_spacing_case_and_punctuation():
    folded = [prose.fold(document.text) for document in builtin_documents()]
    assert len(set(folded)) == len(folded)


def test_no_paragraph_occurs_twice_in_the_whole_corpus():
    seen: set[str] = set()
    repeated = 0
    for document in builtin_documents():
        for line in document.text.splitlines():
            folded = prose.fold(line)
            repeated += len(folded) > 60 and folded in seen
            seen.add(folded)
    assert repeated <= 60


def test_samples_are_prose_not_code_tables_or_licences():
    texts = [document.text for document in builtin_documents()]
    for mark in (">>>", "::=", "+---", "All rights reserved", "\t"):
        assert not [text for text in texts if mark in text]
    letters = sum(character.isalpha() or character == " " for text in texts for character in text)
    assert letters / sum(map(len, texts)) > 0.92


def test_another_process_reads_the_same_documents_and_imports_no_library_module():
    code = (
        "import hashlib, sys; import stackwise.data.corpus as c; before = set(sys.modules);"
        "print(hashlib.sha256(repr(c.builtin_documents()).encode()).hexdigest());"
        "own = ('encodings.', '_sysconfigdata');"
        "print([m for m in sys.modules if m not in before and not m.startswith(own)])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    here = hashlib.sha256(repr(builtin_documents()).encode()).hexdigest()
    assert other.stdout.splitlines() == [here, "[]"]


def test_the_first_thousand_documents_are_a_fair_sample():
    documents = builtin_documents()
    average = sum(len(document.text) for document in documents) / len(documents)
    first = sum(len(document.text) for document in documents[:1000]) / 1000
    assert first == pytest.approx(average, rel=0.1)


def test_a_python_without_topics_is_told_what_to_do(tmp_path: Path):
    (tmp_path / "os.py").write_text('"""Interfaces to the system that are in every library."""\n')
    with pytest.raises(DataError, match=r"topics\.py does not exist.*data\.dataset_path"):
        builtin_documents(tmp_path)


def test_a_python_without_sources_is_told_what_to_do(tmp_path: Path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(TOPIC)
    with pytest.raises(DataError, match=r"no.*\.py|there are none"):
        builtin_documents(tmp_path)


def test_topics_docstrings_and_comments_are_read_and_optional_packages_skipped(tmp_path: Path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(TOPIC)
    (tmp_path / "library.py").write_text(
        '"""This module is about what the other modules leave to it."""\n'
        "# The lock is held while the table is rebuilt, so that\n# nobody sees half of it.\n"
        "TABLE = {}\n"
    )
    (tmp_path / "idlelib").mkdir()
    (tmp_path / "idlelib" / "x.py").write_text('"""A package that some installations leave out."""')
    (tmp_path / "broken.py").write_text("def (:\n")
    texts = {document.text for document in builtin_documents(tmp_path)}
    assert texts == {
        "A loop runs the body again and again until it is done.",
        "This module is about what the other modules leave to it.",
        "The lock is held while the table is rebuilt, so that nobody sees half of it.",
    }


def test_identity_changes_with_the_files(tmp_path: Path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(TOPIC)
    (tmp_path / "one.py").write_text("")
    before = builtin_identity(tmp_path)
    assert builtin_identity(tmp_path) == before
    (tmp_path / "one.py").write_text("ONE = 1\n")
    assert builtin_identity(tmp_path) != before
    assert builtin_identity() == builtin_identity(stdlib_folder())
