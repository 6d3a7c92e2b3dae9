"""Models made here as Transformers folders: their class, what travels along, what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.config import ModelConfig, MoEConfig
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config
from stackwise.model.transformers_bridge import (
    convert_to_bidirectional,
    load_pretrained,
    resize_vocabulary,
    save_pretrained,
    special_token_ids,
)

VOCAB = 48
LATENT: dict[str, Any] = {
    "attention_type": "mla",
    "mla_kv_rank": 12,
    "mla_rope_dim": 6,
    "mla_nope_dim": 10,
    "mla_v_dim": 8,
}


def _model(**fields: Any) -> Decoder:
    shape = {"vocab_size": VOCAB, "d_model": 24, "n_layers": 2, "n_heads": 4, "d_ff": 40}
    config = ModelConfig(**shape | {"attention_mode": "causal"} | fields)
    model = Decoder(resolve_model_config(config, seq_len=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("GPT2LMHeadModel", {"architecture": "gpt2", "tie_embeddings": True, "dropout": 0.2}),
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"n_kv_heads": 1, "attention_type": "gqa", "ffn": "geglu"}),
    ("LlamaForCausalLM", {"qkv_bias": True, "out_bias": True, "tie_embeddings": True}),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("Qwen2ForCausalLM", {"qkv_bias": True}),
    ("Qwen2ForCausalLM", {"qkv_bias": True, "sliding_window": 5}),
    ("MistralForCausalLM", {"sliding_window": 5}),
    ("DeepseekV3ForCausalLM", LATENT),
    ("DeepseekV3ForCausalLM", LATENT | {"mla_q_rank": 14, "moe": MoEConfig(d_ff=16)}),
    (
        "DeepseekV2ForCausalLM",
        LATENT
        | {
            "rope_interleaved": True,
            "moe": MoEConfig(d_ff=16, scoring="softmax", normalize_weights=False),
        },
    ),
    ("DeepseekV2ForCausalLM", LATENT | {"rope_interleaved": True, "ffn_bias": True}),
]


@pytest.mark.parametrize(("name", "fields"), CLASSES)
def test_model_made_here_computes_the_same_in_the_matching_class(
    tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = _model(**fields)
    save_pretrained(model, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == name
    assert not any(report.values()), report
    ids = torch.randint(0, VOCAB, (2, 17))
    with torch.no_grad():
        ours, theirs_logits = model(ids).logits, theirs.eval()(ids).logits
    assert (ours - theirs_logits).abs().max() <= 1e-5
    again = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention_type": "kernel", "kernel_dim": 8}, "model.attention_type is 'kernel'"),
    (LATENT | {"mla_form": "low_rank"}, "model.mla_form is 'low_rank', there it is 'deepseek'"),
    ({"norm_position": "post"}, "model.norm_position is 'post', there it is 'pre'"),
    ({"norm": "layer_norm"}, "model.norm is 'layer_norm', there it is 'rms_norm'"),
    ({"use_rope": False}, "model.use_rope is False, there it is True"),
    ({"rope_interleaved": True}, "model.rope_interleaved is True, there it is False"),
    ({"architecture": "gpt2", "n_kv_heads": 2}, "model.n_kv_heads is 2, there it is 4"),
    ({"architecture": "gpt2", "qkv_bias": False}, "model.qkv_bias is False, there it is True"),
    ({"n_heads": 5, "head_dim": 6, "out_bias": True}, "model.out_bias is True"),
    (LATENT | {"sliding_window": 4}, "model.sliding_window is 4, there it is None"),
    (
        LATENT | {"moe": MoEConfig(d_ff=16, scoring="softmax")},
        "model.moe is .*normalize_weights=True",
    ),
    (
        LATENT | {"moe": MoEConfig(d_ff=16, n_shared_experts=0)},
        "n_shared_experts is 0, expected a positive integer",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_model_without_a_class_is_refused_with_the_difference_and_the_alternative(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        save_pretrained(_model(**fields), tmp_path / "out")
    assert "Transformers has no class for this model" in str(raised.value)
    assert "RunStore.save_model" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_parameters_beyond_the_class_are_refused_by_name(tmp_path: Path) -> None:
    model = _model()
    model.blocks[1].attention.q_proj.register_parameter(
        "lora_a", torch.nn.Parameter(torch.zeros(2, 24))
    )
    with pytest.raises(ValueError, match=r"no place for blocks\.1\.attention\.q_proj\.lora_a"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mode_shift_and_training_fields_come_back(tmp_path: Path) -> None:
    model = _model(dropout=0.25, freeze_up_proj=True, attention_mode="bidirectional")
    assert model.shift is False
    with pytest.warns(UserWarning, match="the model is bidirectional, LlamaForCausalLM is causal"):
        save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert (again.attention_mode, again.shift) == ("bidirectional", False)
    assert again.config == model.config
    assert not again.blocks[0].feed_forward.up_proj.weight.requires_grad
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_pretrained(tmp_path, attention_mode="causal").attention_mode == "causal"


def test_foreign_extras_are_refused(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path)
    stored = _stored(tmp_path)
    for extras, message in (
        ({"attention_mode": "sideways"}, "stackwise.attention_mode in config.json is 'sideways'"),
        ({"config": {"d_model": 7}}, r"stackwise.config in config.json has \['d_model'\]"),
        ({"later": 1}, "known fields: attention_mode, shift, mask_token_id, config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(stored | {"stackwise": extras}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path)


@pytest.mark.parametrize(("shift", "expected"), [(None, True), (True, True), (False, False)])
def test_conversion_is_in_place_and_keeps_or_drops_the_shift(
    tmp_path: Path, shift: bool | None, expected: bool
) -> None:
    save_pretrained(_model(), tmp_path)
    (stored := _stored(tmp_path)).pop("stackwise")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    model = load_pretrained(tmp_path)
    assert (model.attention_mode, model.shift) == ("causal", True)
    assert convert_to_bidirectional(model, shift) is model
    assert (model.attention_mode, model.shift) == ("bidirectional", expected)
    ids = torch.randint(0, VOCAB, (1, 12))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % VOCAB
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(dim=-1)[0]
    assert difference[0] > 1e-4, "the first position does not see the last"


@pytest.mark.parametrize("tied", [True, False])
def test_grown_vocabulary_has_mean_rows_and_leaves_the_rest(tmp_path: Path, tied: bool) -> None:
    model = _model(tie_embeddings=tied)
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    old = model.embeddings.token.weight.detach().clone()
    old_head = model.head.weight.detach().clone()
    assert resize_vocabulary(model, VOCAB + 3) is model
    assert (model.head.weight is model.embeddings.token.weight) == tied
    assert model.config.vocab_size == VOCAB + 3
    assert torch.equal(model.embeddings.token.weight[:VOCAB], old)
    torch.testing.assert_close(model.embeddings.token.weight[-1], old.mean(0))
    torch.testing.assert_close(model.head.weight[-2], old_head.mean(0))
    with torch.no_grad():
        after = model(ids).logits
        new_token = model(torch.tensor([[VOCAB]])).logits
    torch.testing.assert_close(after[..., :VOCAB], before)
    assert new_token.shape == (1, 1, VOCAB + 3)
    save_pretrained(model, tmp_path)
    assert _stored(tmp_path)["vocab_size"] == VOCAB + 3
    assert load_pretrained(tmp_path).head.weight.shape == (VOCAB + 3, 24)


def test_shrinking_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="new_size is 47; accepted: at least the present 48"):
        resize_vocabulary(_model(), VOCAB - 1)


def test_tokenizer_is_saved_and_its_ids_survive_a_second_round(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from stackwise.data.tokenizer import train_bpe

    tokenizer = train_bpe(["the cat sat on the mat"] * 4, vocab_size=264)
    save_pretrained(_model(vocab_size=264), tmp_path / "a", tokenizer=tokenizer)
    stored = _stored(tmp_path / "a")
    ids = {
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": tokenizer.mask_id,
    }
    assert stored["stackwise"]["mask_token_id"] == tokenizer.mask_id
    assert stored["bos_token_id"] is None
    model = load_pretrained(tmp_path / "a")
    assert special_token_ids(model) == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert theirs.encode("the mat") == tokenizer.encode("the mat")
    save_pretrained(model, tmp_path / "b", tokenizer=theirs)
    assert _stored(tmp_path / "b") == stored
    save_pretrained(model, tmp_path / "c")
    assert _stored(tmp_path / "c") == stored


def test_failed_save_leaves_the_earlier_folder_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    first = _model()
    save_pretrained(first, tmp_path, max_shard_bytes=4000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full_disk(tensors: dict[str, torch.Tensor], path: str, metadata: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        Path(path).write_bytes(b"partial")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(_model(), tmp_path, max_shard_bytes=4000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_a_causal_model_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(_model(), tmp_path)


def test_only_decoders_are_saved_and_converted(tmp_path: Path) -> None:
    wrapped = torch.nn.Sequential(_model())
    for call in (
        lambda: save_pretrained(wrapped, tmp_path),
        lambda: convert_to_bidirectional(wrapped),
    ):
        with pytest.raises(
            ValueError, match="model is a Sequential; accepted: a stackwise Decoder"
        ):
            call()


def test_matrix_shared_without_being_declared_tied_is_written_twice(tmp_path: Path) -> None:
    model = _model()
    model.head.weight = model.embeddings.token.weight
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded.head.weight, model.embeddings.token.weight)
    assert loaded.head.weight is not loaded.embeddings.token.weight


def test_shard_limit_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes is 0; accepted: a positive integer"):
        save_pretrained(_model(), tmp_path, max_shard_bytes=0)


def test_run_folder_and_its_model_folder_load(tmp_path: Path) -> None:
    from stackwise.runs.model import save_model

    model = _model(attention_type="kernel", kernel_dim=8, attention_mode="bidirectional")
    (tmp_path / "config.yaml").write_text("{}\n")
    save_model(tmp_path / "model", model.state_dict(), model.config, {"shift": True})
    ids = torch.randint(0, VOCAB, (2, 9))
    for folder in (tmp_path, tmp_path / "model"):
        loaded = load_pretrained(folder)
        assert (loaded.attention_mode, loaded.shift) == ("bidirectional", True)
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    causal = load_pretrained(tmp_path, attention_mode="causal", dtype="bfloat16")
    assert causal.attention_mode == "causal"
    assert {p.dtype for p in causal.parameters()} == {torch.bfloat16}
