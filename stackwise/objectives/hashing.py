"""Counter-based random numbers: a pure function of integer keys, bit-identical on CPU and GPU.

The generator is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) in wrapping int64 arithmetic. Every number is addressed by its keys
(seed, stream, row, draw, position), so it does not depend on which rows share a batch, on the order
of calls or on the device, and nothing has to be saved to draw it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

Key = int | Tensor

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

# One stream per use, so that two uses never see the same numbers.
STREAM_MASK = 1
STREAM_TIME = 2
STREAM_ACTION = 3
STREAM_TOKEN = 4
STREAM_COUNT = 5
STREAM_ROWS = 6
STREAM_SAMPLE = 7


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 >> is arithmetic; the mask makes it the logical shift the generator is defined with.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The splitmix64 finaliser of int64 ``x``, elementwise; a bijection of 64-bit words."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _splitmix64_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) % _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) % _WORD
    return x ^ (x >> 31)


def _advance(state: Key, key: Key) -> Tensor | int:
    if isinstance(key, Tensor):
        return splitmix64((key.to(torch.int64) + 1) * _signed(_GOLDEN) + state)
    if isinstance(state, Tensor):
        return splitmix64(state + _signed((key + 1) * _GOLDEN))
    return _signed(_splitmix64_int((state + (key + 1) * _GOLDEN) % _WORD))


def hash_keys(*keys: Key, device: torch.device | str | None = None) -> Tensor:
    """64 hashed bits for every combination of ``keys`` (broadcast against each other), int64.

    The state starts at 0 and every key moves it: state = splitmix64(state + golden * (key + 1)).
    Keys are Python integers (taken modulo 2^64) or int64 tensors; ``device`` is needed only when
    none of them is a tensor. Leading integers are folded on the host: a GPU sees no scalar copies.
    """
    state: Key = 0
    for key in keys:
        state = _advance(state, key)
    return state if isinstance(state, Tensor) else torch.tensor(state, device=device)


def hash_int(*keys: int) -> int:
    """``hash_keys`` of integers alone, as a signed 64-bit Python integer."""
    return int(hash_keys(*keys))


def to_unit(bits: Tensor) -> Tensor:
    """The upper 53 bits of int64 ``bits`` as float64 in [0, 1)."""
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def uniform(*keys: Key, device: torch.device | str | None = None) -> Tensor:
    """Uniform float64 numbers in [0, 1) for every combination of ``keys``; see ``hash_keys``."""
    return to_unit(hash_keys(*keys, device=device))


def uniform_int(high: int, *keys: Key, device: torch.device | str | None = None) -> Tensor:
    """Uniform int64 numbers in 0..high-1 (modulo bias below high / 2^63)."""
    return _shift_right(hash_keys(*keys, device=device), 1) % high


def golden_sequence(offset: Tensor, index: Tensor) -> Tensor:
    """frac(offset + index * golden ratio) in 64-bit fixed point, float64 in [0, 1).

    ``offset`` holds 64 random bits (int64), ``index`` int64. Any run of consecutive indices is a
    low-discrepancy set (the Kronecker sequence of the golden ratio), and each single number is
    uniform over the random offset.
    """
    return to_unit(offset + index.to(torch.int64) * _signed(_GOLDEN))
