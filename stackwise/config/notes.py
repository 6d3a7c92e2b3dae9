"""What a valid configuration decides without saying so; the trainer prints these lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stackwise.config.fields import all_fields, format_value
from stackwise.config.model_rules import attention_fields, uses_rope
from stackwise.config.schema import StackWiseConfig
from stackwise.config.training_rules import fixed_masks_per_stage, stage_count


def notes(config: StackWiseConfig) -> list[str]:
    """Decisions and settings without effect of a valid configuration, one sentence each."""
    return [
        *_tied_head(config),
        *_bound(config),
        *_masks(config),
        *_schedule(config),
        *_cache(config),
        *_vocabulary(config),
        *_without_effect(config),
    ]


def _tied_head(config: StackWiseConfig) -> Iterator[str]:
    if not config.model.tie_embeddings or config.training.train_head == "never":
        return
    when = config.training.train_embeddings
    if config.model.tokenizer_embedding.freeze_embeddings:
        yield "the head is tied to frozen embeddings, so it does not train either"
    elif when == "never":
        yield "the head is tied to embeddings that never train, so it does not train either"
    elif when == "first" and config.training.train_head == "all" and stage_count(config) > 1:
        reason = (
            "cached activations come from them"
            if config.training.activation_cache
            else ("the frozen blocks were trained on them")
        )
        yield (
            "the head is tied to the embeddings, which train in the first stage only "
            f"({reason}): it is frozen after it. Untie it (model.tie_embeddings: false) to train "
            "it in every stage"
        )


def _bound(config: StackWiseConfig) -> Iterator[str]:
    objective = config.objective
    if objective.type != "diffusion":
        return
    low, high = objective.mask_fraction_min, objective.mask_fraction_max
    per_stage = fixed_masks_per_stage(config)
    if per_stage is not None:
        yield (
            f"{per_stage}: every stage trains on one mask fraction, and the training loss is not a "
            "likelihood bound; `stackwise eval` measures the bound over all fractions"
        )
    elif low > 1e-3 or high < 1 or objective.weighting == "plain":
        yield (
            f"masks of {low:g} to {high:g} with weighting {objective.weighting}: the training loss "
            "is not a likelihood bound; `stackwise eval` measures the bound over (0, 1]"
        )


def _masks(config: StackWiseConfig) -> Iterator[str]:
    per_stage = fixed_masks_per_stage(config)
    stages = stage_count(config)
    if per_stage is None:
        return
    if stages > 1:
        yield f"{per_stage}: the masks change per stage, so the frozen prefix is recomputed"
    if config.objective.time_step_masking:
        given = config.objective.time_step_mask_fractions
        bins = config.objective.num_time_steps
        if isinstance(given, dict):
            bins = max(bins, max(given) + 1)
        if bins > stages:
            yield (
                f"{bins} time steps for {stages} stages: the last {bins - stages} fractions are "
                "not used"
            )


def _schedule(config: StackWiseConfig) -> Iterator[str]:
    training, layers, stages = config.training, config.model.n_layers, stage_count(config)
    if config.model.init_from is None and training.mode != "end_to_end":
        size = 1 if training.mode == "layerwise" else training.block_size
        if stages * size < layers:
            yield (
                f"training.total_blocks {stages}: blocks {stages * size} to {layers - 1} do not "
                "train"
            )
        elif layers % size:
            yield f"the last stage has {layers % size} of training.block_size {size} blocks"
    if training.max_steps is not None and training.warmup_steps > training.max_steps // stages // 2:
        yield (
            f"training.warmup_steps {training.warmup_steps}: shortened to half of a stage of "
            f"{training.max_steps // stages} steps"
        )
    if config.model.attention_type == "gqa" and config.model.n_kv_heads == config.model.n_heads:
        yield "attention_type: gqa with as many key/value heads as heads is standard attention"


def _cache(config: StackWiseConfig) -> Iterator[str]:
    training = config.training
    if not training.activation_cache:
        return
    if stage_count(config) == 1:
        yield "training.activation_cache: the only stage starts from tokens and reads no cache"
    elif config.objective.type != "clm":
        yield (
            f"cached stages repeat {training.cache_masks} mask draw(s) per row, cycled by epoch "
            "(training.cache_masks)"
        )
    if training.cache_dtype == "bfloat16":
        yield (
            "training.cache_dtype bfloat16 rounds a float32 residual stream: cached and recomputed "
            "losses then differ"
        )


def _vocabulary(config: StackWiseConfig) -> Iterator[str]:
    size, tokens = config.model.vocab_size, config.data.tokenizer_vocab_size
    own = config.data.tokenizer_path is None and config.model.init_from is None
    if own and size is not None and size < tokens:
        yield (
            f"model.vocab_size {size} is below data.tokenizer_vocab_size {tokens}: training stops "
            "when the tokenizer learns more tokens than the model has"
        )


def _without_effect(config: StackWiseConfig) -> Iterator[str]:
    """Fields set to something else than their default that nothing reads in this combination."""
    for reason, applies, paths in _unread(config):
        if not applies:
            continue
        for path in paths:
            section, name = path.rsplit(".", 1)
            value, default = _value(config, section, name), all_fields()[path].default
            if value != default:
                yield f"{path}: {format_value(value)} has no effect with {reason}"


def _value(config: StackWiseConfig, section: str, name: str) -> object:
    holder: object = config
    for part in section.split("."):
        holder = getattr(holder, part)
    return getattr(holder, name)


_KERNEL_FIELDS = (
    "kernel_type",
    "kernel_dim",
    "kernel_redraw_steps",
    "kernel_bandwidth",
    "kernel_bandwidth_trainable",
    "kernel_distance",
    "kernel_feature_map",
    "kernel_low_rank",
)


def _unread_kernel_fields(fields: dict[str, Any]) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """What a form of a kernel does not read, as :func:`_unread`."""
    kernel, form = fields["kernel_type"], fields["kernel_form"]
    used = fields["attention_type"] == "kernel"
    bandwidths = ("model.kernel_bandwidth", "model.kernel_bandwidth_trainable")
    draws = ("model.kernel_dim", "model.kernel_redraw_steps")
    yield "kernel_type: linear", used and kernel == "linear", (*draws, *bandwidths)
    yield "kernel_form: exact", used and form == "exact", draws
    yield f"kernel_type: {kernel}", used and kernel != "laplacian", ("model.kernel_distance",)
    yield (
        f"kernel_type: {kernel}, kernel_form: {form}",
        used and (kernel, form) != ("linear", "linear"),
        ("model.kernel_feature_map",),
    )


def _unread(config: StackWiseConfig) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """(the setting that makes them idle, whether it applies, the idle fields)."""
    model, objective, training = config.model, config.objective, config.training
    fields = attention_fields(model)
    kind = fields["attention_type"]
    latent = kind == "mla" or (kind == "kernel" and bool(fields.get("kernel_low_rank")))
    yield f"attention_type: {kind}", not latent, ("model.mla_q_rank", "model.mla_kv_rank")
    yield (
        f"attention_type: {kind}",
        kind != "mla",
        ("model.mla_form", "model.mla_nope_dim", "model.mla_rope_dim", "model.mla_v_dim"),
    )
    yield (
        f"attention_type: {kind}",
        kind != "kernel",
        tuple(f"model.{name}" for name in _KERNEL_FIELDS),
    )
    yield from _unread_kernel_fields(fields)
    yield (
        "model.use_rope: false",
        not uses_rope(model),
        ("model.rope_theta", "model.rope_interleaved"),
    )
    yield (
        "no model.tokenizer_embedding.family",
        model.tokenizer_embedding.family is None,
        ("model.tokenizer_embedding.adapter_hidden_dim",),
    )
    masks = ("objective.mask_schedule", "objective.time_step_masking", "objective.count")
    yield "objective.type: clm", objective.type == "clm", masks
    yield (
        f"objective.type: {objective.type}",
        objective.type != "diffusion",
        ("objective.weighting",),
    )
    yield (
        f"objective.type: {objective.type}",
        objective.type != "mlm",
        ("objective.mlm_probability", "objective.mlm_mask", "objective.mlm_random"),
    )
    yield (
        f"training.mode: {training.mode}",
        training.mode not in ("blockwise", "fused"),
        ("training.block_size",),
    )
    yield (
        "training.mode: end_to_end",
        training.mode == "end_to_end",
        ("training.total_blocks",),
    )
    yield (
        f"training.mode: {training.mode}",
        training.mode != "fused",
        ("training.fusion_mode", "training.current_block_lr", "training.backbone_lr"),
    )
    yield (
        "joint_tuning_steps: 0",
        training.joint_tuning_steps == 0,
        ("training.joint_lr",),
    )
    yield (
        f"lr_schedule: {training.lr_schedule}",
        training.lr_schedule != "wsd",
        ("training.decay_fraction",),
    )
    yield (
        "training.max_steps",
        training.max_steps is not None,
        ("training.epochs_per_layer",),
    )
    yield (
        "training.activation_cache: false",
        not training.activation_cache,
        ("training.activation_cache_dir", "training.cache_masks", "training.cache_dtype"),
    )
    yield (
        f"data.tokenizer_path: {config.data.tokenizer_path}",
        config.data.tokenizer_path is not None,
        ("data.tokenizer_vocab_size",),
    )
