"""Prompts with spans to fill in: ``[MASK]`` is one token, ``[MASK:8]`` eight."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stackwise.data.tokenizer import Tokenizer

_MAX_SPAN = 1_000_000


def encode_prompt(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of ``text`` and which of them are to be filled in (their id is MASK).

    ``[MASK]``, ``[MASK:n]`` and the tokenizer's own mask token become MASK ids; the text between
    them is encoded piece by piece and never yields a special token. Raises ValueError for a span
    of no tokens, or a span where the tokenizer has no MASK token.
    """
    ids: list[int] = []
    to_fill: list[bool] = []
    for piece, length in _pieces(text, tokenizer):
        if length and tokenizer.mask_id is None:
            raise ValueError(f"prompt holds {piece!r}, but the tokenizer has no MASK token")
        new = [tokenizer.mask_id] * length if length else tokenizer.encode(piece)
        ids += new
        to_fill += [length > 0] * len(new)
    return ids, to_fill


def _pieces(text: str, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Text and spans in order, each with its number of masked tokens (0 for text)."""
    own = getattr(tokenizer, "mask_token", None)
    marks = r"\[MASK(?::(\d+))?\]" + (f"|{re.escape(own)}" if own else "")
    pieces, end = [], 0
    for match in re.finditer(marks, text):
        length = int(match[1]) if match[1] else 1
        if not 1 <= length <= _MAX_SPAN:
            raise ValueError(f"prompt span {match[0]!r} must ask for 1 to {_MAX_SPAN} tokens")
        pieces += [(text[end : match.start()], 0), (match[0], length)]
        end = match.end()
    return [(piece, n) for piece, n in [*pieces, (text[end:], 0)] if piece]
