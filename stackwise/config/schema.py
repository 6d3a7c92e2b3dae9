"""The configuration, one dataclass per YAML section.

Every field carries its description in ``metadata["help"]``; docs/configuration.md is generated from
them. A field whose name differs from the published reference system names the old one in
``metadata["renamed"]``, so that an old key is answered with the new one.
Loading, overrides and unknown keys: ``loading.py``. Cross-field rules: ``rules.py``.
"""

# ruff: noqa: RUF009 (_field returns dataclasses.field)
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Architecture = Literal["llama", "gpt2"]
AttentionType = Literal["standard", "gqa", "mla", "kernel"]
AttentionMode = Literal["bidirectional", "causal"]
AttentionPreset = Literal[
    "gpt_style",
    "bert_style",
    "efficient_gqa",
    "kernel_attention",
    "mla_attention",
    "full_featured",
    "mlgka",
    "custom",
]


def _field(default: Any, help: str, renamed: str | None = None) -> Any:
    metadata = {"help": help} | ({"renamed": renamed} if renamed else {})
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TokenizerEmbeddingConfig:
    """Embeddings taken from a known model (LexicalKernelManager)."""

    family: str | None = _field(
        None,
        "Hub name or local folder whose embedding matrix is used, or a known family name: gpt2, "
        "gpt2-medium, llama-3-8b, llama-3-70b, mistral-7b. Null: embeddings train from scratch.",
    )
    embedding_option: Literal["embed_tokens", "lm_head"] = _field(
        "embed_tokens", "Which matrix of that model is taken."
    )
    width: int | None = _field(
        None, "Width of that matrix. Null: read from the source when the model is built."
    )
    freeze_embeddings: bool = _field(
        False, "Keep the token embeddings at their initial values in every stage."
    )
    adapter_hidden_dim: int | None = _field(
        None,
        "Hidden width of the Linear-GELU-Linear adapter used when the matrix's width differs from "
        "d_model. Null: d_model.",
    )


@dataclass
class MoEConfig:
    """Mixture-of-experts feed-forward of DeepSeek-V2/V3 checkpoints."""

    n_routed_experts: int = _field(8, "Routed experts per layer.")
    n_shared_experts: int = _field(1, "Experts every token passes through.")
    experts_per_token: int = _field(2, "Routed experts per token.")
    d_ff: int = _field(512, "Hidden width of one expert.")
    first_dense_layers: int = _field(1, "Leading layers that keep a dense feed-forward.")
    scoring: Literal["softmax", "sigmoid"] = _field(
        "sigmoid", "Router scores: softmax (DeepSeek-V2) or sigmoid with a bias (DeepSeek-V3)."
    )
    n_groups: int = _field(1, "Expert groups for group-limited routing.")
    groups_per_token: int = _field(1, "Groups a token may use.")
    normalize_weights: bool = _field(True, "Divide the chosen experts' weights by their sum.")
    routed_scaling: float = _field(1.0, "Factor on the routed experts' output.")


