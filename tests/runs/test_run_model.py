"""The model that was trained is the one that is loaded: weights, ties, modes, dtypes, tokenizer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from stackwise.config import ModelConfig, StackWiseConfig
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config
from stackwise.runs import (
    RunError,
    RunStore,
    load_run_model,
    load_run_tokenizer,
    model_description,
)


def decoder(**fields) -> Decoder:
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 32} | fields
    return Decoder(resolve_model_config(ModelConfig(**shape), seq_len=8))


def new_run(folder: Path) -> RunStore:
    config = StackWiseConfig()
    config.run.dir = str(folder)
    return RunStore.create(config, "run")


def save_final(store: RunStore, model: Decoder, **extra) -> None:
    description = model_description(model) | extra
    store.save_model(model.state_dict(), model.config, None, description)


def assert_same(loaded: Decoder, model: Decoder) -> None:
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    assert loaded.config == model.config
    assert loaded.shift == model.shift
    assert loaded.attention_mode == model.attention_mode
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "llama"},
        {"architecture": "gpt2"},
        {"tie_embeddings": False},
        {"attention_type": "mla"},
        {"attention_type": "kernel"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_finished_model_comes_back_bit_for_bit(tmp_path, fields):
    store, model = new_run(tmp_path), decoder(**fields).eval()
    save_final(store, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_run_model(store.path).eval(), model)
        assert_same(load_run_model(store.path / "model").eval(), model)


def test_modes_changed_after_construction_are_kept(tmp_path):
    store, model = new_run(tmp_path), decoder().eval()
    model.shift = True
    model.set_attention_mode("causal")
    save_final(store, model)
    loaded = load_run_model(store.path).eval()
    assert (loaded.shift, loaded.attention_mode) == (True, "causal")
    assert_same(loaded, model)


def test_dtypes_are_kept_even_mixed(tmp_path):
    store, model = new_run(tmp_path), decoder().to(torch.bfloat16)
    model.final_norm.float()
    save_final(store, model)
    loaded = load_run_model(store.path)
    assert loaded.blocks[0].attention.q_proj.weight.dtype == torch.bfloat16
    assert loaded.final_norm.weight.dtype == torch.float32


def test_trained_head_is_the_loaded_head_and_ties_stay_ties(tmp_path):
    # The published system saved a model whose head was not the one it had trained.
    for tie in (True, False):
        store, model = new_run(tmp_path / str(tie)), decoder(tie_embeddings=tie)
        with torch.no_grad():
            model.head.weight.add_(torch.randn_like(model.head.weight))
        save_final(store, model)
        loaded = load_run_model(store.path)
        assert torch.equal(loaded.head.weight, model.head.weight)
        assert (loaded.head.weight is loaded.embeddings.token.weight) == tie


def test_unfinished_run_gives_its_newest_checkpoint_with_a_warning(tmp_path):
    store = new_run(tmp_path)
    for step in (5, 10):
        model = decoder().eval()
        state = {"model": model_description(model), "stage": step // 5, "stage_step": 0}
        store.save_checkpoint(step, {"model": model.state_dict()}, state)
    with pytest.warns(UserWarning, match="has not finished; using its checkpoint of step 10"):
        loaded = load_run_model(store.path).eval()
    assert_same(loaded, model)


def test_end_of_a_stage_is_found_while_its_checkpoint_is_kept(tmp_path):
    store = new_run(tmp_path)
    store.checkpoints.keep = 3
    models = {}
    for step, stage, stage_step in ((5, 1, 0), (8, 1, 3), (10, 2, 0)):
        models[step] = decoder().eval()
        state = {
            "model": model_description(models[step]),
            "stage": stage,
            "stage_step": stage_step,
        }
        store.save_checkpoint(step, {"model": models[step].state_dict()}, state)
    assert_same(load_run_model(store.path, stage=0).eval(), models[5])
    assert_same(load_run_model(store.path, stage=1).eval(), models[10])
    with pytest.raises(RunError, match="end of stage 7; it keeps those of: 0, 1"):
        load_run_model(store.path, stage=7)


def test_run_without_any_weights_is_a_clear_error(tmp_path):
    store = new_run(tmp_path)
    with pytest.raises(RunError, match="neither a finished model nor a checkpoint"):
        load_run_model(store.path)
    with pytest.raises(RunError, match="nowhere is not a folder"):
        load_run_model(tmp_path / "nowhere")
    with pytest.raises(RunError, match="tokenizer is missing"):
        load_run_tokenizer(store.path)


@pytest.mark.parametrize("name", ["model.safetensors", "model_config.json", "manifest.json"])
def test_altered_model_is_refused_naming_the_file(tmp_path, name):
    store = new_run(tmp_path)
    save_final(store, decoder())
    path = store.path / "model" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=f"model/{name} is damaged"):
        load_run_model(store.path)


def test_weights_that_do_not_fit_the_description_are_named(tmp_path):
    store, model = new_run(tmp_path), decoder()
    state = model.state_dict()
    state["surplus"] = state.pop("final_norm.weight")
    description = model_description(model)
    store.save_model(state, model.config, None, description)
    with pytest.raises(
        RunError, match=r"missing \['final_norm\.weight'\], unexpected \['surplus'\]"
    ):
        load_run_model(store.path)


def test_description_of_another_version_is_refused(tmp_path):
    store, model = new_run(tmp_path), decoder()
    description = model_description(model)
    description["config"]["warp_factor"] = 9
    state = {"model": description}
    store.save_checkpoint(1, {"model": model.state_dict()}, state)
    warning = pytest.warns(UserWarning, match="has not finished")
    with warning, pytest.raises(RunError, match=r"another version.*\['warp_factor'\]"):
        load_run_model(store.path)


def test_shift_has_to_be_stated(tmp_path):
    model = decoder()
    with pytest.raises(ValueError, match="extra has no 'shift'"):
        new_run(tmp_path).save_model(model.state_dict(), model.config, None, {})


class Saver:
    def save(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


def test_tokenizer_is_saved_whole_and_verified(tmp_path):
    store = new_run(tmp_path)
    store.save_tokenizer(Saver())
    assert sorted(os.listdir(store.path / "tokenizer")) == ["manifest.json", "tokenizer.json"]
    (store.path / "tokenizer" / "tokenizer.json").write_text("{ }")
    with pytest.raises(RunError, match=r"tokenizer/tokenizer\.json is damaged"):
        load_run_tokenizer(store.path)


def test_trained_tokenizer_round_trips_through_the_run(tmp_path):
    from stackwise.data.tokenizer import train_bpe

    tokenizer = train_bpe(["the cat sat on the mat"] * 20, 300)
    store = new_run(tmp_path)
    store.save_tokenizer(tokenizer)
    loaded = load_run_tokenizer(store.path)
    text = "the cat sat; ünïcode"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.mask_id == tokenizer.mask_id
