"""Rotary position settings between ``config.json`` and :class:`ModelConfig`.

Transformers up to 4 writes ``rope_theta`` and ``rope_scaling``, later versions one
``rope_parameters``; both are read and both are written.
"""

from __future__ import annotations

from typing import Any

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_registry import ConfigReader

# Fields of each scaling that change the frequencies: required ones, then optional ones.
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def read_rope(reader: ConfigReader) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of a checkpoint; scaling is None for plain RoPE.

    Defaults that Transformers derives from other fields are written out: the original length
    falls back to ``max_position_embeddings``, yarn's factor to the ratio of the two.
    """
    stored = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    if not isinstance(stored, dict) or any(isinstance(value, dict) for value in stored.values()):
        reader.refuse("rope_parameters", stored, "one set of parameters for all layers")
        return 10_000.0, None
    partial = stored.get("partial_rotary_factor", reader.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        reader.refuse("partial_rotary_factor", partial, "1.0")
    theta = float(stored.get("rope_theta") or reader.get("rope_theta") or 10_000.0)
    rope_type = stored.get("rope_type", stored.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type not in _SCALINGS:
        reader.refuse("rope_type", rope_type, ", ".join(["default", *_SCALINGS]))
        return theta, None
    return theta, _read_scaling(reader, rope_type, stored)


def _read_scaling(reader: ConfigReader, rope_type: str, stored: dict[str, Any]) -> dict[str, Any]:
    required, optional = _SCALINGS[rope_type]
    values = {name: stored[name] for name in required + optional if stored.get(name) is not None}
    if "original_max_position_embeddings" in required:
        length = reader.get("original_max_position_embeddings")
        longest = reader.get("max_position_embeddings")
        original = length or values.get("original_max_position_embeddings") or longest
        if original:
            values["original_max_position_embeddings"] = original
        if rope_type == "yarn" and "factor" not in values and original and longest:
            values["factor"] = longest / original
    missing = [name for name in required if name not in values]
    if missing:
        reader.faults.append(f"rope_scaling of type {rope_type} lacks {', '.join(missing)}")
    return {"rope_type": rope_type, **values}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The rope fields of ``config.json``, in the new and the old spelling."""
    scaling = dict(config.rope_scaling or {})
    rope_type = scaling.pop("rope_type", scaling.pop("type", "default"))
    parameters = {"rope_type": rope_type, "rope_theta": config.rope_theta, **scaling}
    return {
        "rope_parameters": parameters,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope_type == "default" else {"rope_type": rope_type, **scaling},
    }
