"""Every family against Transformers' own classes: logits, padding, and the way back.

Models are tiny and random in every tensor (norms, biases and router biases too, which
Transformers initialises to ones and zeros), so that a swapped or forgotten tensor shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.model.transformers_bridge import load_pretrained, save_pretrained

VOCAB = 61
LENGTH = 13  # odd, longer than the windows below, shorter than every original rope length
LOGIT_TOLERANCE = 1e-5

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 3,
    "eos_token_id": 3,
}
LATENT = LLAMA | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "q_lora_rank": 20,
}
EXPERTS = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.1}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-inner": ("gpt2", GPT2 | {"n_inner": 40, "tie_word_embeddings": False}),
    "llama-gqa": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", LLAMA | {"head_dim": 14}),
    "llama-geglu": ("llama", LLAMA | {"hidden_act": "gelu", "rms_norm_eps": 1e-5}),
    "llama-rope-llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", LLAMA | {"rope_parameters": YARN}),
    "llama-rope-linear": (
        "llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.5}},
    ),
    "mistral-window": ("mistral", LLAMA | {"sliding_window": 4}),
    "mistral-no-window": ("mistral", LLAMA | {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2-window-unused": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "v2-greedy": ("deepseek_v2", LATENT | EXPERTS | {"q_lora_rank": None}),
    "v2-groups-yarn": (
        "deepseek_v2",
        LATENT
        | EXPERTS
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": YARN | MSCALE,
        },
    ),
    "v2-dense-biases": (
        "deepseek_v2",
        LATENT | {"first_k_dense_replace": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "v3-groups": (
        "deepseek_v3",
        LATENT | EXPERTS | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1},
    ),
    "v3-yarn-half-split": (
        "deepseek_v3",
        LATENT
        | EXPERTS
        | {
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "rope_interleave": False,
            "rope_parameters": YARN | MSCALE,
        },
    ),
    "v3-dense": ("deepseek_v3", LATENT | {"first_k_dense_replace": 2, "attention_bias": True}),
}


@dataclass
class Case:
    name: str
    folder: Path
    theirs: Any
    ours: Any


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = CASES[request.param]
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in [*theirs.parameters(), *_router_biases(theirs)]:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return Case(request.param, folder, theirs, load_pretrained(folder))


def _router_biases(model: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "e_score_correction_bias" in name]


def _ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs).logits


def _worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_causal_logits_equal_transformers(case: Case) -> None:
    ours, theirs = _logits(case.ours, input_ids=_ids()), _logits(case.theirs, input_ids=_ids())
    assert theirs.std() > 0.05, "logits too flat to compare"
    assert _worst(ours, theirs) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_transformers_where_there_are_tokens(case: Case, side: str) -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, padding in enumerate((0, 4, 7)):
        mask[row, slice(0, padding) if side == "left" else slice(LENGTH - padding, None)] = 0
    inputs = {"input_ids": _ids(3), "attention_mask": mask}
    ours, theirs = _logits(case.ours, **inputs), _logits(case.theirs, **inputs)
    keep = mask.bool()
    assert _worst(ours[keep], theirs[keep]) <= LOGIT_TOLERANCE


def test_bidirectional_logits_differ_and_causal_ones_come_back(case: Case) -> None:
    causal = _logits(case.ours, input_ids=_ids())
    case.ours.set_attention_mode("bidirectional")
    try:
        bidirectional = _logits(case.ours, input_ids=_ids())
    finally:
        case.ours.set_attention_mode("causal")
    assert _worst(bidirectional[:, 0], causal[:, 0]) > 1e-3
    assert torch.equal(_logits(case.ours, input_ids=_ids()), causal)


def test_saved_folder_gives_transformers_the_same_model(case: Case, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_pretrained(case.ours, tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(case.theirs)
    assert not any(report.values()), report
    theirs = case.theirs.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert (
        _worst(_logits(again.eval(), input_ids=_ids()), _logits(case.theirs, input_ids=_ids()))
        == 0.0
    )


# Dropout rates are ours, caches are the caller's; a window that no layer uses is written as none,
# prediction modules behind the last layer are not loaded.
NOT_COMPARED = {
    "attn_pdrop", "transformers_version", "stackwise", "use_cache", "dtype", "_name_or_path",
    "use_sliding_window", "sliding_window", "max_window_layers", "num_nextn_predict_layers",
}  # fmt: skip
# Numbers of experts that a model without any does not use.
EXPERT_FIELDS = {*EXPERTS, "n_group", "topk_group", "norm_topk_prob"} - {"first_k_dense_replace"}


def test_saved_config_has_the_same_essentials(case: Case, tmp_path: Path) -> None:
    from transformers import AutoConfig

    save_pretrained(case.ours, tmp_path)
    before = AutoConfig.from_pretrained(case.folder).to_dict()
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    skipped = NOT_COMPARED | (EXPERT_FIELDS if "dense" in case.name else set())
    compared = {name: value for name, value in before.items() if name not in skipped}
    compared |= (
        {"n_inner": before["n_inner"] or 4 * before["n_embd"]} if "n_inner" in before else {}
    )
    different = {
        name: (value, after.get(name))
        for name, value in compared.items()
        if after.get(name) != value and not _same_routing(name, before, after)
    }
    assert not different


def _same_routing(name: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Greedy routing has no groups, which is written as one group."""
    return before.get("topk_method") == "greedy" and before[name] is None and after[name] == 1


def test_loading_what_was_saved_gives_the_same_config_and_extras(
    case: Case, tmp_path: Path
) -> None:
    save_pretrained(case.ours, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == case.ours.config
    assert (again.shift, again.attention_mode) == (True, "causal")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["stackwise"] == {"attention_mode": "causal", "shift": True}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, case.ours.state_dict()[name]), name


def test_config_in_the_old_spelling_reads_the_same(case: Case, tmp_path: Path) -> None:
    """Transformers up to 4 wrote rope_theta, rope_scaling with ``type``, and torch_dtype."""
    stored = json.loads((case.folder / "config.json").read_text())
    stored["torch_dtype"] = stored.pop("dtype")
    if rope := stored.pop("rope_parameters", None):
        stored["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        stored["rope_scaling"] = None if rope["type"] == "default" else rope
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "model.safetensors").symlink_to(case.folder / "model.safetensors")
    old = load_pretrained(tmp_path)
    assert old.config == case.ours.config
    ids = _ids()
    assert torch.equal(_logits(old, input_ids=ids), _logits(case.ours, input_ids=ids))


def test_shards_written_by_transformers_load(case: Case, tmp_path: Path) -> None:
    case.theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = load_pretrained(tmp_path)
    for name, tensor in sharded.state_dict().items():
        assert torch.equal(tensor, case.ours.state_dict()[name]), name