@dataclass
class ModelConfig:
    """Shape and form of the decoder."""

    architecture: Architecture = _field(
        "llama",
        "Family whose conventions fill every field left null: llama (RMSNorm, RoPE, SwiGLU, no "
        "biases) or gpt2 (LayerNorm, learned positions, tanh-GELU, biases).",
    )
    init_from: str | None = _field(
        None,
        "Start from these weights: a run folder, a Transformers checkpoint folder or a Hub name. "
        "The shape fields then come from it.",
    )
    vocab_size: int | None = _field(
        None, "Rows of the embedding matrix. Null: the tokenizer's size (MASK token included)."
    )
    d_model: int = _field(256, "Width of the residual stream.")
    n_layers: int = _field(4, "Number of decoder blocks.")
    n_heads: int = _field(4, "Query heads.")
    n_kv_heads: int | None = _field(
        None, "Key/value heads; must divide n_heads. Null: n_heads (a quarter of it for gqa)."
    )
    head_dim: int | None = _field(None, "Width of a head. Null: d_model / n_heads.")
    d_ff: int | None = _field(
        None,
        "Hidden width of the feed-forward. Null: 4 d_model (gelu), 8/3 d_model rounded up to a "
        "multiple of 64 (gated).",
    )
    attention_preset: AttentionPreset | None = _field(
        None,
        "A named set of attention fields: gpt_style, bert_style, efficient_gqa, kernel_attention, "
        "mla_attention, full_featured, mlgka; custom or null sets nothing.",
    )
    attention_type: AttentionType = _field("standard", "standard, gqa, mla or kernel.")
    attention_mode: AttentionMode = _field(
        "bidirectional", "bidirectional or causal; can be switched at any time."
    )
    sliding_window: int | None = _field(
        None, "Tokens a position attends to on each side (causal: to the left, itself included)."
    )
    mla_form: Literal["deepseek", "low_rank"] = _field(
        "deepseek",
        "deepseek: shared latent with RMSNorm and decoupled RoPE (DeepSeek-V2). low_rank: separate "
        "key and value latents without decoupled RoPE.",
    )
    mla_q_rank: int | None = _field(
        None, "Width of the query latent. Null: queries are not compressed.", "model.mla_rq"
    )
    mla_kv_rank: int = _field(512, "Width of the key/value latent.", "model.mla_rkv")
    mla_nope_dim: int | None = _field(
        None, "Per-head query/key dims without position. Null: head_dim."
    )
    mla_rope_dim: int = _field(64, "Per-head decoupled RoPE dims (deepseek form).")
    mla_v_dim: int | None = _field(None, "Per-head value dims. Null: head_dim.")
    kernel_type: Literal["gaussian", "laplacian", "uniform", "linear"] = _field(
        "gaussian", "Kernel of kernel attention; linear is the plain dot product."
    )
    kernel_form: Literal["features", "exact", "linear"] = _field(
        "features",
        "features: softmax over random features (the published form). exact: the kernel itself as "
        "the weight (gaussian, laplacian). linear: no L x L matrix (gaussian through positive "
        "random features, linear through kernel_feature_map).",
    )
    kernel_low_rank: bool = _field(
        False,
        "Kernel attention projects q, k and v through the low-rank latents of mla_q_rank and "
        "mla_kv_rank (the presets mlgka and full_featured).",
    )
    kernel_dim: int = _field(64, "Number of random features.")
    kernel_redraw_steps: int | None = _field(
        None,
        "Training steps after which the random features of the blocks that train are drawn anew. "
        "Null: fixed by the seed. Either way they are saved with the model.",
    )
    kernel_bandwidth: float = _field(1.0, "Bandwidth of the kernel.")
    kernel_bandwidth_trainable: bool = _field(
        False, "Train the bandwidth, one per key/value head, from kernel_bandwidth on."
    )
    kernel_distance: Literal["euclidean", "l1"] = _field(
        "euclidean",
        "Distance of the laplacian kernel. Its features sample a multivariate Cauchy spectrum "
        "(euclidean) or independent Cauchy entries (l1, which has no exact form).",
    )
    kernel_feature_map: Literal["elu", "relu", "exp"] = _field(
        "elu", "Feature map of kernel_type linear in kernel_form linear; elu is elu(x) + 1."
    )
    dropout: float = _field(0.0, "Dropout on embeddings and on both residual branches.")
    tie_embeddings: bool = _field(False, "Head and token embeddings share one matrix.")
    use_rope: bool | None = _field(
        None, "Rotary positions on q and k. Null: yes for llama, no (learned positions) for gpt2."
    )
    rope_theta: float = _field(10_000.0, "Base of the rotary frequencies.")
    rope_scaling: dict[str, Any] | None = _field(
        None, "Frequency scaling as in Transformers: {rope_type: llama3 | yarn | linear, ...}."
    )
    rope_interleaved: bool = _field(
        False, "Rotate neighbouring pairs (GPT-J, DeepSeek) instead of half-split ones."
    )
    max_position_embeddings: int | None = _field(
        None, "Rows of the learned position table; longest sequence. Null: training.seq_len."
    )
    norm: Literal["rms_norm", "layer_norm"] | None = _field(
        None, "Null: rms_norm for llama, layer_norm for gpt2."
    )
    norm_eps: float | None = _field(None, "Null: 1e-6 for rms_norm, 1e-5 for layer_norm.")
    norm_position: Literal["pre", "post"] = _field(
        "pre", "Norm before each branch (pre) or after each residual sum (post)."
    )
    ffn: Literal["swiglu", "geglu", "gelu"] | None = _field(
        None, "Feed-forward. Null: swiglu for llama, gelu for gpt2."
    )
    freeze_up_proj: bool = _field(
        False, "Keep the up projection of gated feed-forwards at its random initial value."
    )
    qkv_bias: bool | None = _field(None, "Bias on q, k, v. Null: yes for gpt2, no for llama.")
    out_bias: bool | None = _field(
        None, "Bias on the attention output. Null: yes for gpt2, no for llama."
    )
    ffn_bias: bool | None = _field(
        None, "Bias on the feed-forward. Null: yes for gpt2, no for llama."
    )
    moe: MoEConfig | None = _field(
        None, "Mixture-of-experts feed-forward (DeepSeek checkpoints). Null: dense."
    )
    init_std: float = _field(0.02, "Standard deviation of the initial weights.")
    tokenizer_embedding: TokenizerEmbeddingConfig = _field(
        TokenizerEmbeddingConfig, "Embeddings from a known model."
    )


