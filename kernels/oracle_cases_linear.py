"""The cases of the linear layers over dense and quantised weights; see oracle_cases.py."""

from __future__ import annotations

from functools import partial
from typing import Any

from .oracle import Case, Maker
from .oracle_cases import TRAINING, cases_of
from .quantize import quantize

FORMATS = ("nvfp4", "mxfp4", "nf4", "fp8_tensor", "fp8_row", "fp8_block", "mxfp8")


def _weight(maker: Maker, rows: int, width: int, format: str | None) -> Any:
    weight = maker.normal(rows, width) * width**-0.5
    return weight if format is None else quantize(weight, format)


def _linear(
    maker: Maker, rows: int, width: int, out: int, format: str | None, bias: bool = False
) -> dict[str, Any]:
    made = {"x": maker.normal(rows, width), "weight": _weight(maker, out, width, format)}
    return made | ({"bias": maker.normal(out)} if bias else {})


@cases_of("quantized_linear")
def _quantized_linear() -> list[Case]:
    found = []
    for format in FORMATS:
        build = partial(_linear, rows=63, width=256, out=96, format=format)
        found.append(Case(f"63x256x96 {format}", build, ("x",)))
        biased = partial(_linear, rows=1, width=239, out=113, format=format, bias=True)
        found.append(Case(f"1x239x113 {format}, bias", biased, ("x", "bias")))
        build = partial(_linear, rows=8192, width=4096, out=4096, format=format)
        found.append(Case(f"8192x4096x4096 {format}", build, ("x",), True, TRAINING))
    return found


def _adapted(
    maker: Maker, rows: int, width: int, out: int, rank: int, format: str | None
) -> dict[str, Any]:
    made = _linear(maker, rows, width, out, format)
    adapters = maker.normal(rank, width) * width**-0.5, maker.normal(out, rank) * rank**-0.5
    return made | {"lora_a": adapters[0], "lora_b": adapters[1], "scaling": 2.0}


@cases_of("lora_linear")
def _lora_linear() -> list[Case]:
    wanted = ("x", "lora_a", "lora_b")
    found = []
    for format in (None, "nvfp4", "nf4", "fp8_row"):
        name = format or "dense"
        build = partial(_adapted, rows=63, width=256, out=113, rank=8, format=format)
        found.append(Case(f"63x256x113 rank 8 {name}", build, wanted))
        build = partial(_adapted, rows=8192, width=4096, out=4096, rank=16, format=format)
        found.append(Case(f"8192x4096x4096 rank 16 {name}", build, wanted, True, TRAINING))
    return found


def _mlp(maker: Maker, rows: int, width: int, inner: int, format: str | None) -> dict[str, Any]:
    return {
        "x": maker.normal(rows, width),
        "w_gate": _weight(maker, inner, width, format),
        "w_up": _weight(maker, inner, width, format),
        "w_down": _weight(maker, width, inner, format),
    }


@cases_of("swiglu_mlp")
def _swiglu_mlp() -> list[Case]:
    found = []
    for format in (None, "nvfp4", "fp8_row"):
        wanted = ("x", "w_gate", "w_up", "w_down") if format is None else ("x",)
        name = format or "dense"
        build = partial(_mlp, rows=63, width=96, inner=160, format=format)
        found.append(Case(f"63x96x160 {name}", build, wanted))
        build = partial(_mlp, rows=8192, width=2048, inner=5632, format=format)
        found.append(Case(f"8192x2048x5632 {name}", build, wanted, True, TRAINING))
    return found
