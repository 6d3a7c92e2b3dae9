"""What a mask of Transformers says, in the cheapest form that attention can take.

``AttentionMaskInterface`` hands over a mask function, a padding mask and the two lengths. Here they
become, first that holds:

    None               plain causal attention, rows aligned to the end of the keys
    AttentionPattern   causality, a window, documents (packed or padded rows), hidden keys
    bool tensor        (B, 1, Lq, Lk), True = may attend: any other mask function, static caches

The functions that Transformers builds its masks from are recognised by their code, so one that
changes or that a user adds is never misread: it gives the dense tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

Window = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPattern:
    """A mask as its parts; they intersect.

    Transformers passes it through a model where it passes a (B, 1, Lq, Lk) tensor: ``shape``,
    ``ndim`` and ``contiguous`` are what that code asks of a mask.
    """

    shape: tuple[int, int, int, int]
    causal: bool
    window: Window | None = None
    #: (n + 1,) int32 boundaries of the B · L tokens in row order; for keys None: the same.
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    #: (B, Lk) bool, False hides a key.
    keys: Tensor | None = None

    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> AttentionPattern:
        return self


def stackwise_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = masking_utils.causal_mask_function,
    attention_mask: Tensor | AttentionPattern | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | AttentionPattern | None:
    """The mask interface registered as "stackwise".

    Args:
        batch_size, q_length, kv_length: B, Lq, Lk.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: (batch, head, query, key) indices to bool.
        attention_mask: bool (B, at most kv_offset + Lk), False is padding; or a pattern made
            earlier, as ``generate`` does.
        allow_is_causal_skip, allow_is_bidirectional_skip: both False ask for the dense tensor.
        kwargs: what the dense mask of Transformers takes beside these.

    Returns:
        None, an :class:`AttentionPattern` or a bool tensor; see the top of this file.
    """
    if isinstance(attention_mask, AttentionPattern):
        return attention_mask
    parts = None if kwargs.get("use_vmap") else _read(mask_function)
    if parts is not None and _can_skip(parts, allow_is_causal_skip or allow_is_bidirectional_skip):
        aligned = not isinstance(q_offset, Tensor) and (
            q_offset + q_length == kv_offset + kv_length
        )
        if aligned or not (parts.causal or parts.window):
            shape = (batch_size, 1, q_length, kv_length)
            padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
            if padding is not None:
                padding = padding[:, kv_offset : kv_offset + kv_length].expand(batch_size, -1)
            if parts.packed is None:
                return _pattern(shape, parts, padding)
            if padding is None and q_length == kv_length:
                return _packed(shape, parts)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    causal: bool = False
    window: Window | None = None
    packed: Tensor | None = None  # (B, L), equal where tokens belong to one document


def _can_skip(parts: _Parts, allowed: bool) -> bool:
    """Packing switches the permission off without meaning that a tensor is needed."""
    if parts.packed is not None:
        return not masking_utils.is_tracing(parts.packed)
    return allowed


def _pattern(
    shape: tuple[int, int, int, int], parts: _Parts, padding: Tensor | None
) -> AttentionPattern | None:
    reads = padding is not None and not masking_utils.is_tracing(padding)
    if padding is not None and reads and bool(padding.all()):
        padding = None
    if padding is None:
        if parts.causal and parts.window is None:
            return None
        return AttentionPattern(shape, parts.causal, parts.window)
    if reads and shape[2] == shape[3]:
        documents = _real_tokens(padding)
        if documents is not None:
            return AttentionPattern(shape, parts.causal, parts.window, *documents)
    return AttentionPattern(shape, parts.causal, parts.window, keys=padding)


def _packed(shape: tuple[int, int, int, int], parts: _Parts) -> AttentionPattern:
    assert parts.packed is not None
    packed = parts.packed.expand(shape[0], shape[2])
    starts = torch.ones_like(packed, dtype=torch.bool)
    starts[:, 1:] = packed[:, 1:] != packed[:, :-1]
    return AttentionPattern(shape, parts.causal, parts.window, _boundaries(starts))


def _real_tokens(padding: Tensor) -> tuple[Tensor, Tensor] | None:
    """Boundaries (queries, keys) of rows with padding before or after their tokens; None where a
    row's tokens are not in one piece, which would change distances inside a window.

    A run of padding is two documents, queries without keys and then keys without queries: those
    queries give 0, and nobody sees those keys.
    """
    starts = torch.ones_like(padding)
    starts[:, 1:] = padding[:, 1:] != padding[:, :-1]
    if bool(((starts & padding).sum(1) > 1).any()):
        return None
    bounds = _boundaries(starts)
    hidden = ~padding.flatten()[bounds[:-1].long()]
    # A run of tokens is a document with as many keys, and then one without either.
    ends_q = torch.stack([bounds[1:], bounds[1:]], dim=1).flatten()
    first_k = torch.where(hidden, bounds[:-1], bounds[1:])
    ends_k = torch.stack([first_k, bounds[1:]], dim=1).flatten()
    zero = bounds.new_zeros(1)
    return torch.cat([zero, ends_q]), torch.cat([zero, ends_k])


def _boundaries(starts: Tensor) -> Tensor:
    """(B, L) bool, True at first tokens, to (n + 1,) int32 boundaries of the B · L tokens."""
    flat = starts.flatten()
    first = torch.nonzero(flat)[:, 0]
    return torch.cat([first, first.new_full((1,), flat.numel())]).to(torch.int32)


def _read(function: Callable[..., Tensor]) -> _Parts | None:
    """What a mask function of Transformers says, or None for one that is not recognised."""
    if function is masking_utils.causal_mask_function:
        return _Parts(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Parts()
    if masking_utils.is_tracing():
        return None
    code: Any = getattr(function, "__code__", None)
    builder = _builders().get(code)
    if builder is None:
        return None
    closure = zip(code.co_freevars, function.__closure__ or (), strict=True)
    return builder(**{name: cell.cell_contents for name, cell in closure})


@cache
def _builders() -> dict[Any, Callable[..., _Parts | None]]:
    """Readers of the closures that Transformers makes, by the code these closures share."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    causal = masking_utils.causal_mask_function
    return {
        masking_utils.and_masks(causal).__code__: _read_all,
        masking_utils.sliding_window_overlay(1).__code__: _read_window,
        masking_utils.sliding_window_bidirectional_overlay(1).__code__: _read_both_sides,
        masking_utils.packed_sequence_mask_function(one).__code__: _read_documents,
        masking_utils.remap_positions_for_packed_sequence(causal, one).__code__: _read_positions,
    }


def _read_window(sliding_window: int) -> _Parts:
    return _Parts(window=(sliding_window - 1, -1))


def _read_both_sides(sliding_window: int) -> _Parts:
    return _Parts(window=(sliding_window, sliding_window))


def _read_documents(packed_sequence_mask: Tensor) -> _Parts:
    return _Parts(packed=packed_sequence_mask)


def _read_positions(mask_function: Callable[..., Tensor], position_ids: Tensor) -> _Parts | None:
    """Positions count up in each document, so their order and distances are those of the tokens."""
    return _read(mask_function)


def _read_all(mask_functions: tuple[Callable[..., Tensor], ...]) -> _Parts | None:
    found = [_read(function) for function in mask_functions]
    parts = [part for part in found if part is not None]
    windows = [part.window for part in parts if part.window is not None]
    packed = [part.packed for part in parts if part.packed is not None]
    if len(parts) < len(found) or len(windows) > 1 or len(packed) > 1:
        return None
    return _Parts(
        causal=any(part.causal for part in parts),
        window=windows[0] if windows else None,
        packed=packed[0] if packed else None,
    )