@dataclass
class ObjectiveConfig:
    """What is predicted, and which tokens are masked."""

    type: Literal["diffusion", "mlm", "clm"] = _field(
        "diffusion",
        "diffusion (mask diffusion), mlm (80/10/10) or clm (next token).",
        "training.fine_tune_mode",
    )
    mask_fraction_min: float = _field(0.15, "Smallest mask fraction.", "model.mask_fraction_min")
    mask_fraction_max: float = _field(0.90, "Largest mask fraction.", "model.mask_fraction_max")
    mask_schedule: Literal["random", "linear", "exponential", "cosine"] = _field(
        "random",
        "random: t is drawn from [mask_fraction_min, mask_fraction_max] for every row. linear, "
        "exponential, cosine: one fixed fraction per stage, from min at the first block to max at "
        "the last.",
        "training.mask_schedule_type",
    )
    time_step_masking: bool = _field(
        False,
        "Stage k uses the fraction of time bin min(k, last) of time_step_mask_fractions.",
        "training.time_step_masking",
    )
    num_time_steps: int = _field(8, "Number of time bins.", "training.num_time_steps")
    time_step_mask_fractions: Any = _field(
        None,
        "One fraction per bin (ascending list), or a mapping {bin: fraction} that is interpolated. "
        "Null: num_time_steps equal steps from mask_fraction_min to 0.85.",
        "training.time_step_mask_fractions",
    )
    count: Literal["bernoulli", "fixed"] = _field(
        "bernoulli",
        "bernoulli: every token is masked independently with probability t. fixed: exactly "
        "round(t * maskable) tokens of every row.",
    )
    weighting: Literal["plain", "inverse_t"] = _field(
        "plain", "Weight of a masked token's loss: 1 (plain) or 1/t (the diffusion bound)."
    )
    t_sampling: Literal["low_discrepancy", "uniform"] = _field(
        "low_discrepancy", "How t is spread over the rows of a batch."
    )
    mlm_probability: float = _field(0.15, "Fraction of tokens the mlm objective selects.")
    mlm_mask: float = _field(0.8, "Share of the selected tokens replaced by MASK.")
    mlm_random: float = _field(0.1, "Share replaced by a random token; the rest stays.")
    shift: bool | None = _field(
        None,
        "Position i predicts token i+1 (clm, and diffusion models made from causal checkpoints). "
        "Null: true for clm, what the checkpoint has for init_from, else false.",
    )
    label_smoothing: float = _field(0.0, "Label smoothing of the cross entropy.")
    z_loss: float = _field(0.0, "Weight of the squared log-partition penalty.")


