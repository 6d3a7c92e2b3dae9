"""``generate``: text from a prompt, by diffusion or causal sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from stackwise.config import GenerationConfig
from stackwise.evaluation.inference import device_of, inference
from stackwise.generation.causal import continue_tokens
from stackwise.generation.diffusion import fill_masks
from stackwise.generation.prompts import encode_prompt
from stackwise.generation.sampling import TokenSampler

if TYPE_CHECKING:
    from stackwise.data.tokenizer import Tokenizer
    from stackwise.model.decoder import Decoder

Mode = Literal["diffusion", "causal"]


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    config: GenerationConfig,
    *,
    seed: int = 0,
    n_samples: int = 1,
    mode: Mode | None = None,
) -> list[str]:
    """``n_samples`` texts, each the prompt with what was generated.

    ``mode``: "diffusion", "causal", or None for what the model's attention mode suggests.

    - diffusion fills in every ``[MASK]`` (one token), ``[MASK:n]`` (n tokens) or mask token of the
      tokenizer in the prompt and changes nothing else; a prompt without any is continued by
      ``config.max_new_tokens`` tokens. ``config.steps`` and ``config.block_length``:
      ``diffusion.fill_masks``. The model keeps its attention mode.
    - causal continues the prompt until EOS or ``config.max_new_tokens``, with causal attention.

    Where nothing precedes the first token to predict (an empty prompt; a shifted diffusion model
    asked for the first token) the tokenizer's BOS, or else EOS, is put before it. Special tokens
    are never generated, EOS as the end of a causal text excepted.

    The same seed gives the same texts, and sample i does not depend on ``n_samples``. Training and
    attention mode of the model are restored. Raises ValueError for options out of range, for a
    prompt that does not fit a learned position table and for spans in causal mode.
    """
    _check(config, n_samples, mode)
    mode = mode or ("causal" if model.attention_mode == "causal" else "diffusion")
    ids, to_fill = encode_prompt(prompt, tokenizer)
    if mode == "causal" and any(to_fill):
        raise ValueError("a causal model cannot fill in [MASK] spans; use diffusion mode")
    if mode == "diffusion" and not any(to_fill):
        _need_mask(tokenizer)
        ids = ids + [tokenizer.mask_id] * config.max_new_tokens
        to_fill = to_fill + [True] * config.max_new_tokens
    start = _start_token(model, tokenizer, mode, to_fill)
    ids, to_fill = [*start, *ids], [False] * len(start) + to_fill
    new_tokens = config.max_new_tokens if mode == "causal" else sum(to_fill)
    given = len(ids) if mode == "causal" else len(ids) - new_tokens
    _check_length(model, given, new_tokens)
    with inference(model, "causal" if mode == "causal" else model.attention_mode):
        texts = _sample(model, tokenizer, ids, to_fill, config, seed, n_samples, mode)
    return [tokenizer.decode(text[len(start) :]) for text in texts]


def _sample(
    model: Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    to_fill: list[bool],
    config: GenerationConfig,
    seed: int,
    n_samples: int,
    mode: Mode,
) -> list[list[int]]:
    device = device_of(model)
    banned = {*tokenizer.special_ids, *range(tokenizer.vocab_size, _vocabulary(model, tokenizer))}
    banned |= {tokenizer.mask_id} if tokenizer.mask_id is not None else set()
    if mode == "causal":
        banned -= {tokenizer.eos_id}
    sampler = TokenSampler(
        n_samples,
        seed=seed,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        banned=sorted(banned),
        device=device,
    )
    rows = torch.tensor(ids, dtype=torch.int64, device=device).repeat(n_samples, 1)
    if mode == "causal":
        new = continue_tokens(
            model, rows, sampler, max_new_tokens=config.max_new_tokens, eos_id=tokenizer.eos_id
        )
        return [ids + tokens for tokens in new]
    filled = fill_masks(
        model,
        rows,
        torch.tensor(to_fill, dtype=torch.bool, device=device),
        sampler,
        shift=model.shift,
        steps=config.steps,
        block_length=config.block_length,
    )
    return filled.tolist()


def _vocabulary(model: Decoder, tokenizer: Tokenizer) -> int:
    # Rows beyond the tokenizer (a padded embedding table) stand for no token.
    return max(model.config.vocab_size or 0, tokenizer.vocab_size)


def _start_token(
    model: Decoder, tokenizer: Tokenizer, mode: Mode, to_fill: list[bool]
) -> list[int]:
    reads_before = mode == "causal" or model.shift
    if not reads_before or (to_fill and not to_fill[0]):
        return []
    bos = getattr(tokenizer, "bos_id", None)
    start = bos if bos is not None else tokenizer.eos_id
    if start is None:
        raise ValueError(
            "prompt must begin with text: the tokenizer has no BOS or EOS to start from"
        )
    return [start]


def _need_mask(tokenizer: Tokenizer) -> None:
    if tokenizer.mask_id is None:
        raise ValueError("diffusion sampling needs a MASK token and the tokenizer has none")


def _check_length(model: Decoder, given: int, new_tokens: int) -> None:
    limit = model.config.max_position_embeddings
    if model.config.use_rope or limit is None or given + new_tokens <= limit:
        return
    raise ValueError(
        f"prompt has {given} tokens and {new_tokens} are to be generated, but the model has "
        f"{limit} positions: shorten the prompt or generate at most {max(limit - given, 0)} tokens"
    )


def _check(config: GenerationConfig, n_samples: int, mode: Mode | None) -> None:
    if mode not in (None, "diffusion", "causal"):
        raise ValueError(f"mode must be diffusion, causal or None, got {mode!r}")
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    for name in ("max_new_tokens", "steps", "block_length", "top_k"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"generation.{name} must be at least 1, got {value}")
    if not 0.0 <= config.temperature < float("inf"):
        raise ValueError(f"generation.temperature must be 0 or more, got {config.temperature}")
    if config.top_p is not None and not 0.0 < config.top_p <= 1.0:
        raise ValueError(f"generation.top_p must lie in (0, 1], got {config.top_p}")
