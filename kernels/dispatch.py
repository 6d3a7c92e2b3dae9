"""Which variant of an operation runs: one registry, one rule.

A variant is a function with the operation's own signature, without ``impl``. Operations and later
backends add theirs with :func:`register`; callers never change. The choice, first match wins:

1. ``impl=`` of the call: an error when it does not exist or does not cover the case;
2. :func:`use`: the ``kernels:`` section of a run's configuration;
3. ``STACKWISE_IMPL``: one name for the whole process, where that variant exists;
4. on a GPU, the variant that measured evidence prefers for the case (:mod:`evidence`);
5. a registered variant whose ``preferred`` rule says yes for the case; otherwise "torch".

A preference (2 to 4) that does not cover the case falls through to the next rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import evidence

VARIANTS = ("reference", "torch", "triton", "cuda")
NOT_VALIDATED = "not validated on a GPU"  # the status that evidence replaces

# os.environ.get takes a microsecond, this dictionary of bytes beneath it a tenth.
_environment: Mapping[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
_WISH = b"STACKWISE_IMPL"


@dataclass(frozen=True)
class Variant:
    """One implementation of an operation.

    ``unsupported(*args, **kwargs)`` gives the reason why a case is not covered, or None.
    ``preferred(*args, **kwargs)`` says whether it is the default for a case, on any device.
    ``status`` is the line that ``stackwise info`` prints where no evidence says more. ``source``
    names the module of this package that holds it, "triton_ops.rope".
    """

    function: Callable[..., Any]
    unsupported: Callable[..., str | None] | None = None
    preferred: Callable[..., bool] | None = None
    status: str = "ready"
    source: str = ""


_registry: dict[str, dict[str, Variant]] = {}
_preferences: dict[str, str] = {}


def register(
    op: str,
    variant: str,
    function: Callable[..., Any],
    *,
    unsupported: Callable[..., str | None] | None = None,
    preferred: Callable[..., bool] | None = None,
    status: str = "ready",
    source: str = "",
) -> None:
    """Adds (or replaces) a variant of ``op``; see :class:`Variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}; accepted: {', '.join(VARIANTS)}")
    variants = _registry.setdefault(op, {})
    variants[variant] = Variant(function, unsupported, preferred, status, source)


def available() -> dict[str, dict[str, str]]:
    """``{operation: {variant: status}}`` of everything registered in this process.

    A variant that evidence validates says so: "validated on NVIDIA H200".
    """
    return {
        op: {name: _status(op, name, variant) for name, variant in variants.items()}
        for op, variants in sorted(_registry.items())
    }


def _status(op: str, name: str, variant: Variant) -> str:
    waits = variant.status == NOT_VALIDATED
    return (evidence.status(op, name) if waits else None) or variant.status


def available_names(op: str) -> tuple[str, ...]:
    """Variants of ``op``; none where there is no such operation."""
    return tuple(_registry.get(op, ()))


def variant(op: str, name: str) -> Variant:
    """The variant ``name`` of ``op``; KeyError without it."""
    return _registry[op][name]


def use(mapping: Mapping[str, str] | None) -> None:
    """Sets the preferred variant per operation for this process, replacing earlier ones.

    ``use({"attention": "reference"})``; ``use({})`` or ``use(None)`` clears. Raises ValueError for
    an operation or a variant that does not exist.
    """
    chosen = dict(mapping or {})
    for op, name in chosen.items():
        if op not in _registry:
            raise ValueError(f"kernels.{op}: no such operation; accepted: {', '.join(_registry)}")
        _known(op, name)
    _preferences.clear()
    _preferences.update(chosen)


def preference(op: str) -> tuple[str, str] | None:
    """(variant, who asked for it) of rules 2 and 3, where that variant of ``op`` exists."""
    wishes = (
        (_preferences.get(op), "kernels section"),
        (os.environ.get("STACKWISE_IMPL"), "STACKWISE_IMPL"),
    )
    return next(((name, who) for name, who in wishes if name and name in _registry[op]), None)


def select(op: str, impl: str | None, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The function that runs ``op`` for these arguments.

    Raises ValueError when ``impl`` names a variant that is missing or does not cover the case.
    """
    variants = _registry[op]
    if impl is not None:
        variant = _known(op, impl)
        reason = _reason(variant, args, kwargs)
        if reason is not None:
            raise ValueError(
                f"impl={impl!r} does not cover this case of {op}: {reason}; "
                f"variants of {op}: {', '.join(variants)}"
            )
        return variant.function
    if _preferences or _WISH in _environment:
        for name in (_preferences.get(op), os.environ.get("STACKWISE_IMPL")):
            wanted = variants.get(name) if name else None
            if wanted is not None and _reason(wanted, args, kwargs) is None:
                return wanted.function
    if args and getattr(args[0], "is_cuda", False):
        name = evidence.preferred(op, args, kwargs)
        wanted = variants.get(name) if name else None
        if wanted is not None and _reason(wanted, args, kwargs) is None:
            return wanted.function
    for variant in variants.values():
        if (
            variant.preferred is not None
            and _reason(variant, args, kwargs) is None
            and variant.preferred(*args, **kwargs)
        ):
            return variant.function
    return variants["torch"].function


def _known(op: str, name: str) -> Variant:
    variants = _registry[op]
    if name not in variants:
        raise ValueError(f"impl={name!r} does not exist for {op}; available: {', '.join(variants)}")
    return variants[name]


def _reason(variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    return variant.unsupported(*args, **kwargs) if variant.unsupported is not None else None