@dataclass
class TrainingConfig:
    """Stages, optimiser, activation cache, precision, logging."""

    mode: Literal["layerwise", "blockwise", "fused", "end_to_end"] = _field(
        "layerwise",
        "layerwise (one block per stage), blockwise (block_size blocks per stage), fused "
        "(fusion_mode decides about the backbone), end_to_end (the control arm).",
    )
    block_size: int = _field(4, "Blocks per stage in blockwise and fused mode.")
    total_blocks: int | None = _field(
        None,
        "Number of stages to train, each of block_size blocks. Null: as many as cover n_layers.",
    )
    fusion_mode: Literal["frozen", "trainable"] = _field(
        "frozen",
        "What the blocks below the current one are in fused mode: frozen, or trained with "
        "backbone_lr.",
    )
    joint_tuning_steps: int = _field(
        0, "Optimiser steps of a last stage that trains everything together."
    )
    epochs_per_layer: float = _field(
        1.0, "Passes over the training rows per stage; ignored when max_steps is set."
    )
    max_steps: int | None = _field(
        None,
        "Optimiser steps summed over the stages, shared out evenly; the joint phase comes on top.",
    )
    batch_size: int = _field(8, "Rows per forward pass.")
    gradient_accumulation_steps: int = _field(1, "Forward passes per optimiser step.")
    seq_len: int = _field(128, "Tokens per packed row.")
    lr: float = _field(1e-3, "Peak learning rate of the blocks.")
    current_block_lr: float | None = _field(
        None, "Peak learning rate of the current blocks in fused mode. Null: lr."
    )
    backbone_lr: float = _field(
        1e-4, "Peak learning rate of a trainable backbone in fused mode.", "training.qlora_lr"
    )
    embedding_lr: float | None = _field(
        None, "Peak learning rate of embeddings, final norm and head. Null: lr."
    )
    joint_lr: float | None = _field(None, "Peak learning rate of the joint stage. Null: lr / 3.")
    weight_decay: float = _field(0.1, "Decay of matrices; vectors and embeddings have none.")
    betas: tuple[float, float] = _field((0.9, 0.95), "AdamW's betas.")
    adam_eps: float = _field(1e-8, "AdamW's epsilon.")
    lr_schedule: Literal["cosine", "constant", "wsd", "linear"] = _field(
        "cosine", "Shape after warm-up, per stage."
    )
    warmup_steps: int = _field(20, "Linear warm-up steps of every stage.")
    min_lr_ratio: float = _field(0.1, "Final learning rate over the peak (cosine, linear, wsd).")
    decay_fraction: float = _field(0.2, "Last share of a stage that wsd spends decaying.")
    max_grad_norm: float | None = _field(1.0, "Gradient norm limit. Null: no clipping.")
    train_embeddings: Literal["first", "all", "never"] = _field(
        "first",
        "Stages in which embeddings train: the first, all (needs no activation cache), never.",
    )
    train_head: Literal["first", "all", "never"] = _field(
        "all", "Stages in which final norm and head train."
    )
    mixed_precision: Literal["none", "bf16"] = _field("none", "Autocast dtype of the forward.")
    gradient_checkpointing: bool = _field(
        False, "Recompute block activations in the backward pass."
    )
    compile: bool = _field(False, "torch.compile the blocks.")
    activation_cache: bool = _field(
        False, "Keep the frozen prefix's output on disk instead of recomputing it every epoch."
    )
    activation_cache_dir: str | None = _field(
        None, "Folder of the cache. Null: activation_cache/ in the run folder."
    )
    cache_mode: Literal["layerwise", "fusion"] = _field(
        "layerwise",
        "Which stages read the cache: layerwise (layerwise and blockwise mode) or fusion (fused "
        "mode with a frozen backbone too).",
    )
    cache_masks: int = _field(
        1, "Mask draws kept per row when the cache is on; epochs cycle through them."
    )
    cache_dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "Storage dtype; auto is the residual stream's, which is bit-exact."
    )
    cache_budget_gb: float = _field(
        50.0,
        "Largest size of the cache in GB; above it the prefix is recomputed, and that is said.",
    )
    quantization_enabled: bool = _field(
        False,
        "Hold the linear layers of frozen blocks in quantization_type; their full-precision "
        "weights stay on disk and come back when the block trains again and at the end.",
    )
    quantization_type: Literal["fp32", "fp16", "bf16", "fp8", "fp4", "nf4", "nvfp4", "mxfp4"] = (
        _field(
            "fp32",
            "Precision of the frozen part when quantization_enabled: fp4 is nvfp4, fp8 is e4m3 "
            "with a scale per row.",
        )
    )
    qlora_enabled: bool = _field(
        False,
        "Train low-rank adapters on the frozen backbone of mode fused, at backbone_lr; merged "
        "into the full-precision weights at the end.",
    )
    qlora_rank: int = _field(16, "Rank of the adapters.")
    qlora_alpha: float = _field(32.0, "Adapters are scaled by alpha / rank.")
    qlora_dropout: float = _field(0.1, "Dropout on the adapters' input.")
    device: str = _field("auto", "auto, cpu, cuda or cuda:N.")
    num_threads: int | None = _field(None, "CPU threads. Null: torch's default.")
    log_interval: int = _field(10, "Optimiser steps between metric lines.")
    eval_interval: int | None = _field(
        None, "Optimiser steps between validation losses within a stage. Null: at stage ends."
    )
    save_interval: int = _field(
        200, "Optimiser steps between checkpoints; stages always end with one."
    )
    keep_checkpoints: int = _field(2, "Newest checkpoints kept.")
    tensorboard: bool = _field(False, "Also write TensorBoard events (needs tensorboard).")
    wandb: bool = _field(False, "Also log to Weights & Biases (needs wandb).")


