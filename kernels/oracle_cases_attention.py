"""The cases of the attention operations; see oracle_cases.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .oracle import Case, Maker
from .oracle_cases import TRAINING, cases_of

# One of the packed documents is empty, one a single token.
DOCUMENTS = (5, 1, 16, 0, 63, 113)


def _qkv(
    maker: Maker,
    batch: int,
    lq: int,
    lk: int,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (64, 64),
    biased: bool = False,
    masked: bool = False,
    sinks: bool = False,
    deterministic: bool = True,
    **options: Any,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "q": maker.normal(batch, lq, heads[0], widths[0]),
        "k": maker.normal(batch, lk, heads[1], widths[0]),
        "v": maker.normal(batch, lk, heads[1], widths[1]),
        "deterministic": deterministic,
    }
    if biased:
        bias = maker.normal(batch, 1, lk, dtype=torch.float32)
        bias[:, :, ::5] = -torch.inf
        made["key_bias"] = bias
    if masked:
        made["mask"] = maker.integers(4, batch, 1, lq, lk) > 0
        made["mask"][:, :, lq // 2] = False
    made |= {"sinks": maker.normal(heads[0])} if sinks else {}
    return made | options


def _packed_qkv(
    maker: Maker,
    lengths: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (64, 64),
    deterministic: bool = True,
    **options: Any,
) -> dict[str, Any]:
    keys = lengths if lengths_k is None else lengths_k
    made: dict[str, Any] = {
        "q": maker.normal(sum(lengths), heads[0], widths[0]),
        "k": maker.normal(sum(keys), heads[1], widths[0]),
        "v": maker.normal(sum(keys), heads[1], widths[1]),
        "cu_seqlens_q": maker.boundaries(*lengths),
        "deterministic": deterministic,
    }
    made |= {} if lengths_k is None else {"cu_seqlens_k": maker.boundaries(*lengths_k)}
    return made | options


@cases_of("attention")
def _attention() -> list[Case]:
    qkv = ("q", "k", "v")
    dense = partial(_qkv, batch=2)
    packed = partial(_packed_qkv, lengths=DOCUMENTS)
    proofs = {
        "1x1": partial(dense, lq=1, lk=1),
        "63x63 causal": partial(dense, lq=63, lk=63, causal=True),
        "113x239": partial(dense, lq=113, lk=239),
        "239x113 causal, hidden rows": partial(dense, lq=239, lk=113, causal=True),
        "width 128 causal": partial(dense, lq=130, lk=130, widths=(128, 128), causal=True),
        "widths 96 and 32": partial(dense, lq=65, lk=97, widths=(96, 32), heads=(6, 6)),
        "scale 0.1": partial(dense, lq=64, lk=64, scale=0.1),
        "window": partial(dense, lq=200, lk=200, window=(17, 5)),
        "causal window": partial(dense, lq=200, lk=200, window=(31, -1), causal=True),
        "key_bias": partial(dense, lq=113, lk=113, biased=True),
        "mask": partial(dense, lq=63, lk=77, masked=True),
        "softcap": partial(dense, lq=113, lk=113, softcap=5.0),
        "lse": partial(dense, lq=63, lk=113, causal=True, return_lse=True),
        "empty": partial(dense, lq=0, lk=0),
        "packed": packed,
        "packed causal": partial(packed, causal=True),
        "packed, other keys": partial(packed, lengths_k=(9, 1, 4, 7, 64, 100)),
        "packed window": partial(packed, window=(9, 3)),
    }
    found = [Case(label, build, qkv) for label, build in proofs.items()]
    sinks = partial(dense, lq=113, lk=113, sinks=True, causal=True)
    found.append(Case("sinks", sinks, (*qkv, "sinks")))
    for label in ("113x239", "packed causal"):
        build = partial(proofs[label], deterministic=False)
        found.append(Case(f"{label}, any order", build, qkv, repeatable=False))
    for length, heads, width in ((1024, (12, 12), 64), (4096, (32, 8), 128)):
        for causal in (False, True):
            options: dict[str, Any] = {"heads": heads, "widths": (width, width), "causal": causal}
            options["deterministic"] = False
            name = f"{heads[0]}/{heads[1]}x{width}{' causal' if causal else ''}"
            batch = 16384 // length
            build = partial(_qkv, batch=batch, lq=length, lk=length, **options)
            found.append(Case(f"{batch}x{length}x{name}", build, qkv, True, TRAINING))
            lengths = (length // 2, length // 8, length // 4, length // 8) * batch
            documents = partial(_packed_qkv, lengths=lengths, **options)
            found.append(Case(f"packed 16384x{name}", documents, qkv, True, TRAINING))
    return found


def _latent(
    maker: Maker,
    batch: int,
    lq: int,
    lk: int,
    heads: int = 3,
    latent: int = 32,
    widths: tuple[int, int, int] = (32, 16, 32),
    packed: bool = False,
    **options: Any,
) -> dict[str, Any]:
    nope, turned, value = widths

    def lead(length: int) -> tuple[int, ...]:
        return (batch * length,) if packed else (batch, length)

    made: dict[str, Any] = {
        "q_nope": maker.normal(*lead(lq), heads, nope),
        "q_rope": maker.normal(*lead(lq), heads, turned),
        "kv_latent": maker.normal(*lead(lk), latent),
        "k_rope": maker.normal(*lead(lk), turned),
        "w_uk": maker.normal(heads * nope, latent) * latent**-0.5,
        "w_uv": maker.normal(heads * value, latent) * latent**-0.5,
    }
    made |= {"cu_seqlens_q": maker.boundaries(*[lq] * batch)} if packed else {}
    return made | options


@cases_of("mla_attention")
def _mla_attention() -> list[Case]:
    wanted = ("q_nope", "q_rope", "kv_latent", "k_rope", "w_uk", "w_uv")
    found = [
        Case("63x63 causal", partial(_latent, batch=2, lq=63, lk=63, causal=True), wanted),
        Case("1x113", partial(_latent, batch=2, lq=1, lk=113), wanted),
        Case("packed", partial(_latent, batch=3, lq=37, lk=37, packed=True), wanted),
    ]
    sizes: dict[str, Any] = {"heads": 16, "latent": 512, "widths": (128, 64, 128), "causal": True}
    build = partial(_latent, batch=4, lq=2048, lk=2048, **sizes)
    return [*found, Case("4x2048x16 causal", build, wanted, True, TRAINING)]


@cases_of("kernel_attention")
def _kernel_attention() -> list[Case]:
    qkv = ("q", "k", "v")
    proofs: dict[str, Any] = {}
    for kernel in ("gaussian", "laplacian"):
        dense = partial(_qkv, batch=2, widths=(32, 32), kernel=kernel, bandwidth=4.0)
        packed = partial(_packed_qkv, lengths=DOCUMENTS, kernel=kernel, bandwidth=4.0)
        proofs |= {
            f"{kernel} 113x63": partial(dense, lq=113, lk=63),
            f"{kernel} causal": partial(dense, lq=97, lk=97, causal=True),
            f"{kernel} not normalised": partial(dense, lq=63, lk=63, normalize=False),
            f"{kernel} key_bias": partial(dense, lq=63, lk=77, biased=True),
            f"{kernel} window": partial(dense, lq=113, lk=113, window=(17, 5)),
            f"{kernel} packed causal": partial(packed, causal=True),
        }
    found = [Case(label, build, qkv) for label, build in proofs.items()]
    for kernel in ("gaussian", "laplacian"):
        build = partial(
            _qkv, batch=8, lq=1024, lk=1024, heads=(12, 12), kernel=kernel, bandwidth=8.0,
            deterministic=False,
        )  # fmt: skip
        found.append(Case(f"8x1024x12x64 {kernel}", build, qkv, True, TRAINING))
    return found


@cases_of("linear_attention")
def _linear_attention() -> list[Case]:
    qkv = ("q", "k", "v")
    proofs: dict[str, Any] = {}
    for name in ("elu", "relu", "exp"):
        dense = partial(_qkv, batch=2, widths=(32, 32), feature_map=name)
        proofs |= {
            f"{name} 113x63": partial(dense, lq=113, lk=63),
            f"{name} causal": partial(dense, lq=239, lk=239, causal=True),
            f"{name} packed": partial(
                _packed_qkv, lengths=DOCUMENTS, feature_map=name, causal=True
            ),
        }
    found = [Case(label, build, qkv) for label, build in proofs.items()]
    for causal in (False, True):
        options: dict[str, Any] = {"feature_map": "elu", "causal": causal, "heads": (12, 12)}
        options["deterministic"] = False
        build = partial(_qkv, batch=4, lq=4096, lk=4096, **options)
        label = f"4x4096x12x64 elu{' causal' if causal else ''}"
        found.append(Case(label, build, qkv, True, TRAINING))
    return found
