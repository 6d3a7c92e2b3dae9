"""A file or folder is replaced wholly or not at all, and a full disk is a readable error."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from stackwise.runs import atomic
from stackwise.runs.atomic import atomic_file, atomic_folder, clean_temporary, write_bytes
from stackwise.runs.errors import RunError
from tests.runs.killing import die_at, run_apart


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def write_two(folder: Path, version: str) -> None:
    with atomic_folder(folder) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(version)


def read_two(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b")}


def fail_in_file(target: Path, error: BaseException, needed: int = 0) -> None:
    with atomic_file(target, needed) as file:
        file.write(b"half of the new")
        raise error


def fail_in_folder(target: Path, error: BaseException) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("new")
        raise error


def test_exception_inside_keeps_old_file_and_leaves_nothing_else(tmp_path):
    write_bytes(tmp_path / "x", b"old")
    with pytest.raises(KeyError):
        fail_in_file(tmp_path / "x", KeyError("stop"))
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_exception_inside_keeps_old_folder_and_leaves_nothing_else(tmp_path):
    write_two(tmp_path / "x", "old")
    with pytest.raises(KeyError):
        fail_in_folder(tmp_path / "x", KeyError("stop"))
    assert read_two(tmp_path / "x") == {"old"}
    assert names(tmp_path) == ["a", "b", "x"]


def test_file_and_folders_are_fsynced_before_and_after_rename(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), original(a, b)))
    write_bytes(tmp_path / "x", b"data")
    assert len(events) == 3
    assert atomic.is_temporary(Path(events[0]).name)
    assert events[1:] == ["rename", str(tmp_path)]


@pytest.mark.parametrize("existing", [False, True])
def test_folder_killed_at_every_storage_operation_is_old_or_new_after_cleaning(tmp_path, existing):
    seen = set()
    for operation in range(40):
        home = tmp_path / str(operation)
        home.mkdir()
        if existing:
            write_two(home / "x", "old")
        died = die_at(operation, write_two, home / "x", "new")
        clean_temporary(home)
        if existing or (home / "x").exists():
            content = read_two(home / "x")
            assert len(content) == 1, f"mixed after operation {operation}"
            seen |= content
        assert names(home) in ([], ["a", "b", "x"])
        if not died:
            break
    else:
        pytest.fail("the write never finished")
    assert operation > 5
    assert "new" in seen
    assert ("old" in seen) == existing


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"x: 2\.00 GB needed, 1\.5 MB free"):
        fail_in_file(tmp_path / "deep" / "x", AssertionError("the block must not run"), 2 * 10**9)
    assert names(tmp_path) == []


def test_disk_filling_up_is_a_run_error_and_keeps_the_old_file(tmp_path):
    write_bytes(tmp_path / "x", b"old")
    with pytest.raises(RunError, match=r"disk filled up while writing .*x"):
        fail_in_file(tmp_path / "x", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def _write_beyond_limit(target: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        write_bytes(target, bytes(1_000_000))
    except RunError as error:
        os._exit(42 if "disk filled up" in str(error) else 43)


def test_real_short_write_is_a_run_error_and_keeps_the_old_file(tmp_path):
    write_bytes(tmp_path / "x", b"old")
    assert run_apart(_write_beyond_limit, tmp_path / "x") == 42
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_unrelated_errors_pass_unchanged(tmp_path):
    with pytest.raises(ConnectionError):
        fail_in_file(tmp_path / "x", ConnectionError("from the caller's own code"))


def test_existing_folder_is_refused_without_replace(tmp_path):
    write_two(tmp_path / "x", "old")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "x", replace=False):
        pass
    assert read_two(tmp_path / "x") == {"old"}
    assert names(tmp_path) == ["a", "b", "x"]


def test_cleaning_touches_only_temporary_names(tmp_path):
    keep = [".hidden", "x.tmp", ".lock", "deep/y"]
    drop = [".x.1-ab.tmp", "deep/.y.2-cd.tmp/inner"]
    for name in keep + drop:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    cleaned = clean_temporary(tmp_path)
    assert sorted(path.name for path in cleaned) == [".x.1-ab.tmp", ".y.2-cd.tmp"]
    assert names(tmp_path) == sorted(["deep", "y", ".hidden", "x.tmp", ".lock"])
