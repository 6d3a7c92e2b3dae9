"""Cleaning: from a docstring, a comment block or a reference page to paragraphs of English prose.

Doctests, code, grammar productions, tables, signatures and underlines are dropped; what stays is
unwrapped, one line per paragraph or list item.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")
_HEADING = re.compile(r"^(?=\S.*\n([*=\-~^])\1{3,}[ \t]*$)", re.MULTILINE)
_BULLET = re.compile(r"\s*(?:[*+\-o\u2022]|\(?\d{1,2}[.)]|\[\d+\])\s+\S")
_RULE = re.compile(r"\s*([-=~*^#_+.\"'`])\1{2,}\s*$")
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][a-z]+)?")
_SYMBOLS = re.compile(r"[{}\[\]()=<>_|\\/;@#$%^&~]")
_NOT_PROSE = re.compile(
    r">>>|::=|\+--|-\+-|\|\s+\||^\s*\||^\s*\$ |\$(?:Id|Revision)|"
    r"^\s*(?:def|class|import|from\s+\S+\s+import|return|print|raise|assert|while|for\s+\S+\s+in)\b"
    r"[^.]*(?:[:)]\s*$|\bimport\b)",
    re.MULTILINE,
)
_LEGAL = re.compile(
    r"copyright|licen[cs]e[d ]|all rights reserved|warrant(?:y|ies)|permission to use",
    re.IGNORECASE,
)
_COMMON_WORDS = (
    "a about after all also always an and any are as at be because been before being but by can "
    "cannot case could do does don't each either else even every for from get given has have how "
    "if in instead into is isn't it it's its like make may more most must never no not of on one "
    "only or other otherwise our over should since so some such than that the their them then "
    "there these they this those to too two under until up use used uses using we what when where "
    "whether which while who will with within without would you your"
)
_COMMON = frozenset(_COMMON_WORDS.split())


def sections(text: str) -> list[str]:
    """``text`` cut before every underlined heading."""
    cuts = [0, *(match.start() for match in _HEADING.finditer(text)), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(cuts)]
    return [part for part in parts if part.strip()]


def paragraphs(text: str) -> Iterator[str]:
    """The prose paragraphs of ``text`` in order, list items of a paragraph on their own lines."""
    for block in _BLANK_LINES.split(text.expandtabs()):
        lines = [line.rstrip() for line in block.splitlines() if not _RULE.match(line)]
        lines = [line for line in lines if line.strip()]
        if not lines or _NOT_PROSE.search("\n".join(lines)):
            continue
        items = [item for item in unwrap(lines) if is_prose(item)]
        if items:
            yield "\n".join(items)


def unwrap(lines: list[str]) -> list[str]:
    """Joins wrapped lines; a bullet, or a return from a hanging indent, starts a new item."""
    items: list[list[str]] = []
    base = len(lines[0]) - len(lines[0].lstrip())
    previous = base
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not items or _BULLET.match(line) or indent <= base < previous:
            items.append([])
        items[-1].append(" ".join(line.split()))
        previous = indent
    return [" ".join(item) for item in items]


def is_prose(text: str) -> bool:
    """Whether an unwrapped line reads as English: common words, few symbols, few digits."""
    words = _WORD.findall(text)
    if len(words) < 4 or _LEGAL.search(text):
        return False
    common = sum(word.lower() in _COMMON for word in words)
    letters = sum(len(word) for word in words)
    symbols = len(_SYMBOLS.findall(text))
    digits = sum(character.isdigit() for character in text)
    return (
        common >= max(1, 0.12 * len(words))
        and letters >= 0.6 * len(text.replace(" ", ""))
        and symbols <= 0.08 * len(text)
        and digits <= 0.1 * len(text)
    )


def fold(text: str) -> str:
    """What two paragraphs are compared by: lower-case letters only, so that spacing, case,
    digits and punctuation make no difference."""
    return "".join(filter(str.isalpha, text.lower()))


def group(items: list[str], target: int) -> list[str]:
    """Joins neighbouring paragraphs into samples of at least ``target`` characters where there
    is enough text; a remainder below half of that joins the sample before it."""
    samples: list[list[str]] = []
    size = 0
    for item in items:
        if not samples or size >= target:
            samples.append([])
            size = 0
        samples[-1].append(item)
        size += len(item)
    if len(samples) > 1 and size < target // 2:
        samples[-2].extend(samples.pop())
    return ["\n".join(sample) for sample in samples]
