"""Reading files: what becomes a document, and what a faulty file is answered with."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.data import DataError
from stackwise.data.files import LONGEST_TEXT, _cut, kind_of, read_documents


def _texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(path, field)]


def test_a_text_file_is_one_document(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffErste Zeile\r\nzweite Zeile 東\n\nEnde".encode())
    assert _texts(path) == ["Erste Zeile\nzweite Zeile 東\n\nEnde"]


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path):
    paragraph = "word " * 120 + "\n\n"
    path = tmp_path / "book.md"
    path.write_text(paragraph * 50)
    texts = _texts(path)
    assert "".join(texts) == paragraph * 50
    assert len(texts) > 3
    assert all(len(text) <= LONGEST_TEXT and text.endswith("\n\n") for text in texts)


def test_appending_to_a_text_leaves_its_first_documents(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("word " * 120 + "\n\n")
    with path.open("a") as file:
        file.write(("word " * 120 + "\n\n") * 50)
    before = _texts(path)
    with path.open("a") as file:
        file.write("more\n" * 4000)
    assert _texts(path)[: len(before) - 1] == before[:-1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["\n", "a\n", "b" * 3000 + "\n", "c" * 20_000, " \n"]), max_size=20)
)
def test_cutting_loses_nothing(lines: list[str]):
    pieces = list(_cut(iter(lines)))
    assert "".join(pieces) == "".join(lines)
    assert all(0 < len(piece) <= LONGEST_TEXT for piece in pieces)


def test_jsonl_and_gzip(tmp_path: Path):
    records = [{"text": "one"}, {"text": " "}, {"text": None}, {"text": "zwei 🦀", "id": 3}]
    lines = "\n".join(json.dumps(record) for record in records) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write("größer")
    assert _texts(tmp_path / "a.jsonl") == _texts(tmp_path / "b.jsonl.gz") == ["one", "zwei 🦀"]
    assert _texts(tmp_path / "c.txt.gz") == ["größer"]


def test_parquet(tmp_path: Path):
    table = pyarrow.table({"body": ["one", None, "", "zwei"], "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet", "body") == ["one", "zwei"]
    with pytest.raises(DataError, match=r"a\.parquet: no field 'text'; it has body, id"):
        _texts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="field 'id' holds int64, not text"):
        _texts(tmp_path / "a.parquet", "id")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file"):
        _texts(tmp_path / "b.parquet")


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes("ok\nnaïve\n".encode() + "gr\u00f6\u00dfe".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 0xf6 at offset 12"):
        _texts(path)


def test_faulty_json_is_located(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not valid JSON"):
        _texts(path)
    path.write_text('{"title": "x", "body": "y"}\n')
    with pytest.raises(DataError, match=r"line 1: no field 'text'; it has body, title"):
        _texts(path)
    path.write_text('"just a string"\n')
    with pytest.raises(DataError, match=r"line 1: expected an object .* got str"):
        _texts(path)
    path.write_text('{"text": ["a"]}\n')
    with pytest.raises(DataError, match=r"line 1: field 'text' holds list, not text"):
        _texts(path)


def test_damaged_gzip_is_named(tmp_path: Path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"text " * 1000)[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.gz: damaged gzip"):
        _texts(path)


def test_kinds_by_name():
    assert kind_of(Path("a.TXT")) == "txt"
    assert kind_of(Path("a.jsonl.gz")) == "jsonl"
    assert kind_of(Path("a.parquet.gz")) is None
    assert kind_of(Path("parquet")) is None