@dataclass
class DataConfig:
    """Corpus, tokenizer, packing."""

    dataset_path: str = _field(
        "builtin",
        "builtin (English prose carried by CPython), a .txt/.jsonl/.parquet file, a folder of such "
        "files, or the name of a Hugging Face dataset.",
    )
    dataset_config: str | None = _field(None, "Configuration name of a Hugging Face dataset.")
    dataset_split: str = _field("train", "Split of a Hugging Face dataset.")
    text_field: str = _field("text", "Field that holds the text in JSONL, Parquet and datasets.")
    num_samples: int | None = _field(None, "Use only this many documents. Null: all.")
    validation_fraction: float = _field(0.05, "Share of documents held out.")
    tokenizer_path: str | None = _field(
        None,
        "A Hugging Face tokenizer by name or path, or a run folder. Null: a byte-level BPE is "
        "trained on the training documents.",
    )
    tokenizer_vocab_size: int = _field(
        512, "Size of a tokenizer trained here, special tokens included."
    )
    special_mask_id: int | None = _field(
        None,
        "Id of the MASK token. Null: the tokenizer's own, else one is added.",
        "model.special_mask_id",
    )
    packing: Literal["best_fit", "concatenate", "none"] = _field(
        "best_fit",
        "How documents fill rows of seq_len tokens: best_fit (documents stay whole where they "
        "fit), concatenate (no padding, documents are cut at row ends), none (one document a row).",
        "data.padding",
    )
    streaming: bool = _field(
        False,
        "Tokenise into shards without holding the corpus in memory (also for Hugging Face "
        "datasets larger than the disk copy allows).",
    )
    shard_tokens: int = _field(50_000_000, "Tokens per shard file of the prepared corpus.")
    shuffle: bool = _field(True, "Visit the rows in a new order every epoch.")
    num_workers: int = _field(0, "Threads that prepare batches ahead; 0 prepares them in line.")
    pin_memory: bool = _field(False, "Page-locked batches for faster copies to a GPU.")
    cache_dir: str | None = _field(
        None, "Folder of prepared corpora. Null: $STACKWISE_CACHE or ~/.cache/stackwise."
    )


@dataclass
class EvaluationConfig:
    """What `stackwise eval` and the end-of-stage validation measure."""

    samples: int = _field(4, "Monte Carlo mask draws per validation row for the bound.")
    batch_size: int = _field(16, "Rows per forward pass.")
    max_rows: int | None = _field(None, "Validation rows used. Null: all.")
    mask_rates: tuple[float, ...] = _field(
        (0.15, 0.5, 0.85), "Rates at which masked-token accuracy is reported."
    )


@dataclass
class GenerationConfig:
    """Defaults of `stackwise generate`."""

    max_new_tokens: int = _field(64, "Tokens to generate after the prompt.")
    steps: int | None = _field(None, "Diffusion steps. Null: one per generated token.")
    block_length: int | None = _field(
        None,
        "Diffusion fills this many tokens at a time, left to right. Null: all of them together.",
    )
    temperature: float = _field(1.0, "0 is greedy.")
    top_k: int | None = _field(None, "Sample from the k most likely tokens. Null: off.")
    top_p: float | None = _field(None, "Sample from the smallest set of this mass. Null: off.")


@dataclass
class RunConfig:
    """Where a run is kept and what makes it repeatable."""

    dir: str = _field("runs", "Folder of runs.", "training.checkpoint_dir")
    id: str | None = _field(
        None, "Name of the run. Null: date, mode and a suffix.", "training.run_id"
    )
    seed: int = _field(0, "Seed of initial weights, data order and masks.")


@dataclass
class StackWiseConfig:
    """The whole configuration of a run; see :meth:`from_yaml`."""

    run: RunConfig = _field(RunConfig, "Run folder and seed.")
    model: ModelConfig = _field(ModelConfig, "The decoder.")
    objective: ObjectiveConfig = _field(ObjectiveConfig, "Masking and loss.")
    training: TrainingConfig = _field(TrainingConfig, "Stages and optimiser.")
    data: DataConfig = _field(DataConfig, "Corpus and tokenizer.")
    evaluation: EvaluationConfig = _field(EvaluationConfig, "Validation.")
    generation: GenerationConfig = _field(GenerationConfig, "Sampling defaults.")
    kernels: dict[str, str] = _field(
        dict,
        "Implementation per operation, {attention: torch, ...}: reference, torch, triton, cuda.",
    )

    @classmethod
    def from_yaml(cls, path: str, overrides: list[str] | None = None) -> StackWiseConfig:
        """Reads a YAML file, applies ``section.field=value`` overrides and checks every rule.

        Raises ``ConfigError`` with one message that lists every fault.
        """
        from stackwise.config.loading import load_yaml

        return load_yaml(path, overrides or [])

    def to_yaml(self, path: str | None = None) -> str:
        """The configuration as YAML text, written to ``path`` when given; reads back equal."""
        from stackwise.config.loading import dump_yaml

        return dump_yaml(self, path)

    def validate(self) -> StackWiseConfig:
        """Checks every field and cross-field rule; raises ``ConfigError`` listing all faults."""
        from stackwise.config.rules import check

        check(self)
        return self
