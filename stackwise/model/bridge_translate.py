"""Between a checkpoint's ``config.json`` and a :class:`ModelConfig`, and the choice of family.

What Transformers' own fields cannot say travels in ``config.json`` under ``"stackwise"``:
``attention_mode``, ``shift``, ``mask_token_id``, and under ``"config"`` the training-only fields
of ModelConfig that differ from what the family's fields give.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_registry import ConfigReader, Family, families, find_family
from stackwise.model.resolve import resolve_model_config

EXTRAS = "stackwise"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MODES = ("causal", "bidirectional")
# Fields that change training or masking, not the function the weights compute.
_CARRIED = ("dropout", "freeze_up_proj", "init_std")
# Fields that say where a model came from, and those compared by other means: the attention mode
# is an extra of its own, rope_scaling is read back with its defaults written out.
_NOT_COMPARED = (
    "architecture",
    "init_from",
    "attention_preset",
    "attention_mode",
    "tokenizer_embedding",
    "rope_scaling",
)


@dataclass(frozen=True)
class Description:
    """What a ``config.json`` says. ``shift`` and ``attention_mode`` are a causal language model's
    unless StackWise wrote otherwise; ``token_ids`` holds the special ids that are set."""

    family: Family
    config: ModelConfig
    attention_mode: str = "causal"
    shift: bool = True
    token_ids: dict[str, Any] = field(default_factory=dict)


def read_description(values: dict[str, Any]) -> Description:
    """Translates ``config.json``. ValueError listing every unsupported feature it asks for."""
    family = find_family(values)
    reader = ConfigReader(values, family.model_type)
    if values.get("quantization_config"):
        method = values["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        reader.refuse("quantization_config", method, "weights in a plain float format")
    config = family.read(reader)
    reader.check()
    extras = _read_extras(values.get(EXTRAS) or {})
    config = dataclasses.replace(config, **extras.get("config", {}))
    token_ids = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    if extras.get("mask_token_id") is not None:
        token_ids["mask_token_id"] = extras["mask_token_id"]
    mode = extras.get("attention_mode", "causal")
    config = resolve_model_config(dataclasses.replace(config, attention_mode=mode))
    return Description(family, config, mode, bool(extras.get("shift", True)), token_ids)


def _read_extras(extras: Any) -> dict[str, Any]:
    known = ("attention_mode", "shift", "mask_token_id", "config")
    if not isinstance(extras, dict) or extras.keys() - set(known):
        raise ValueError(f"{EXTRAS} in config.json is {extras!r}; known fields: {', '.join(known)}")
    if extras.get("attention_mode", MODES[0]) not in MODES:
        raise ValueError(
            f"{EXTRAS}.attention_mode in config.json is {extras['attention_mode']!r}; "
            f"accepted: {' or '.join(MODES)}"
        )
    unknown = set(extras.get("config", {})) - set(_CARRIED)
    if unknown:
        raise ValueError(
            f"{EXTRAS}.config in config.json has {sorted(unknown)}; accepted: {', '.join(_CARRIED)}"
        )
    return extras


def choose_family(config: ModelConfig, preferred: str | None = None) -> Family:
    """The family whose Transformers class computes what ``config`` says, ``preferred`` first.

    ValueError when there is none: it names the nearest class, what differs, and the format that
    does hold the model.
    """
    ordered = sorted(families().values(), key=lambda family: family.model_type != preferred)
    differences: list[tuple[Family, list[str]]] = []
    for family in ordered:
        faults = inexpressible(config, family)
        if not faults:
            return family
        differences.append((family, faults))
    # Another kind of attention is further away than any number of other fields.
    nearest, faults = min(
        differences,
        key=lambda item: (any("attention_type" in fault for fault in item[1]), len(item[1])),
    )
    listed = "\n".join(f"  - {fault}" for fault in faults)
    raise ValueError(
        "Transformers has no class for this model. The nearest, "
        f"{nearest.architecture}, differs:\n{listed}\n"
        "Save it in StackWise's own format instead: RunStore.save_model (the model/ folder of "
        "every finished run) holds any model, and load_pretrained reads it"
    )


def inexpressible(config: ModelConfig, family: Family) -> list[str]:
    """What the family's ``config.json`` cannot say about ``config``, found by writing it and
    reading it back."""
    reader = ConfigReader(family.write(config), family.model_type)
    read_back = resolve_model_config(family.read(reader))
    faults = list(reader.faults) + family.faults(config)
    for name in _compared_fields(config, read_back):
        ours, theirs = getattr(config, name), getattr(read_back, name)
        if ours != theirs:
            faults.append(f"model.{name} is {ours!r}, there it is {theirs!r}")
    return faults


def _compared_fields(config: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields that change the function; those another field switches off are left out."""
    skipped = {*_NOT_COMPARED, *_CARRIED}
    kinds = {config.attention_type, other.attention_type}
    if kinds <= {"standard", "gqa"}:  # the key/value heads say which
        skipped.add("attention_type")
    if "mla" in kinds:
        skipped |= {"head_dim", "n_kv_heads"}
    if not config.use_rope and not other.use_rope:
        skipped |= {"rope_theta", "rope_interleaved"}
    names = []
    for item in dataclasses.fields(ModelConfig):
        unused = (item.name.startswith("mla_") and kinds != {"mla"}) or (
            item.name.startswith("kernel_") and kinds != {"kernel"}
        )
        if item.name not in skipped and not unused:
            names.append(item.name)
    return names


def write_description(description: Description, architecture_dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model, extras included; ``architecture_dtype`` as in "float32"."""
    family, config = description.family, description.config
    fields = family.write(config)
    read_back = family.read(ConfigReader(fields, family.model_type))
    carried = {
        name: getattr(config, name)
        for name in _CARRIED
        if getattr(config, name) != getattr(read_back, name)
    }
    extras: dict[str, Any] = {
        "attention_mode": description.attention_mode,
        "shift": description.shift,
    }
    if description.token_ids.get("mask_token_id") is not None:
        extras["mask_token_id"] = description.token_ids["mask_token_id"]
    if carried:
        extras["config"] = carried
    return {
        **fields,
        # Null rather than absent: the classes' own defaults are ids of other vocabularies.
        **{name: description.token_ids.get(name) for name in TOKEN_IDS},
        "architectures": [family.architecture],
        "dtype": architecture_dtype,
        "torch_dtype": architecture_dtype,
        "model_type": family.model_type,
        EXTRAS: extras,
    }
