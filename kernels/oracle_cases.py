"""The cases on which variants are proven and raced, one function per operation.

A new operation: one function, decorated with its name, here or in oracle_cases_attention.py and
oracle_cases_linear.py. The proofs are small and odd (rows and
widths that no tile divides, one row, none, strided views, every option); the races are sizes that
training runs. Tensors hold random values, never zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .oracle import Case, Maker

TRAINING = ("bf16",)

_cases: dict[str, Callable[[], list[Case]]] = {}

Function = Callable[[], list[Case]]


def cases_of(op: str) -> Callable[[Function], Function]:
    """Decorator: the function lists the cases of ``op``."""

    def add(function: Function) -> Function:
        _cases[op] = function
        return function

    return add


def operations() -> tuple[str, ...]:
    """Operations that have cases."""
    return tuple(sorted(_all()))


def _all() -> dict[str, Function]:
    from . import oracle_cases_attention, oracle_cases_linear  # noqa: F401 - they add their own

    return _cases


def proofs(op: str) -> list[Case]:
    """Small odd cases."""
    return [case for case in _all()[op]() if not case.race]


def races(op: str) -> list[Case]:
    """Sizes that users run."""
    return [case for case in _all()[op]() if case.race]


def _norm(
    maker: Maker,
    rows: int,
    width: int,
    residual: bool = False,
    bias: bool = False,
    strided: bool = False,
    offset: float | None = None,
) -> dict[str, Any]:
    x = maker.normal(rows, 2 * width)[:, :width] if strided else maker.normal(rows, width)
    made: dict[str, Any] = {"x": x, "weight": maker.normal(width)}
    made |= {"bias": maker.normal(width)} if bias else {}
    made |= {"residual": maker.normal(rows, width)} if residual else {}
    return made | ({} if offset is None else {"weight_offset": offset})


_NORM_SIZES = ((1, 1), (1, 1000), (63, 113), (239, 768), (5, 4096), (1000, 64), (0, 64))
_NORM_RACES = ((8192, 768), (8192, 2048), (8192, 4096), (4096, 8192), (1024, 1024))


def _norm_cases(bias: bool) -> list[Case]:
    wanted = ("x", "weight", "bias") if bias else ("x", "weight")
    both = (*wanted, "residual")
    found = [
        Case(f"{rows}x{width}", partial(_norm, rows=rows, width=width, bias=bias), wanted)
        for rows, width in _NORM_SIZES
    ]
    build = partial(_norm, rows=113, width=1000, bias=bias)
    found.append(Case("113x1000 strided", partial(build, strided=True), wanted))
    found.append(Case("113x1000 residual", partial(build, residual=True), both))
    for rows, width in _NORM_RACES:
        build = partial(_norm, rows=rows, width=width, bias=bias)
        found.append(Case(f"{rows}x{width}", build, wanted, True, TRAINING))
        added = partial(build, residual=True)
        found.append(Case(f"{rows}x{width} residual", added, both, True, TRAINING))
    return found


@cases_of("rms_norm")
def _rms_norm() -> list[Case]:
    offset = partial(_norm, rows=63, width=239, offset=1.0)
    return [*_norm_cases(False), Case("63x239 weight_offset 1", offset, ("x", "weight"))]


@cases_of("layer_norm")
def _layer_norm() -> list[Case]:
    plain = partial(_norm, rows=63, width=239)
    return [*_norm_cases(True), Case("63x239 without bias", plain, ("x", "weight"))]


def _rope_inputs(
    maker: Maker,
    batch: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    rotated: int,
    interleaved: bool,
    own_tables: bool = False,
    strided: bool = False,
) -> dict[str, Any]:
    q, k = (maker.normal(batch, length, h, width) for h in heads)
    if strided:
        fused = maker.normal(batch, length, sum(heads), width)
        q, k = fused[:, :, : heads[0]], fused[:, :, heads[0] :]
    lead = (batch, length) if own_tables else (length,)
    angle = maker.normal(*lead, rotated, dtype=torch.float32)
    return {"q": q, "k": k, "cos": angle.cos(), "sin": angle.sin(), "interleaved": interleaved}


@cases_of("rope")
def _rope() -> list[Case]:
    found = []
    for interleaved in (False, True):
        name = "interleaved" if interleaved else "half-split"
        for label, build in {
            "one token": partial(_rope_inputs, length=1, heads=(4, 4), width=64, rotated=64),
            "partial": partial(_rope_inputs, length=63, heads=(9, 3), width=40, rotated=24),
            "one pair": partial(_rope_inputs, length=113, heads=(2, 1), width=6, rotated=2),
            "strided, own tables": partial(
                _rope_inputs, length=239, heads=(5, 2), width=20, rotated=20,
                own_tables=True, strided=True,
            ),
            "empty": partial(_rope_inputs, length=0, heads=(2, 2), width=8, rotated=8),
        }.items():  # fmt: skip
            filled = partial(build, batch=2, interleaved=interleaved)
            found.append(Case(f"{label} {name}", filled, ("q", "k")))
        for batch, heads, width in ((4, (12, 12), 64), (4, (32, 8), 128)):
            build = partial(
                _rope_inputs, batch=batch, length=2048, heads=heads, width=width, rotated=width,
                interleaved=interleaved,
            )  # fmt: skip
            label = f"4x2048x{heads[0]}/{heads[1]}x{width} {name}"
            found.append(Case(label, build, ("q", "k"), True, TRAINING))
    return found


_GATED_SIZES = ((1, 1), (63, 113), (239, 1000), (7, 4096), (0, 64))
_GATED_RACES = ((8192, 3072), (4096, 11008), (1024, 2048))


def _gated(
    maker: Maker, rows: int, width: int, fused: bool = False, **options: Any
) -> dict[str, Any]:
    if fused:
        both = maker.normal(rows, 2 * width)
        return {"gate": both[:, :width], "up": both[:, width:], **options}
    return {"gate": maker.normal(rows, width), "up": maker.normal(rows, width), **options}


def _gated_cases(**options: Any) -> list[Case]:
    name = "".join(f" {value}" for value in options.values())
    sizes = [(r, w, False) for r, w in _GATED_SIZES] + [(113, 96, True)]
    found = [
        Case(
            f"{rows}x{width}{' fused' if fused else ''}{name}",
            partial(_gated, rows=rows, width=width, fused=fused, **options),
            ("gate", "up"),
        )
        for rows, width, fused in sizes
    ]
    for rows, width in _GATED_RACES:
        build = partial(_gated, rows=rows, width=width, **options)
        found.append(Case(f"{rows}x{width}{name}", build, ("gate", "up"), True, TRAINING))
    return found


@cases_of("swiglu")
def _swiglu() -> list[Case]:
    return _gated_cases()


@cases_of("geglu")
def _geglu() -> list[Case]:
    return [*_gated_cases(approximate="none"), *_gated_cases(approximate="tanh")]


def _biased(
    maker: Maker, rows: int, width: int, approximate: str, bias: bool = True
) -> dict[str, Any]:
    added = maker.normal(width) if bias else None
    return {"x": maker.normal(rows, width), "bias": added, "approximate": approximate}


@cases_of("bias_gelu")
def _bias_gelu() -> list[Case]:
    found = []
    for approximate in ("tanh", "none"):
        for rows, width in _GATED_SIZES:
            build = partial(_biased, rows=rows, width=width, approximate=approximate)
            found.append(Case(f"{rows}x{width} {approximate}", build, ("x", "bias")))
        build = partial(_biased, rows=63, width=113, approximate=approximate, bias=False)
        found.append(Case(f"63x113 {approximate} without bias", build, ("x",)))
    for rows, width in ((8192, 3072), (8192, 8192), (1024, 3072)):
        build = partial(_biased, rows=rows, width=width, approximate="tanh")
        found.append(Case(f"{rows}x{width} tanh", build, ("x", "bias"), True, TRAINING))
    return found


def _loss(
    maker: Maker,
    n: int,
    width: int,
    vocab: int,
    share: float = 1.0,
    bias: bool = False,
    weighted: bool = False,
    **options: Any,
) -> dict[str, Any]:
    target = maker.integers(vocab, n)
    if share == 1.0 and n:
        target[:: max(n // 3, 1)] = -100
    made: dict[str, Any] = {
        "input": maker.normal(n, width),
        "linear_weight": maker.normal(vocab, width) * width**-0.5,
        "target": target,
    }
    if share < 1.0:
        order = torch.rand(n, generator=maker.generator, device=maker.device).argsort()
        made["rows"] = order[: int(n * share)].sort().values
    made |= {"linear_bias": maker.normal(vocab)} if bias else {}
    made |= {"token_weight": maker.normal(n, dtype=torch.float32).abs()} if weighted else {}
    return made | options


@cases_of("linear_cross_entropy")
def _linear_cross_entropy() -> list[Case]:
    wanted = ("input", "linear_weight")
    build = partial(_loss, n=113, width=96, vocab=1000)
    everything = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
    found = [
        Case("113x96x1000", build, wanted),
        Case("1x16x3", partial(_loss, n=1, width=16, vocab=3, reduction="sum"), wanted),
        Case("0x16x63", partial(_loss, n=0, width=16, vocab=63), wanted),
        Case("rows of 239x63x777", partial(_loss, n=239, width=63, vocab=777, share=0.4), wanted),
        Case("every loss", partial(build, reduction="none", weighted=True), wanted),
        Case(
            "smoothing, z-loss, softcap, bias, weights",
            partial(build, bias=True, weighted=True, reduction="sum", **everything),
            (*wanted, "linear_bias"),
        ),
    ]
    for n, width, vocab, share in ((4096, 768, 50257, 0.5), (8192, 2048, 32000, 0.15),
                                   (8192, 4096, 128256, 0.5)):  # fmt: skip
        build = partial(_loss, n=n, width=width, vocab=vocab, share=share)
        label = f"{share:.0%} of {n}x{width}x{vocab}"
        found.append(Case(label, build, wanted, True, TRAINING))
    return found


def _projected(maker: Maker, rows: int, width: int, m: int, kind: str) -> dict[str, Any]:
    features: Tensor = maker.normal(m, width)
    return {"x": maker.normal(rows, width) * width**-0.5, "features": features, "kind": kind}


@cases_of("random_features")
def _random_features() -> list[Case]:
    wanted = ("x", "features")
    found = []
    for kind in ("cos", "cossin", "positive"):
        for rows, width, m in ((1, 1, 1), (113, 63, 39), (239, 64, 128), (0, 16, 8)):
            build = partial(_projected, rows=rows, width=width, m=m, kind=kind)
            found.append(Case(f"{rows}x{width}x{m} {kind}", build, wanted))
    for kind in ("cos", "positive"):
        build = partial(_projected, rows=98304, width=64, m=128, kind=kind)
        found.append(Case(f"98304x64x128 {kind}", build, wanted, True, TRAINING))
    return found
