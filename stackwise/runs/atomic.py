"""Writes that are either wholly there or not there at all, whatever kills the process.

Everything goes to a temporary name beside its target, is fsynced, renamed over the target, and the
folder that holds it is fsynced. A process killed in between leaves only temporary names, which
:func:`clean_temporary` removes; a full disk leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stackwise.runs.errors import RunError

_TEMPORARY = ".tmp"
_DISPLACED = ".displaced"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


def gigabytes(n_bytes: int) -> str:
    """``n_bytes`` for people: "1.50 GB" (10^9 bytes), "1.5 MB", "12 bytes"."""
    for unit, size, digits in (("GB", 10**9, 2), ("MB", 10**6, 1), ("kB", 10**3, 1)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{digits}f} {unit}"
    return f"{n_bytes} bytes"


def free_bytes(path: str | Path) -> int:
    """Bytes that can still be written on the disk that holds, or will hold, ``path``."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free(path: str | Path, needed: int) -> None:
    """Raises :class:`RunError` when the disk of ``path`` has fewer than ``needed`` bytes free."""
    free = free_bytes(path)
    if free < needed:
        raise RunError(
            f"not enough disk space for {path}: {gigabytes(needed)} needed, {gigabytes(free)} "
            "free. Nothing was written; free some space and resume the run."
        )


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turns the operating system's refusals to store ``path`` into :class:`RunError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise RunError(
                f"the disk filled up while writing {path} ({error.strerror}; "
                f"{gigabytes(free_bytes(path))} free). What was there before is intact; free some "
                "space and resume the run."
            ) from error
        if error.errno in _REFUSED:
            raise RunError(f"cannot write {error.filename or path}: {error.strerror}") from error
        raise


def fsync_folder(folder: str | Path) -> None:
    """Makes the names in ``folder`` (creations, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_path(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}"


def is_temporary(name: str) -> bool:
    """Whether ``name`` is one this module gives to unfinished files and folders."""
    return name.startswith(".") and name.endswith((_TEMPORARY, _DISPLACED))


@contextlib.contextmanager
def atomic_file(path: str | Path, needed: int = 0) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` only when the block ends without an exception.

    ``needed`` bytes are required to be free beforehand. An exception leaves ``path`` as it was.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    with storage_errors(path):
        require_free(path, needed)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces the file ``path`` by ``data``, atomically."""
    with atomic_file(path, needed=len(data)) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_folder(path: str | Path, needed: int = 0, replace: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, with all its files on disk, when the block ends.

    With ``replace=False`` an existing ``path`` that is not empty raises ``FileExistsError``.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    with storage_errors(path):
        require_free(path, needed)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            _fsync_tree(temporary)
            if replace:
                _replace_folder(temporary, path)
            else:
                _rename_to_new(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _fsync_tree(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            _fsync_tree(entry)
        else:
            with open(entry, "rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "already exists", str(path)) from error
        raise


def _replace_folder(temporary: Path, path: Path) -> None:
    # POSIX renames a folder only over an empty one. The old folder steps aside under a name from
    # which clean_temporary brings it back if the process dies between the two renames.
    displaced = path.parent / f".{path.name}{_DISPLACED}"
    if path.exists():
        shutil.rmtree(displaced, ignore_errors=True)
        os.rename(path, displaced)
    try:
        os.rename(temporary, path)
    except OSError:
        if displaced.exists():
            os.rename(displaced, path)
        raise
    shutil.rmtree(displaced, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Deletes a folder; a kill in the middle leaves a temporary name, never half a folder."""
    path = Path(path)
    doomed = _temporary_path(path)
    with storage_errors(path):
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean_temporary(folder: str | Path) -> list[Path]:
    """Removes what a killed process left under ``folder`` and returns those paths.

    A folder that was stepping aside for its replacement is put back if the replacement never
    came. To be called only while no other process writes there (see :class:`RunLock`).
    """
    cleaned = []
    for parent, folders, files in os.walk(folder):
        leftovers = [name for name in folders + files if is_temporary(name)]
        folders[:] = [name for name in folders if not is_temporary(name)]
        for name in leftovers:
            path = Path(parent, name)
            home = path.parent / name[1 : -len(_DISPLACED)]
            if name.endswith(_DISPLACED) and not home.exists():
                os.rename(path, home)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            cleaned.append(path)
    return cleaned
