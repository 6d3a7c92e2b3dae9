"""Cross-field rules of the model section; see ``rules.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stackwise.config.kernel_pairs import pair_fault
from stackwise.config.schema import ModelConfig, StackWiseConfig

Fault = tuple[str, str]

_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def attention_fields(model: ModelConfig) -> dict[str, Any]:
    """The attention fields as they are after ``attention_preset`` has been applied."""
    fields = {
        name: getattr(model, name)
        for name in ("attention_type", "attention_mode", "mla_form", "kernel_form", "kernel_type")
    }
    if model.attention_preset is not None:
        from stackwise.model.resolve import ATTENTION_PRESETS

        fields |= ATTENTION_PRESETS[model.attention_preset]
    return fields


def preset_note(model: ModelConfig) -> str:
    """Words that name the preset as the origin of an attention field, for messages."""
    preset = model.attention_preset
    return "" if preset in (None, "custom") else f" (set by model.attention_preset: {preset})"


def uses_rope(model: ModelConfig) -> bool:
    """Whether q and k carry rotary positions."""
    if model.use_rope is not None:
        return model.use_rope
    return model.architecture == "llama" or _latent(model)


def _latent(model: ModelConfig) -> bool:
    fields = attention_fields(model)
    return bool(fields["attention_type"] == "mla" and fields["mla_form"] == "deepseek")


def _shape_is_own(config: StackWiseConfig) -> bool:
    """False when ``init_from`` brings the shape and the fields here are not used."""
    return config.model.init_from is None


def heads_divide_width(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    if _shape_is_own(config) and model.head_dim is None and model.d_model % model.n_heads:
        yield (
            "model.n_heads",
            f"{model.n_heads} heads do not divide model.d_model {model.d_model}; accepted: a "
            "divisor of it, or any number with model.head_dim set",
        )


def kv_heads_divide_heads(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    if not _shape_is_own(config) or model.n_kv_heads is None:
        return
    if model.n_heads % model.n_kv_heads:
        yield (
            "model.n_kv_heads",
            f"{model.n_kv_heads} key/value heads do not divide model.n_heads {model.n_heads}; "
            "accepted: a divisor of it, or null",
        )
    elif _latent(model) and model.n_kv_heads != model.n_heads:
        yield (
            "model.n_kv_heads",
            f"got {model.n_kv_heads} with mla_form: deepseek, whose heads share one latent; "
            f"accepted: null or model.n_heads ({model.n_heads}); mla_form: low_rank takes fewer",
        )


def rotary_dims_are_even(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    if not _shape_is_own(config) or not uses_rope(model):
        return
    name, dims = "head_dim", model.head_dim
    if attention_fields(model)["attention_type"] == "mla":
        if _latent(model):
            name, dims = "mla_rope_dim", model.mla_rope_dim
        elif model.mla_nope_dim is not None:
            name, dims = "mla_nope_dim", model.mla_nope_dim
    if dims is None:
        dims = model.d_model // model.n_heads
    if dims % 2:
        yield (
            f"model.{name}",
            f"rotary positions rotate pairs and {dims} dimensions are odd; accepted: an even "
            "number, or model.use_rope: false",
        )


def deepseek_needs_rope(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    if _shape_is_own(config) and _latent(model) and not uses_rope(model):
        yield (
            "model.use_rope",
            "got false; mla_form: deepseek has rotary positions; accepted: true or null, or "
            "mla_form: low_rank",
        )


def rope_scaling_is_known(config: StackWiseConfig) -> Iterator[Fault]:
    scaling = config.model.rope_scaling
    if scaling is None:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str) or kind not in _ROPE_PARAMETERS:
        yield (
            "model.rope_scaling",
            f"got rope_type {kind!r}; accepted: {', '.join(_ROPE_PARAMETERS)}",
        )
        return
    for name in _ROPE_PARAMETERS[kind]:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            yield (
                "model.rope_scaling",
                f"{name} is {value!r}; rope_type {kind} needs a number above 0 there",
            )
    if not uses_rope(config.model):
        yield ("model.rope_scaling", "got a scaling with model.use_rope false; accepted: null")


def kernel_pair_has_a_meaning(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    fields = attention_fields(model)
    form, kind = fields["kernel_form"], fields["kernel_type"]
    fault = pair_fault(form, kind, model.kernel_distance)
    if fault is not None:
        name, reason = fault.split(": ", 1)
        yield (f"model.{name}", f"{reason}{preset_note(model)}")


def linear_form_has_no_window(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    fields = attention_fields(model)
    linear = fields["attention_type"] == "kernel" and fields["kernel_form"] == "linear"
    if linear and model.sliding_window is not None:
        yield (
            "model.sliding_window",
            f"got {model.sliding_window} with kernel_form: linear, whose state holds every key; "
            "accepted: null",
        )


def up_projection_belongs_to_a_gate(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    ffn = model.ffn or ("gelu" if model.architecture == "gpt2" else "swiglu")
    if _shape_is_own(config) and model.freeze_up_proj and ffn == "gelu":
        yield (
            "model.freeze_up_proj",
            "got true, but the gelu feed-forward has no gate: its up projection is all of its "
            "input; accepted: false, or model.ffn: swiglu or geglu",
        )


def experts_fit_their_groups(config: StackWiseConfig) -> Iterator[Fault]:
    moe = config.model.moe
    if moe is None:
        return
    ffn = config.model.ffn or ("gelu" if config.model.architecture == "gpt2" else "swiglu")
    if ffn != "swiglu":
        yield ("model.moe", f"experts are swiglu and model.ffn is {ffn}; accepted: swiglu, or null")
    if moe.n_routed_experts % moe.n_groups:
        yield (
            "model.moe.n_groups",
            f"{moe.n_groups} groups do not divide {moe.n_routed_experts} routed experts; "
            "accepted: a divisor",
        )
    elif moe.groups_per_token > moe.n_groups:
        yield (
            "model.moe.groups_per_token",
            f"got {moe.groups_per_token} of {moe.n_groups} groups; accepted: 1 to {moe.n_groups}",
        )
    else:
        reachable = moe.groups_per_token * (moe.n_routed_experts // moe.n_groups)
        if moe.experts_per_token > reachable:
            yield (
                "model.moe.experts_per_token",
                f"got {moe.experts_per_token}, but {moe.groups_per_token} groups hold {reachable} "
                f"experts; accepted: 1 to {reachable}",
            )


def rows_fit_the_positions(config: StackWiseConfig) -> Iterator[Fault]:
    longest = config.model.max_position_embeddings
    if _shape_is_own(config) and longest is not None and config.training.seq_len > longest:
        yield (
            "training.seq_len",
            f"rows of {config.training.seq_len} tokens exceed model.max_position_embeddings "
            f"{longest}; accepted: at most {longest}, or a larger or null table",
        )


def embedding_source_is_usable(config: StackWiseConfig) -> Iterator[Fault]:
    source = config.model.tokenizer_embedding
    if source.family is None:
        return
    path = "model.tokenizer_embedding.family"
    if config.model.init_from is not None:
        yield (path, "model.init_from brings its own embeddings; accepted: null beside it")
    if config.data.tokenizer_path is None:
        yield (
            path,
            "the rows of its matrix belong to that model's tokenizer, and none is named; set "
            "data.tokenizer_path to it",
        )
    width = source.width
    if config.model.tie_embeddings and width is not None and width != config.model.d_model:
        yield (
            "model.tie_embeddings",
            f"the matrix of {source.family} is {width} wide and model.d_model is "
            f"{config.model.d_model}: its adapter stands between embeddings and blocks and the "
            "head cannot share it; accepted: false",
        )


def mask_id_is_in_the_vocabulary(config: StackWiseConfig) -> Iterator[Fault]:
    size, mask = config.model.vocab_size, config.data.special_mask_id
    if size is not None and mask is not None and mask >= size:
        yield (
            "data.special_mask_id",
            f"got {mask} with model.vocab_size {size}; accepted: below it, or null",
        )


MODEL_RULES = (
    heads_divide_width,
    kv_heads_divide_heads,
    rotary_dims_are_even,
    deepseek_needs_rope,
    rope_scaling_is_known,
    kernel_pair_has_a_meaning,
    linear_form_has_no_window,
    up_projection_belongs_to_a_gate,
    experts_fit_their_groups,
    rows_fit_the_positions,
    embedding_source_is_usable,
    mask_id_is_in_the_vocabulary,
)
