"""Weights on disk: shards, name prefixes, dtypes, and every way a folder can be wrong.

Folders are written by StackWise itself, so that nothing here imports Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stackwise.config import ModelConfig
from stackwise.model.bridge_registry import families
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config
from stackwise.model.transformers_bridge import (
    load_pretrained,
    read_pretrained_config,
    save_pretrained,
)

Edit = Callable[[dict[str, torch.Tensor]], None]


def _model(**fields: Any) -> Decoder:
    shape = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24}
    config = ModelConfig(**shape | {"attention_mode": "causal"} | fields)
    return Decoder(resolve_model_config(config, seq_len=32), shift=True)


def _saved(folder: Path, **fields: Any) -> Decoder:
    model = _model(**fields)
    save_pretrained(model, folder)
    return model


def _edit_weights(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _assert_same(a: Decoder, b: Decoder) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_shards_and_their_index_load_to_the_same_model(tmp_path: Path) -> None:
    model = _model()
    save_pretrained(model, tmp_path, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 3
    assert set(index["weight_map"].values()) == files
    stored = sum(t.nbytes for file in files for t in load_file(tmp_path / file).values())
    assert index["metadata"]["total_size"] == stored == 4 * model.num_parameters
    largest = max(t.nbytes for t in model.state_dict().values())
    for file in files:
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= max(4000, largest)
        with safe_open(tmp_path / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    _assert_same(load_pretrained(tmp_path), model)


def test_transformers_reads_our_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _model(architecture="gpt2", tie_embeddings=True).eval()
    save_pretrained(model, tmp_path, max_shard_bytes=4000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids).logits).abs().max() <= 1e-5


def test_saving_over_shards_leaves_no_stale_file(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path, max_shard_bytes=4000)
    (tmp_path / "README.md").write_text("mine")
    model = _saved(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    _assert_same(load_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("architecture", "prefix"), [("gpt2", "transformer."), ("llama", "model.")]
)
def test_names_without_the_base_prefix_load(tmp_path: Path, architecture: str, prefix: str) -> None:
    model = _saved(tmp_path, architecture=architecture, tie_embeddings=True)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    _edit_weights(tmp_path, strip)
    _assert_same(load_pretrained(tmp_path), model)


def test_buffers_of_early_checkpoints_are_passed_over(tmp_path: Path) -> None:
    model = _saved(tmp_path, architecture="gpt2")
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    _edit_weights(tmp_path, lambda tensors: tensors.update(masks))
    _assert_same(load_pretrained(tmp_path), model)


def test_second_copy_of_a_tied_matrix_is_passed_over(tmp_path: Path) -> None:
    model = _saved(tmp_path, tie_embeddings=True)
    copy = model.head.weight.detach().clone()
    _edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": copy}))
    loaded = load_pretrained(tmp_path)
    assert loaded.head.weight is loaded.embeddings.token.weight
    _assert_same(loaded, model)


def test_tied_matrix_stored_under_the_head_name_loads(tmp_path: Path) -> None:
    model = _saved(tmp_path, tie_embeddings=True)
    _edit_weights(
        tmp_path,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}
        ),
    )
    _assert_same(load_pretrained(tmp_path), model)


def test_different_head_of_a_tied_config_is_loaded_untied(tmp_path: Path) -> None:
    model = _saved(tmp_path, tie_embeddings=True)
    other = torch.randn(40, 16)
    _edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    with pytest.warns(UserWarning, match="the head is loaded untied"):
        loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded.head.weight, other)
    assert torch.equal(loaded.embeddings.token.weight, model.embeddings.token.weight)
    assert loaded.config.tie_embeddings is False


def test_stored_dtype_is_kept_and_a_given_one_converts(tmp_path: Path) -> None:
    model = _model().to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    stored = load_pretrained(tmp_path)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    _assert_same(stored, model)
    for dtype in (torch.float32, "float32"):
        converted = load_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in converted.parameters()} == {torch.float32}
        _assert_same(converted, model.float())


def test_router_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    from stackwise.config import MoEConfig

    moe = MoEConfig(n_routed_experts=4, d_ff=8, first_dense_layers=0)
    latent = {"attention_type": "mla", "mla_kv_rank": 8, "mla_rope_dim": 4}
    model = _model(**latent, moe=moe)
    bias = torch.tensor([0.1, 1e-4 + 1.0, -0.3, 0.7])
    model.blocks[0].feed_forward.router.correction_bias.copy_(bias)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, dtype="bfloat16")
    router = loaded.blocks[0].feed_forward.router
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.correction_bias, bias)


def test_model_arrives_ready_for_evaluation_and_for_training(tmp_path: Path) -> None:
    _saved(tmp_path, architecture="gpt2", dropout=0.3)
    loaded = load_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.dropout == 0.3
    loaded(torch.arange(8)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    _saved(tmp_path, architecture="gpt2")
    before = torch.get_rng_state()
    load_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_config_alone_is_read_without_weights(tmp_path: Path) -> None:
    model = _saved(tmp_path, n_kv_heads=2, attention_type="gqa")
    (tmp_path / "model.safetensors").unlink()
    assert read_pretrained_config(tmp_path) == model.config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.adapter.weight": torch.zeros(3)}),
            r"unexpected tensors: model\.layers\.0\.adapter\.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(15)}),
            r"model\.norm\.weight has shape \(15,\), expected \(16,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.uint8)}),
            r"model\.norm\.weight has dtype U8, expected a float dtype",
        ),
        (lambda t: t.pop("lm_head.weight"), r"missing tensors: lm_head\.weight"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, edit: Edit, message: str) -> None:
    _saved(tmp_path)
    _edit_weights(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    _saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*never opens") as raised:
        load_pretrained(tmp_path)
    assert "AutoModelForCausalLM.from_pretrained" in str(raised.value)


def test_absent_weights_are_named(tmp_path: Path) -> None:
    _saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors"):
        load_pretrained(tmp_path)


def test_missing_and_damaged_shards_are_named(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path, max_shard_bytes=4000)
    shard = sorted(tmp_path.glob("model-00002-*"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a readable safetensors file"):
        load_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lists {shard.name}, which is not in"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', '{"weight_map": 3}', "[]"])
def test_unreadable_index_is_named(tmp_path: Path, text: str) -> None:
    _saved(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not a readable safetensors index"):
        load_pretrained(tmp_path)


def test_index_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    _saved(tmp_path / "a")
    _saved(tmp_path / "b")
    index = {"weight_map": {"model.norm.weight": "../b/model.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a shard outside its folder"):
        load_pretrained(tmp_path / "a")


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    (
        "gpt2",
        {"activation_function": "relu"},
        "activation_function is 'relu'; supported: 'gelu_new",
    ),
    ("llama", {"hidden_act": "xielu"}, "hidden_act is 'xielu'; supported: 'silu'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'; supported"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
    ("llama", {"hidden_size": None}, "hidden_size is None, expected a positive integer"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3; supported: a divisor"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is 'fp8'"),
    ("gemma2", {}, "model_type is 'gemma2'; supported: deepseek_v2"),
    ("llama", {"model_type": None}, r"model_type is None; supported: .*llama \(LLaMA, SmolLM2"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "max_window_layers is 1; supported: 0 or at least 2",
    ),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    (
        "deepseek_v2",
        {"first_k_dense_replace": 0, "norm_topk_prob": True},
        "norm_topk_prob is True; supported: False",
    ),
    (
        "deepseek_v2",
        {"first_k_dense_replace": 0, "topk_method": "noaux_tc"},
        "topk_method is 'noaux_tc'; supported: 'greedy'",
    ),
    (
        "deepseek_v3",
        {"first_k_dense_replace": 0, "scoring_func": "softmax"},
        "scoring_func is 'softmax'; supported: 'sigmoid'",
    ),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2; supported: 4"),
]


@pytest.mark.parametrize(("model_type", "fields", "message"), UNSUPPORTED)
def test_unsupported_settings_are_refused_before_weights_are_opened(
    tmp_path: Path, model_type: str, fields: dict[str, Any], message: str
) -> None:
    _saved(tmp_path, architecture="gpt2" if model_type == "gpt2" else "llama")
    (tmp_path / "model.safetensors").unlink()
    _edit_config(tmp_path, rope_parameters=None, **{"model_type": model_type} | fields)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_all_faults_of_a_config_are_listed_at_once(tmp_path: Path) -> None:
    _saved(tmp_path, architecture="gpt2")
    _edit_config(tmp_path, scale_attn_weights=False, activation_function="relu")
    with pytest.raises(ValueError, match="scale_attn_weights is False") as raised:
        load_pretrained(tmp_path)
    assert "activation_function is 'relu'" in str(raised.value)


def test_supported_families_are_these() -> None:
    expected = {"deepseek_v2", "deepseek_v3", "gpt2", "llama", "mistral", "qwen2"}
    assert set(families()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mode": "both"}, "attention_mode is 'both'; accepted: causal, bidirectional"),
        ({"dtype": "int8"}, "dtype is 'int8'; accepted: None, float64"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    _saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path, **arguments)


def test_folders_that_are_no_checkpoint_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the folder \./no/such/folder does not exist"):
        load_pretrained("./no/such/folder")
    with pytest.raises(ValueError, match="the name is empty"):
        load_pretrained("")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected a JSON object"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file; expected a checkpoint folder"):
        load_pretrained(tmp_path / "config.json")


def test_hub_name_without_network_says_what_was_tried_and_what_to_do() -> None:
    with pytest.raises(ValueError, match="could not load 'nobody/no-such-model'") as raised:
        load_pretrained("nobody/no-such-model")
    message = str(raised.value)
    assert "https://huggingface.co/nobody/no-such-model" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "--local-dir FOLDER" in message


def test_malformed_hub_name_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a folder nor a valid Hub name"):
        load_pretrained("not a name!")


def test_hub_cache_of_an_earlier_download_serves_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs through huggingface_hub's own cache layout: refs/main and snapshots/<revision>."""
    import huggingface_hub.constants

    model = _saved(tmp_path / "models--a--b" / "snapshots" / ("0" * 40))
    refs = tmp_path / "models--a--b" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    _assert_same(load_pretrained("a/b"), model)
