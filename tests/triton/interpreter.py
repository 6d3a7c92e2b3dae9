"""Makes Triton's interpreter compute with bfloat16, which it stores as raw uint16.

Left alone, the interpreter adds and multiplies the bit patterns as integers, and cuts digits off
where a conversion from float32 should round to nearest even. :func:`repair` widens bfloat16
operands to float32 around each arithmetic, product and reduction step and rounds, as a GPU does.
With Triton 3.6 and numpy 2.4 it also restores ``tl.range`` over tensor bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) to float32."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, to nearest even, every NaN to the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def repair() -> None:
    """Patches the interpreter of this process, once; call it before the first launch."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "repaired_bfloat16"):
        return
    builder.repaired_bfloat16 = True
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, _arithmetic(getattr(builder, name)))
    builder.create_dot = _dot(builder.create_dot)
    interpreter._convert_float = _conversion(interpreter._convert_float)
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: _handle(np.array([value]))
    for name in ("sum", "min_max"):
        setattr(interpreter.ReduceOps, name, _reduction(getattr(interpreter.ReduceOps, name)))
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        interpreter._patch_lang_tensor = _indexable(interpreter._patch_lang_tensor)


def _is_bfloat16(x: Any) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _values(handle: Any) -> np.ndarray:
    return widen(handle.data) if _is_bfloat16(handle) else handle.data


def _handle(values: np.ndarray) -> Any:
    return interpreter.TensorHandle(narrow(values), tl.bfloat16)


def _arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
    def repaired(self: Any, *arguments: Any) -> Any:
        *operands, operation = arguments
        if not any(_is_bfloat16(operand) for operand in operands):
            return original(self, *arguments)
        result = operation(*map(_values, operands))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return _handle(result)

    return repaired


def _conversion(original: Callable[..., Any]) -> Callable[..., Any]:
    def repaired(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen(data)
        if (source, target) == (tl.float32, tl.bfloat16) and (
            rounding != interpreter._ir.ROUNDING_MODE.RTZ
        ):
            return narrow(data)
        return original(data, source, target, rounding)

    return repaired


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def repaired(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        if not (_is_bfloat16(a) or _is_bfloat16(b)):
            return original(self, a, b, c, *options)
        result = np.matmul(_values(a), _values(b), dtype=np.float32) + _values(c)
        if _is_bfloat16(c):
            return _handle(result)
        return interpreter.TensorHandle(result.astype(c.data.dtype), c.dtype.scalar)

    return repaired


def _reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def wide(x: Any) -> Any:
        block = tl.block_type(tl.float32, list(x.shape))
        data = interpreter.TensorHandle(widen(x.handle.data), tl.float32)
        return tl.core.tensor(data, block)

    def back(x: Any) -> Any:
        if x.dtype != tl.float32:
            return x
        kind = tl.block_type(tl.bfloat16, list(x.shape)) if x.shape else tl.bfloat16
        return tl.core.tensor(_handle(x.handle.data), kind)

    def repaired(self: Any, x: Any, *options: Any, **keywords: Any) -> Any:
        single = x[0] if isinstance(x, tuple) else x
        if single.dtype != tl.bfloat16:
            return original(self, x, *options, **keywords)
        result = original(self, wide(single), *options, **keywords)
        return tuple(map(back, result)) if isinstance(result, tuple) else back(result)

    return repaired


def _indexable(original: Callable[..., Any]) -> Callable[..., Any]:
    """numpy 2.4 refuses int() of a one-element array, which Triton 3.6 uses for loop bounds."""

    def patched(tensor: Any, *scope: Any) -> Any:
        result = original(tensor, *scope)
        assign = scope[0].set_attr if scope else setattr
        assign(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))
        return result

    return patched
