"""Tokenizers: lossless, stable ids, special ids only where code puts them, saved for everyone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.data import DataError, Tokenizer, hub, load_tokenizer, train_bpe

TEXTS = [
    "The old lighthouse keeper counted the ships and wrote their names down.",
    "Größe, naïveté, 東京 and 🦀🦀 are words here too.",
] * 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as GPT-2's: one special token for everything, which is only its EOS and BOS."""
    return _transformers_folder(
        tmp_path_factory.mktemp("gpt2"), ["<|endoftext|>"], eos_token="<|endoftext|>"
    )


def _transformers_folder(folder: Path, special: list[str], **names: str) -> Path:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.enable_truncation(8)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_and_holds_no_special_id(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids)


def test_ids_are_specials_then_bytes_then_merges(tokenizer: Tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2)
    assert tokenizer.special_ids == (0, 1, 2)
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.vocab_size == 300
    assert train_bpe(["a"], 259).encode("é") == [train_bpe(["b c d"], 259).encode("é")[0], 105]
    merged = [index for index in tokenizer.encode(TEXTS[0]) if index >= 259]
    assert len(merged) >= 5


def test_special_tokens_spelled_out_in_a_text_stay_text(tokenizer: Tokenizer, gpt2_folder: Path):
    for own in (tokenizer, load_tokenizer(gpt2_folder)):
        text = "before<|mask|> <|eos|><|endoftext|>after"
        ids = own.encode(text)
        assert not set(ids) & set(own.special_ids)
        assert own.decode(ids) == text


def test_decode_spells_special_tokens_out_or_skips_them(tokenizer: Tokenizer):
    ids = [*tokenizer.encode("a ship"), tokenizer.mask_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a ship<|mask|><|eos|>"
    assert tokenizer.decode(ids, skip_special=True) == "a ship"


def test_training_twice_in_different_processes_gives_the_same_tokenizer(tokenizer: Tokenizer):
    code = (
        "import sys, json; from stackwise.data import train_bpe;"
        "print(train_bpe(json.load(sys.stdin), 300).fingerprint())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert other.stdout.strip() == tokenizer.fingerprint()
    assert train_bpe(TEXTS[:1] * 30, 300).fingerprint() != tokenizer.fingerprint()


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(
    tokenizer: Tokenizer, tmp_path: Path
):
    from transformers import AutoTokenizer

    loaded = load_tokenizer(tokenizer.save(tmp_path / "saved"))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.info == tokenizer.info
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    for text in (*TEXTS, " leading", "two  spaces\n\ttab", "a. b , c"):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.mask_token_id) == (0, 1, 2)
    assert len(theirs) == tokenizer.vocab_size


def test_a_transformers_tokenizer_gets_the_mask_and_pad_it_lacks(gpt2_folder: Path):
    own = load_tokenizer(gpt2_folder)
    assert own.eos_id == 0
    assert {own.pad_id, own.mask_id} == {290, 291}
    assert own.vocab_size == 292
    assert set(own.special_ids) == {0, 290, 291}
    assert own.decode([own.mask_id]) == own.mask_token == "<|mask|>"


def test_a_length_limit_stored_with_the_tokenizer_truncates_nothing(gpt2_folder: Path):
    own = load_tokenizer(gpt2_folder)
    assert own.decode(own.encode(TEXTS[0])) == TEXTS[0]
    assert len(own.encode(TEXTS[0])) > 8


def test_a_transformers_tokenizer_saved_with_its_additions_comes_back(
    gpt2_folder: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    own = load_tokenizer(gpt2_folder)
    loaded = load_tokenizer(own.save(tmp_path))
    assert loaded.info == own.info
    assert loaded.fingerprint() == own.fingerprint()
    assert AutoTokenizer.from_pretrained(str(tmp_path)).mask_token_id == own.mask_id


def test_bert_style_specials_are_used_as_they_are(tmp_path: Path):
    folder = _transformers_folder(
        tmp_path, ["[PAD]", "[SEP]", "[MASK]"], pad_token="[PAD]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    own = load_tokenizer(folder)
    assert (own.pad_id, own.eos_id, own.mask_id, own.vocab_size) == (0, 1, 2, 290)


def test_an_id_can_be_named_as_mask(gpt2_folder: Path, tmp_path: Path):
    own = load_tokenizer(gpt2_folder, mask_id=17)
    assert own.mask_id == 17
    assert 17 in own.special_ids
    beyond = load_tokenizer(gpt2_folder, mask_id=500)
    assert (beyond.mask_id, beyond.vocab_size) == (500, 501)
    assert load_tokenizer(beyond.save(tmp_path)).info == beyond.info
    with pytest.raises(DataError, match=r"special_mask_id.*got -1"):
        load_tokenizer(gpt2_folder, mask_id=-1)
    with pytest.raises(DataError, match=r"special_mask_id.*got 0.*EOS is 0"):
        load_tokenizer(gpt2_folder, mask_id=0)


def test_a_run_folder_serves_as_tokenizer(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_bytes_under_unknown_tokens_are_counted(tmp_path: Path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"[UNK]": 0, "the": 1, "sea": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[UNK]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = load_tokenizer(tmp_path)
    assert own.encode("the größe sea") == [1, 0, 2]
    assert own.special_bytes("the größe sea") == len("größe".encode())
    assert own.special_bytes("the sea") == 0


def test_faulty_requests_are_answered_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"tokenizer_vocab_size must be at least 259.*got 258"):
        train_bpe(TEXTS, 258)
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no tokenizer.*tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(DataError, match=r"the tokenizer 'gpt2'.*Without a network use a local"):
        load_tokenizer("gpt2")
