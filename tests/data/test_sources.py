"""Which source a name means, and the messages for those that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackwise.data import DataError, hub
from stackwise.data.sources import open_source


def _texts(config) -> list[str]:
    return [document.text for document in open_source(config.data).documents()]


def test_a_folder_is_read_in_order_of_path_without_hidden_files(tmp_path: Path, make_config):
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "b" / "2.txt").write_text("second")
    (folder / "b" / "10.jsonl").write_text('{"text": "first"}\n')
    (folder / "a.md").write_text("zeroth")
    assert _texts(make_config(folder)) == ["zeroth", "first", "second"]


def test_num_samples_takes_the_first_documents(text_folder: Path, make_config):
    everything = _texts(make_config(text_folder))
    assert len(everything) == 40
    assert _texts(make_config(text_folder, num_samples=7)) == everything[:7]
    assert len(_texts(make_config("builtin", num_samples=1000))) == 1000


def test_identity_follows_content_not_time(text_folder: Path, make_config):
    config = make_config(text_folder)
    before = open_source(config.data).identity()
    file = next(iter(sorted(text_folder.rglob("*.txt"))))
    file.touch()
    assert open_source(config.data).identity() == before
    file.write_text(file.read_text(encoding="utf-8").replace("river", "ravin"), encoding="utf-8")
    assert open_source(config.data).identity() != before


def test_streaming_identity_follows_size_and_time(text_folder: Path, make_config):
    config = make_config(text_folder, streaming=True)
    before = open_source(config.data).identity()
    assert open_source(config.data).identity() == before
    with next(iter(sorted(text_folder.rglob("*.txt")))).open("a") as file:
        file.write("more")
    assert open_source(config.data).identity() != before


def test_a_dataset_saved_by_datasets(tmp_path: Path, make_config):
    import datasets

    dataset = datasets.Dataset.from_dict({"story": ["one", "", None, "two"], "n": [1, 2, 3, 4]})
    dataset.save_to_disk(str(tmp_path / "saved"))
    splits = datasets.DatasetDict({"test": dataset})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert _texts(make_config(tmp_path / "saved", text_field="story")) == ["one", "two"]
    config = make_config(tmp_path / "splits", text_field="story", dataset_split="test")
    assert _texts(config) == ["one", "two"]
    assert open_source(config.data).identity() == open_source(config.data).identity()
    with pytest.raises(DataError, match=r"has no field 'text'; it has n, story"):
        _texts(make_config(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"has no split 'train'; it has test"):
        _texts(make_config(tmp_path / "splits", text_field="story"))
    with pytest.raises(DataError, match="field 'n' holds int, not text"):
        _texts(make_config(tmp_path / "saved", text_field="n"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_asked_for_by_name_and_streamed(
    streaming: bool, make_config, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        dataset = datasets.Dataset.from_dict({"text": ["one", "two"]})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = make_config("roneneldan/TinyStories", dataset_config="en", streaming=streaming)
    assert _texts(config) == ["one", "two"]
    assert asked == [("roneneldan/TinyStories", "en", "train", streaming)]


def test_a_streamed_dataset_without_known_columns_still_names_its_fields(
    make_config, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    def load_dataset(*_, **__):
        return datasets.IterableDataset.from_generator(lambda: iter([{"body": "one"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"has no field 'text'; it has body"):
        _texts(make_config("somebody/something", streaming=True))
    assert _texts(make_config("somebody/something", streaming=True, text_field="body")) == ["one"]


def test_no_network_is_said_at_once(make_config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(DataError, match=r"'wikitext'.*cannot be reached.*use 'builtin'"):
        _texts(make_config("wikitext"))


def test_a_hub_failure_with_a_network_is_not_blamed_on_it(
    make_config, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    def load_dataset(*_, **__):
        raise ValueError("Unknown split 'tarin'. Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub, "_told_to_stay_offline", lambda: False)
    with pytest.raises(DataError, match=r"Should be one of \['train', 'test'\]\.$"):
        _texts(make_config("wikitext"))


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "absent.txt", "~/absent.jsonl"])
def test_an_absent_path_is_not_taken_for_a_dataset(name: str, make_config):
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(make_config(name).data)


def test_folders_and_files_of_other_kinds_are_refused(tmp_path: Path, make_config):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.docx").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no \.txt, .*\.parquet.*holds 1 other file"):
        open_source(make_config(tmp_path / "x").data)
    with pytest.raises(DataError, match=r"a\.docx is none of \.txt"):
        open_source(make_config(tmp_path / "x" / "a.docx").data)


def test_the_libraries_are_offline_only_while_the_hub_is_out_of_reach(monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with hub.offline_when_unreachable():
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    with hub.offline_when_unreachable():
        assert constants.HF_HUB_OFFLINE is False


def test_the_hub_is_asked_for_one_connection_only(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080")
    hub.hub_reachable.cache_clear()
    assert not hub.hub_reachable()
    assert not hub.hub_reachable()
    assert asked == [("mirror.example", 8080)]
    hub.hub_reachable.cache_clear()
