"""What a run will be, without running it: parameters, stages, tokens, memory and disk.

Exact: parameter counts (the decoder is built on the meta device), stages and what trains in them
(the trainer's own functions), steps, tokens, size of the activation cache. Estimated: memory on the
training device, as the sum of

    weights        4 bytes x all parameters, + 2 bytes x the trainable ones under bf16 autocast;
                   those of quantised blocks in the format's bits, scales included
    gradients      4 bytes x trainable parameters
    optimizer      8 bytes x trainable parameters (AdamW's two moments)
    activations    what backward needs of every block that gets gradients, per token:
                   4 bytes x 2 D for the inputs of the two norms, and e bytes (2 under bf16, else
                   4) x (2 D + q + k + v + o + f F + latents), with q, k, v, o the widths of queries
                   and keys (mapped ones too in kernel attention), values and attention output, F
                   the hidden width and f = 3 for gated feed-forwards, 2 for gelu (experts: those a
                   token passes through, and 2 D for each routed one). In the last block
                   feed-forward and (bidirectional) attention output count only for the rows that
                   predict. With gradient checkpointing: 4 D per block, and one block in full.
    head           the masked rows' input, its gradient in float32 and the float32 gradient of the
                   head's matrix (logits are built in chunks and do not count)

Not in it: the framework (0.3 to 0.6 GB on a GPU), the allocator's slack, and validation.
Disk: the activation cache with the shard more that rolling needs, ``keep_checkpoints`` + 1
checkpoints (one is written before the oldest goes), one backup per block, the finished model.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config import ConfigError, ModelConfig, StackWiseConfig
from stackwise.config.rules import notes

if TYPE_CHECKING:
    from torch import Tensor

    from stackwise.model.decoder import Decoder
    from stackwise.training.stages import Stage

FLOAT = 4

# Bits per weight by training.quantization_type, scales included.
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "fp4": 4.5, "nvfp4": 4.5, "nf4": 4.5,
        "mxfp4": 4.25}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Estimated bytes on the training device in one stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """One stage: ``blocks`` are the current ones (start, stop), ``depth`` the number of blocks run.

    ``trains`` names what receives updates; ``tokens`` counts padding too, like the trainer.
    """

    index: int
    name: str
    blocks: tuple[int, int]
    depth: int
    trains: list[str]
    trainable_parameters: int
    source: str
    mask_fractions: tuple[float, float]
    lr: float
    steps: int
    rows: int
    tokens: int
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Disk:
    """Bytes on disk, at the worst moment of the run."""

    activation_cache: int
    checkpoints: int
    backups: int
    model: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything :func:`plan` finds out; sizes in bytes."""

    mode: str
    vocab_size: int
    vocab_source: str
    n_rows: int | None
    parameters: dict[str, Any]
    stages: list[PlannedStage]
    disk: Disk
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON types, with the totals added."""
        values = dataclasses.asdict(self)
        for planned, stage in zip(values["stages"], self.stages, strict=True):
            planned["memory"]["total"] = stage.memory.total
        values["disk"]["total"] = self.disk.total
        values["totals"] = {
            "steps": sum(stage.steps for stage in self.stages),
            "tokens": sum(stage.tokens for stage in self.stages),
            "peak_memory": max(stage.memory.total for stage in self.stages),
        }
        return values


def needs_rows(config: StackWiseConfig) -> bool:
    """Whether steps or the cache depend on the number of training rows."""
    return config.training.max_steps is None or config.training.activation_cache


def plan(config: StackWiseConfig, n_rows: int | None = None) -> Plan:
    """The plan of a valid configuration.

    ``n_rows``: rows of the prepared training split; needed when :func:`needs_rows`.
    Raises ``ConfigError`` for a faulty configuration, ValueError when ``n_rows`` is missing or
    below 1 or the vocabulary of a tokenizer cannot be found out.
    """
    import torch

    from stackwise.model.decoder import Decoder
    from stackwise.training.stages import build_stages

    if n_rows is None and needs_rows(config):
        raise ValueError(
            "n_rows is None, but training.max_steps: null and training.activation_cache: true need "
            "the number of training rows"
        )
    if n_rows is not None and n_rows < 1:
        raise ValueError(f"n_rows is {n_rows}; accepted: at least 1")
    remarks = notes(config)
    shape, vocab_source = resolved_shape(config)
    config = dataclasses.replace(
        config, model=dataclasses.replace(shape, init_from=config.model.init_from)
    )
    with torch.device("meta"):
        model = Decoder(shape, initialize=False)
    training = config.training
    steps_per_epoch = None
    if n_rows is not None:
        batches = max(1, n_rows // training.batch_size)
        steps_per_epoch = max(1, batches // training.gradient_accumulation_steps)
    stages = [_planned(config, model, stage) for stage in build_stages(config, steps_per_epoch)]
    cached = any(stage.source == "cache" for stage in stages)
    return Plan(
        mode=training.mode,
        vocab_size=shape.vocab_size or 0,
        vocab_source=vocab_source,
        n_rows=n_rows,
        parameters=parameter_counts(model),
        stages=stages,
        disk=_disk(config, model, stages, n_rows if cached else None),
        notes=remarks,
    )


def resolved_shape(config: StackWiseConfig) -> tuple[ModelConfig, str]:
    """The model section without nulls, and where its vocabulary size comes from."""
    from stackwise.model.resolve import resolve_model_config

    model = config.model
    if model.init_from is not None:
        model = _shape_of(model.init_from)
    size, source = _vocabulary(config, model.vocab_size)
    model = dataclasses.replace(model, attention_mode=config.model.attention_mode)
    if config.model.init_from is None:
        model = config.model
    resolved = resolve_model_config(model, vocab_size=size, seq_len=config.training.seq_len)
    return resolved, source


def _shape_of(source: str) -> ModelConfig:
    from stackwise.model.transformers_bridge import read_pretrained_config
    from stackwise.runs import RunStore

    if (Path(source).expanduser() / "config.yaml").is_file():
        return RunStore.open(Path(source).expanduser()).load_config().model
    return read_pretrained_config(source)


def _vocabulary(config: StackWiseConfig, given: int | None) -> tuple[int, str]:
    if given is not None:
        return given, "model.vocab_size" if config.model.init_from is None else "model.init_from"
    if config.data.tokenizer_path is not None:
        from stackwise.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(config.data.tokenizer_path, config.data.special_mask_id)
        return tokenizer.vocab_size, "data.tokenizer_path"
    size = config.data.tokenizer_vocab_size
    if config.data.special_mask_id is not None:
        size = max(size, config.data.special_mask_id + 1)
    return size, "data.tokenizer_vocab_size, not yet trained"


def parameter_counts(model: Decoder) -> dict[str, Any]:
    """Parameters per part; a head tied to the embeddings counts 0, in ``total`` too."""

    def size(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    tied = model.head.weight is model.embeddings.token.weight
    parts = {
        "embeddings": size(model.embeddings),
        "blocks": [size(block) for block in model.blocks],
        "final_norm": size(model.final_norm),
        "head": 0 if tied else size(model.head),
    }
    return {**parts, "total": model.num_parameters, "tied_head": tied}


def _planned(config: StackWiseConfig, model: Decoder, stage: Stage) -> PlannedStage:
    from stackwise.training.optim import trainable_roles

    training = config.training
    roles = trainable_roles(model, stage, model.pinned_parameters())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trainable = sum(sizes[name] for name in roles) + _adapter_parameters(config, model, stage)
    rows = stage.steps * training.batch_size * training.gradient_accumulation_steps
    return PlannedStage(
        index=stage.index,
        name=stage.name,
        blocks=(stage.start, stage.stop),
        depth=stage.depth,
        trains=_names(roles, model) + _adapter_names(stage),
        trainable_parameters=trainable,
        source=stage.source,
        mask_fractions=(stage.plan.low, stage.plan.high),
        lr=stage.lr,
        steps=stage.steps,
        rows=rows,
        tokens=rows * training.seq_len,
        memory=_memory(config, model, stage, trainable, roles),
    )


def _names(roles: dict[str, str], model: Decoder) -> list[str]:
    """What trains, in words: block ranges, embeddings, final norm, head."""
    blocks = sorted({int(name.split(".")[1]) for name in roles if name.startswith("blocks.")})
    words = []
    if blocks:
        first, last = blocks[0], blocks[-1]
        words.append(f"block {first}" if first == last else f"blocks {first}-{last}")
    parts = {name.split(".", 1)[0] for name in roles}
    tied = model.head.weight is model.embeddings.token.weight
    if "embeddings" in parts:
        words.append("embeddings with the tied head" if tied else "embeddings")
    words += [
        words_ for part, words_ in (("final_norm", "final norm"), ("head", "head")) if part in parts
    ]
    return words


def _adapter_names(stage: Stage) -> list[str]:
    if not stage.adapted:
        return []
    first, last = stage.adapted[0], stage.adapted[-1]
    where = f"block {first}" if first == last else f"blocks {first}-{last}"
    return [f"adapters of {where}"]


def _adapter_parameters(config: StackWiseConfig, model: Decoder, stage: Stage) -> int:
    """A and B on every linear layer of the adapted blocks."""
    widths = sum(
        sum(weight.shape) for index in stage.adapted for weight in _linear_weights(model, index)
    )
    return config.training.qlora_rank * widths


def _quantized_savings(config: StackWiseConfig, model: Decoder, stage: Stage) -> int:
    """Bytes that the linear weights of frozen blocks take less than in float32."""
    if not config.training.quantization_enabled:
        return 0
    frozen = [index for index in range(stage.depth) if index not in stage.trainable]
    count = sum(w.numel() for index in frozen for w in _linear_weights(model, index))
    return round(count * (FLOAT - BITS[config.training.quantization_type] / 8))


def _linear_weights(model: Decoder, index: int) -> list[Tensor]:
    from torch import nn

    return [part.weight for part in model.blocks[index].modules() if isinstance(part, nn.Linear)]


def _memory(
    config: StackWiseConfig, model: Decoder, stage: Stage, trainable: int, roles: dict[str, str]
) -> Memory:
    training, shape = config.training, model.config
    bf16 = training.mixed_precision == "bf16"
    tokens = training.batch_size * training.seq_len
    share = _predicted_share(config, stage)
    selected = math.ceil(tokens * share)
    layers = range(stage.frozen_prefix, stage.depth) if roles else range(0)
    kept = [
        _block_bytes(shape, layer, bf16, share if layer == stage.depth - 1 else 1.0)
        for layer in layers
    ]
    if training.gradient_checkpointing:
        activations = tokens * (len(layers) * FLOAT * shape.d_model + max(kept, default=0.0))
    else:
        activations = tokens * sum(kept)
    head_trains = "head.weight" in roles or (
        shape.tie_embeddings and "embeddings.token.weight" in roles
    )
    head = selected * shape.d_model * (FLOAT + (2 if bf16 else FLOAT))
    if head_trains:
        head += FLOAT * shape.d_model * (shape.vocab_size or 0)
    return Memory(
        weights=FLOAT * model.num_parameters
        + (2 * trainable if bf16 else 0)
        - _quantized_savings(config, model, stage),
        gradients=FLOAT * trainable,
        optimizer=2 * FLOAT * trainable,
        activations=round(activations),
        head=head,
    )


def _predicted_share(config: StackWiseConfig, stage: Stage) -> float:
    """Expected share of the tokens whose hidden state predicts something."""
    if config.objective.type == "clm":
        return 1.0
    return (stage.plan.low + stage.plan.high) / 2


def _block_bytes(shape: ModelConfig, layer: int, bf16: bool, share: float) -> float:
    """Bytes per token that a block keeps for backward, with ``share`` of the rows asking."""
    e = 2 if bf16 else FLOAT
    q, k, v, o, latents = _attention_widths(shape)
    hidden = _feed_forward_width(shape, layer)
    norm = FLOAT * shape.d_model
    everywhere = norm + e * (shape.d_model + k + v + latents)
    asking = norm + e * (shape.d_model + hidden)
    attention: float = e * (q + o)
    if shape.attention_mode == "bidirectional" and shape.sliding_window is None:
        attention *= share
    return everywhere + attention + share * asking


def _attention_widths(shape: ModelConfig) -> tuple[int, int, int, int, int]:
    """Widths of queries, keys, values, attention output and latents that backward needs."""
    heads, kv_heads = shape.n_heads, shape.n_kv_heads or shape.n_heads
    head_dim, nope, v_dim = shape.head_dim or 0, shape.mla_nope_dim or 0, shape.mla_v_dim or 0
    latents = (shape.mla_q_rank or 0) + shape.mla_kv_rank
    if shape.attention_type == "mla" and shape.mla_form == "deepseek":
        qk = heads * (nope + shape.mla_rope_dim)
        return 2 * qk, qk, heads * v_dim, heads * v_dim, 2 * latents
    if shape.attention_type == "mla":
        return heads * nope, kv_heads * nope, kv_heads * v_dim, heads * v_dim, 2 * latents
    q, k = heads * head_dim, kv_heads * head_dim
    if shape.attention_type == "kernel":
        # The exact and the linear form keep queries, keys and values only.
        maps = shape.kernel_form == "features" and shape.kernel_type != "linear"
        mapped = 2 * shape.kernel_dim if maps else 0
        extra = 2 * latents if shape.kernel_low_rank else 0
        return q + heads * mapped, k + kv_heads * mapped, k, q, extra
    return q, k, k, q, 0


def _feed_forward_width(shape: ModelConfig, layer: int) -> int:
    """Width of everything the feed-forward keeps beyond its input."""
    moe = shape.moe
    if moe is None or layer < moe.first_dense_layers:
        return (shape.d_ff or 0) * (2 if shape.ffn == "gelu" else 3)
    # Every expert gathers its tokens and scatters its outputs.
    routed = moe.experts_per_token * (2 * shape.d_model + 3 * moe.d_ff)
    return routed + 3 * moe.n_shared_experts * moe.d_ff


def _disk(
    config: StackWiseConfig, model: Decoder, stages: list[PlannedStage], n_rows: int | None
) -> Disk:
    cache = 0
    if n_rows is not None:
        cache = _cache_bytes(config, model, n_rows)
        if cache > config.training.cache_budget_gb * 1e9:
            cache = 0
    parameters = FLOAT * model.num_parameters
    largest = max(stage.trainable_parameters for stage in stages)
    trained = max(stage.depth for stage in stages)
    blocks = sum(p.numel() for block in model.blocks[:trained] for p in block.parameters())
    return Disk(
        activation_cache=cache,
        checkpoints=(config.training.keep_checkpoints + 1) * (parameters + 2 * FLOAT * largest),
        backups=FLOAT * blocks,
        model=parameters,
    )


def _cache_bytes(config: StackWiseConfig, model: Decoder, n_rows: int) -> int:
    import torch

    from stackwise.training.activation_cache import ActivationCache, CacheSpec

    dtype = torch.bfloat16 if config.training.cache_dtype == "bfloat16" else torch.float32
    spec = CacheSpec(
        n_rows=n_rows,
        n_masks=config.training.cache_masks,
        seq_len=config.training.seq_len,
        d_model=model.config.d_model,
        dtype=dtype,
        data_fingerprint="",
        mask_seed=0,
        mask_low=0.0,
        mask_high=1.0,
        attention_mode=model.attention_mode,
    )
    return ActivationCache.required_bytes(spec, batch_rows=config.training.batch_size)


__all__ = ["ConfigError", "Plan", "needs_rows", "plan"]
