"""The cleaner keeps sentences whole and drops what is not prose."""

from __future__ import annotations

from stackwise.data import prose

DOCSTRING = """Return the value that belongs to the key.

The key is looked up first in the table, and then, when it is
not there, in the tables that were given before it:

    >>> lookup("a")
    1

    def lookup(key):
        return table[key]

* The first point is about keys that
  are wrapped over two lines.
* The second one is not.

+-----+-----+
| key | of  |
+-----+-----+

stmt ::= "if" test ":" suite

lookup(key[, default]) -> value
"""


def test_paragraphs_of_a_docstring():
    assert list(prose.paragraphs(DOCSTRING)) == [
        "Return the value that belongs to the key.",
        "The key is looked up first in the table, and then, when it is not there, in the tables "
        "that were given before it:",
        "* The first point is about keys that are wrapped over two lines.\n"
        "* The second one is not.",
    ]


def test_hanging_indents_are_items():
    lines = ["host   the machine that is", "       asked", "port   where it listens"]
    assert prose.unwrap(lines) == [
        "host the machine that is asked",
        "port where it listens",
    ]


def test_a_page_is_cut_at_its_headings():
    page = "Title\n*****\n\nOne.\n\nSection\n=======\n\nTwo.\n"
    assert prose.sections(page) == ["Title\n*****\n\nOne.\n\n", "Section\n=======\n\nTwo.\n"]


def test_fold_ignores_case_spacing_digits_and_punctuation():
    assert prose.fold("An IPv4 address,\n  as text.") == prose.fold("an ipv6 Address as text")
    assert prose.fold("one thing") != prose.fold("other thing")


def test_group_reaches_the_target_and_leaves_no_stub():
    items = ["a" * 60, "b" * 60, "c" * 60, "d" * 10]
    assert prose.group(items, 100) == ["\n".join(items[:2]), "\n".join(items[2:])]
    assert prose.group([*items[:2], "d" * 10], 100) == ["\n".join([*items[:2], "d" * 10])]
    assert prose.group([], 100) == []


def test_is_prose_refuses_code_numbers_and_licences():
    assert prose.is_prose("It is used when the others cannot be.")
    assert not prose.is_prose("x = foo(bar)[baz] if a else {b: c for c in d}")
    assert not prose.is_prose("in 1.5: 20121 and 1.5.1: 20121 and in 1.6: 50428 or 2.0: 50823")
    assert not prose.is_prose("This is licensed to the foundation under an agreement.")
    assert not prose.is_prose("See also foo")
