"""Preparing: reuse, two processes at once, damage, streaming, a user's own folder end to end."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.data import (
    DataError,
    PackedRows,
    PreparedData,
    RowSampler,
    TokenizerInfo,
    describe,
    iterate_batches,
    load_prepared,
    load_tokenizer,
    prepare_data,
    prepared,
    train_bpe,
)
from stackwise.data.builder import SplitBuilder, manifest_fields

CHILD = """
import contextlib, pathlib, sys, time
from stackwise.config.schema import StackWiseConfig
from stackwise.data import prepare_data, prepared
dataset, cache, name, locked = sys.argv[1:]
cache = pathlib.Path(cache)
config = StackWiseConfig()
config.training.seq_len = 32
config.data.dataset_path, config.data.cache_dir = dataset, str(cache / "cache")
write_splits = prepared._write_splits
def counted(*arguments):
    (cache / f"built-{name}").touch()
    time.sleep(0.5)
    return write_splits(*arguments)
prepared._write_splits = counted
if locked == "unlocked":
    prepared._lock = lambda cache, name: contextlib.nullcontext(cache.mkdir(exist_ok=True))
(cache / f"ready-{name}").touch()
while len(list(cache.glob("ready-*"))) < 2:
    time.sleep(0.01)
print(prepare_data(config, progress=False).train.fingerprint)
"""


def _documents(data: PreparedData, rows: PackedRows) -> list[str]:
    """The texts of a split whose documents all fit their row, in order of row."""
    texts = []
    for row in range(len(rows)):
        batch = rows.batch([row])
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
            ids = batch.input_ids[0, start:stop].tolist()
            if ids[0] != data.tokenizer.pad_id:
                assert ids.index(data.tokenizer.eos_id) == len(ids) - 1
                texts.append(data.tokenizer.decode(ids[:-1]))
    return texts


def test_your_own_folder_of_text_files_end_to_end(text_folder: Path, make_config):
    data = prepare_data(make_config(text_folder, seq_len=512), progress=False)
    files = sorted(path.read_text(encoding="utf-8") for path in text_folder.rglob("*.txt"))
    train, held_out = _documents(data, data.train), _documents(data, data.validation)
    assert sorted(train + held_out) == files
    assert held_out
    sampler = RowSampler(len(data.train), 4, seed=0)
    seen = set()
    for _, epoch, batch in iterate_batches(data.train, sampler, 0, sampler.batches_per_epoch):
        assert epoch == 0
        assert batch.input_ids.shape == (4, 512)
        seen |= set(batch.row_ids.tolist())
    assert len(seen) == sampler.batches_per_epoch * 4


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_jsonl_and_parquet_give_the_rows_of_the_text_files(kind: str, tmp_path: Path, make_config):
    texts = [f"{n} ships, größer than {n + 1} boats" for n in range(50)]
    path = tmp_path / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    folder = tmp_path / "folder"
    folder.mkdir()
    for n, text in enumerate(texts):
        (folder / f"{n:03d}.txt").write_text(text, encoding="utf-8")
    ours = prepare_data(make_config(path), progress=False)
    theirs = prepare_data(make_config(folder), progress=False)
    assert ours.train.fingerprint == theirs.train.fingerprint
    assert ours.validation.fingerprint == theirs.validation.fingerprint
    assert ours.folder != theirs.folder


def test_the_second_call_reuses_the_first_ones_rows(text_folder: Path, make_config, monkeypatch):
    config = make_config(text_folder)
    first = prepare_data(config, progress=False)
    monkeypatch.setattr(prepared, "_build", None)
    second = prepare_data(config, progress=False)
    assert second.folder == first.folder
    assert second.train.fingerprint == first.train.fingerprint
    assert second.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert torch.equal(second.train.batch([0]).input_ids, first.train.batch([0]).input_ids)


def test_a_saved_copy_of_the_trained_tokenizer_finds_the_same_rows(
    text_folder: Path, make_config, tmp_path: Path, monkeypatch
):
    config = make_config(text_folder)
    first = prepare_data(config, progress=False)
    copy = load_tokenizer(first.tokenizer.save(tmp_path / "run" / "tokenizer"))
    other = train_bpe(["something else entirely"] * 9, 270)
    assert prepare_data(config, other, progress=False).folder != first.folder
    monkeypatch.setattr(prepared, "_build", None)
    assert prepare_data(config, copy, progress=False).folder == first.folder


def test_everything_the_rows_depend_on_changes_the_folder(text_folder: Path, make_config):
    base = {"seq_len": 32, "packing": "best_fit", "tokenizer_vocab_size": 300}
    folders = {prepare_data(make_config(text_folder, **base), progress=False).folder}
    for change in (
        {"seq_len": 48},
        {"packing": "none"},
        {"packing": "concatenate"},
        {"tokenizer_vocab_size": 310},
        {"validation_fraction": 0.3},
        {"num_samples": 20},
        {"special_mask_id": 290},
    ):
        config = make_config(text_folder, **{**base, **change})
        folders.add(prepare_data(config, progress=False).folder)
    assert len(folders) == 8
    same = make_config(text_folder, **base, shard_tokens=64, num_workers=2)
    assert prepare_data(same, progress=False).folder in folders
    next(iter(text_folder.rglob("*.txt"))).write_text("changed", encoding="utf-8")
    assert prepare_data(make_config(text_folder, **base), progress=False).folder not in folders


@pytest.mark.parametrize("locked", ["locked", "unlocked"])
def test_two_processes_preparing_at_once_end_with_one_folder(
    locked: str, text_folder: Path, tmp_path: Path
):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(text_folder), str(tmp_path), name, locked],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for name in ("one", "two")
    ]
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert len({out for out, _ in results}) == 1
    assert len(list(tmp_path.glob("built-*"))) == (1 if locked == "locked" else 2)
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert not folders[0].name.startswith(".")


def test_a_failed_build_leaves_nothing_and_a_killed_ones_remains_are_removed(
    text_folder: Path, make_config, monkeypatch
):
    config = make_config(text_folder)
    cache = Path(config.data.cache_dir)

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SplitBuilder, "finish", fail)
        with pytest.raises(OSError, match="no space"):
            prepare_data(config, progress=False)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    lock = next(cache.glob(".*.lock"))
    killed = cache / f"{lock.name.removesuffix('.lock')}.tmp-abc"
    (killed / "train").mkdir(parents=True)
    prepare_data(config, progress=False)
    assert not killed.exists()


def test_streaming_gives_the_same_rows(text_folder: Path, make_config, monkeypatch):
    import datasets

    whole = prepare_data(make_config(text_folder), progress=False)
    streamed = prepare_data(make_config(text_folder, streaming=True), progress=False)
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_folder.rglob("*.txt"))]

    def load_dataset(name, config, split, streaming):
        dataset = datasets.Dataset.from_dict({"text": texts})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    named = prepare_data(make_config("some/dataset"), progress=False)
    named_stream = prepare_data(make_config("some/dataset", streaming=True), progress=False)
    assert len({data.folder for data in (whole, streamed, named, named_stream)}) == 4
    for data in (streamed, named, named_stream):
        assert data.train.fingerprint == whole.train.fingerprint
        assert data.validation.fingerprint == whole.validation.fingerprint


@pytest.mark.parametrize("packing", ["best_fit", "concatenate", "none"])
def test_small_buffers_and_shards_lose_no_token(packing: str, tmp_path: Path):
    info = TokenizerInfo(60_000, 0, 1, 2, None, (0, 1, 2))
    lengths = np.random.default_rng(0).integers(0, 90, 300)
    ids = iter(range(3, 60_000))
    documents = [list(itertools.islice(ids, int(length))) for length in lengths]
    fingerprints = set()
    for buffer_tokens, shard_tokens in ((1, 400), (500, 333), (1 << 20, 1 << 20)):
        folder = tmp_path / f"{packing}{buffer_tokens}"
        builder = SplitBuilder(folder, info, 40, packing, shard_tokens, buffer_tokens)
        for start in range(0, 300, 7):
            builder.add(documents[start : start + 7], 0)
        manifest = manifest_fields(info, 40, packing) | {"splits": {"train": builder.finish()}}
        rows = PackedRows(folder, manifest, "train")
        batch = rows.batch(range(len(rows)))
        kept = batch.input_ids[batch.maskable]
        assert sorted(kept.tolist()) == list(range(3, 3 + int(lengths.sum())))
        assert (batch.input_ids == 1).sum() == 300
        fingerprints.add(rows.fingerprint)
    assert len(fingerprints) == 1 or packing == "best_fit"


def test_memory_stays_bounded_while_a_long_corpus_is_written(tmp_path: Path):
    info = TokenizerInfo(300, 0, 1, 2, None, (0, 1, 2))
    builder = SplitBuilder(tmp_path, info, 64, "best_fit", 1 << 16, buffer_tokens=1 << 14)
    documents = [list(range(3, 203))] * 100
    tracemalloc.start()
    for _ in range(200):
        builder.add(documents, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    entry = builder.finish()
    assert sum(shard["rows"] for shard in entry["shards"]) * 64 * 2 > 8_000_000
    assert peak < 5_000_000


@pytest.mark.parametrize("part", ["tokens", "starts", "offsets"])
def test_truncated_altered_and_missing_shards_are_named(part: str, text_folder: Path, make_config):
    folder = prepare_data(make_config(text_folder), progress=False).folder
    path = folder / "train" / f"00000.{part}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"00000\.{part} has {len(whole) - 2} bytes instead of"):
        prepare_data(make_config(text_folder), progress=False)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    damaged = prepare_data(make_config(text_folder), progress=False)
    with pytest.raises(DataError, match=rf"00000\.{part} was altered.*Delete"):
        damaged.train.batch([0])
    path.unlink()
    with pytest.raises(DataError, match=rf"00000\.{part} is missing"):
        load_prepared(folder)
    shutil.rmtree(folder)
    assert len(prepare_data(make_config(text_folder), progress=False).train.batch([0]).row_ids) == 1


def test_damaged_manifest_and_counts_are_named(text_folder: Path, make_config):
    data = prepare_data(make_config(text_folder), progress=False)
    (data.folder / "validation" / "counts.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"validation/counts\.npy cannot be read"):
        data.validation.unigram_bits_per_byte(data.train)
    np.save(data.folder / "validation" / "counts.npy", np.zeros(512, dtype=np.int64))
    with pytest.raises(DataError, match=r"counts\.npy does not belong to this split"):
        data.validation.unigram_bits_per_byte(data.train)
    for text in ("", "{", "{}", "[]", '{"splits": {"train": {}}}'):
        (data.folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
            load_prepared(data.folder)


def test_empty_and_single_document_corpora_are_refused(tmp_path: Path, make_config):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "  "}\n')
    with pytest.raises(DataError, match=r"a\.jsonl \(data\.dataset_path\) holds no text"):
        prepare_data(make_config(path), progress=False)
    path.write_text('{"text": "only one"}\n')
    with pytest.raises(DataError, match=r"has 1 document\(s\), all held out"):
        prepare_data(make_config(path), progress=False)
    alone = prepare_data(make_config(path, validation_fraction=0.0), progress=False)
    assert (len(alone.train), len(alone.validation)) == (1, 0)
    with pytest.raises(DataError, match=r"validation_fraction must lie in \[0, 1\), got 1\.5"):
        prepare_data(make_config(path, validation_fraction=1.5), progress=False)


def test_two_documents_are_enough(tmp_path: Path, make_config):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the first"}\n{"text": "the second"}\n')
    data = prepare_data(make_config(path), progress=False)
    assert (data.train.n_documents, data.validation.n_documents) == (1, 1)


def test_lone_surrogates_become_replacement_characters(tmp_path: Path, make_config):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "broken \\ud800 half"}\n{"text": "pair \\ud83e\\udd80 ok"}\n')
    data = prepare_data(make_config(path, validation_fraction=0.0), progress=False)
    assert sorted(_documents(data, data.train)) == ["broken \ufffd half", "pair 🦀 ok"]
    assert data.train.n_bytes == len("broken \ufffd halfpair 🦀 ok".encode())


def test_the_tokenizer_is_the_checkpoints_unless_one_is_named(
    text_folder: Path, make_config, tmp_path: Path
):
    one, two = train_bpe(["checkpoint words"] * 9, 262), train_bpe(["other words"] * 9, 261)
    one.save(tmp_path / "checkpoint")
    two.save(tmp_path / "named")
    config = make_config(text_folder)
    config.model.init_from = str(tmp_path / "checkpoint")
    assert prepare_data(config, progress=False).tokenizer.fingerprint() == one.fingerprint()
    config.data.tokenizer_path = str(tmp_path / "named")
    assert prepare_data(config, progress=False).tokenizer.fingerprint() == two.fingerprint()
    assert prepare_data(config, one, progress=False).tokenizer is one


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path: Path, make_config):
    texts = [f"the word {n}" for n in range(400)]
    held_out = [text for text in texts if _is_held_out(text)]
    lines = [text if text not in held_out else text + " zq" for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    data = prepare_data(make_config(path, validation_fraction=0.2), progress=False)
    expected = train_bpe([text for text in lines if text in texts and text not in held_out], 512)
    assert data.tokenizer.fingerprint() == expected.fingerprint()
    assert data.tokenizer.fingerprint() != train_bpe(texts, 512).fingerprint()


def _is_held_out(text: str) -> bool:
    from stackwise.data.documents import Document, split_position

    return split_position(Document(text)) < 0.2


def test_the_cache_folder_comes_from_config_then_environment(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "environment"))
    assert prepared.cache_folder("/configured") == Path("/configured")
    assert prepared.cache_folder(None) == tmp_path / "environment"
    monkeypatch.delenv("STACKWISE_CACHE")
    assert prepared.cache_folder(None) == Path.home() / ".cache" / "stackwise"


def test_describe_says_what_was_prepared(builtin: PreparedData):
    found = describe(builtin)
    assert found["vocab_size"] == 512
    assert found["train"]["documents"] + found["validation"]["documents"] >= 10_000
    assert found["train"]["rows"] == len(builtin.train) > 6000
    assert found["train"]["fill_rate"] > 0.99
    assert 2.0 < found["bytes_per_token"] < 2.2
    assert 3.5 < found["unigram_bits_per_byte"] < 3.9
    assert json.loads(json.dumps(found)) == found
